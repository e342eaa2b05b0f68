"""Answers in usual Chinese wording were counted as none: 選 B, 我選擇 B, 應選 (A).

Source: https://github.com/ai-twinkle/Eval/issues/156
"""

import pytest

from tests.rewards.test_verifiers import example, graded
from vlm_sapo.rewards.verifiers.table import VERIFIERS


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("我認為應該選 C", 1),
        ("選 C", 1),
        ("我選擇 C", 1),
        ("我选择C。", 1),
        ("應選 (C)", 1),
        ("故选：C．", 1),
        ("因此，正确答案为 C、三角形", 1),
        ("答案：Ｃ", 1),
        ("正确选项是C，因为A不对。", 1),
        ("答案是 B", 0),
        ("不应该选C", "no_answer"),
        ("不应选C", "no_answer"),
        ("故选：B", 0),
        ("选择了错误的路，无法确定", "no_answer"),
    ],
)
def test_letters(response, score):
    assert graded(VERIFIERS["choice"], response, example("C"), finding="stated") == score


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("答案：48平方厘米", 1),
        ("故答案为：48。", 1),
        ("答：48", 1),
        ("所以面积是48。", 1),
        ("综上，x = 48", 1),
        ("答案：84平方厘米", 0),
        ("所以面积是84。", 0),
    ],
)
def test_values(response, score):
    assert graded(VERIFIERS["math"], response, example("48"), finding="stated") == score
