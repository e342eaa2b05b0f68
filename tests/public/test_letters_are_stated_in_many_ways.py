"""Letters that a response states outside a box were missed: after a formula in a box, in Chinese, full width.

Source: https://github.com/NVIDIA-NeMo/Skills/issues/1511
"""

import pytest

from vlm_sapo.rewards.verifiers.answers import NoAnswer
from vlm_sapo.rewards.verifiers.table import VERIFIERS
from vlm_sapo.types import Example, ResponseText

RIVERS = ["Elbe", "Rhine", "Oder", "Weser"]
SHAPES = ["三角形", "圆", "正方形", "菱形"]
"""Chinese forms: https://github.com/ai-twinkle/Eval/issues/156."""


def score(options, gold, response, finding="stated") -> float:
    row = Example(id="1", problem="Which?", answer=gold, columns={"choices": options})
    try:
        return VERIFIERS["choice"](ResponseText(response), row, finding=finding)
    except NoAnswer:
        return 0


@pytest.mark.parametrize(
    "response",
    [
        "With \\boxed{v = \\Delta s / t} it is clear.\n\n**Answer: C**",
        "Option A is too short; therefore the answer must be C",
        "It can't be (A).\n\nThe correct option is C.",
        "## Answer\n\nC. Oder",
        "(C) Oder",
        "The answer is C. Note that B is longer.",
        "Final answer: Oder",
        "First \\boxed{B}, but that flows west.\nAnswer: C",
    ],
)
def test_what_is_stated_last_counts(response):
    assert score(RIVERS, "C", response) == 1
    assert all(score(RIVERS, gold, response) == 0 for gold in "ABD")


@pytest.mark.parametrize(
    "response",
    [
        "A. Elbe\nB. Rhine\nC. Oder",
        "1. It may be the Elbe\n2. It may be the Oder",
        "C isn't it",
        "I can't see C.",
    ],
)
def test_what_is_only_mentioned_is_no_answer(response):
    assert score(RIVERS, "C", response) == 0


@pytest.mark.parametrize(
    "response",
    ["选B", "答案选B。", "故选：B．", "我選擇 B", "正确答案是 B、圆", "答案：Ｂ", "所以选（B）", r"\boxed{Ｂ}", r"\boxed{选B}"],
)  # fmt: skip
def test_chinese_forms_name_a_letter(response):
    assert score(SHAPES, "B", response) == 1
    assert all(score(SHAPES, gold, response) == 0 for gold in ("A", "C", "D", "AB"))


@pytest.mark.parametrize(
    "response", [r"\boxed{A、C}", r"\boxed{ＡＣ}", r"\boxed{A和C}", "答案：A、C", "故选AC"]
)
def test_chinese_lists_are_sets(response):
    assert score(SHAPES, "AC", response) == 1
    assert all(score(SHAPES, gold, response) == 0 for gold in ("A", "C", "ABC"))


@pytest.mark.parametrize("answer", ["不是B", "B、菱形", "B或C", "B错", "A或B"])
def test_chinese_denials_and_alternatives_are_no_answer(answer):
    assert score(SHAPES, "B", rf"\boxed{{{answer}}}", "marked") == 0


def test_training_reads_marked_letters_alone():
    for response in ("选B", "**Answer: B**", "The answer must be B"):
        assert score(SHAPES, "B", response, "marked") == 0
