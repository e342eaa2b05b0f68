"""The gold answer came with its tag, its box or its solution, and right responses were scored 0.

Source: https://github.com/huggingface/open-r1/issues/503
"""

import pytest

from tests.rewards.test_verifiers import example, graded
from vlm_sapo.rewards.verifiers.answers import gold_answer
from vlm_sapo.rewards.verifiers.table import VERIFIERS


@pytest.mark.parametrize(
    "gold",
    [
        "<answer> 26 </answer>",
        r"$\boxed{26}$",
        r"\boxed{26}",
        "#### 26",
        "Two rows of 13 make 26.\n#### 26",
        r"<think>twice thirteen, not 27</think><answer>26</answer>",
        r"Two rows of thirteen tiles make \boxed{26} tiles.",
    ],
)
def test_the_golds_own_answer_counts(gold):
    for name in ("math", "number", "count", "exact", "short", "auto"):
        assert graded(VERIFIERS[name], r"\boxed{26}", example(gold)) == 1
        assert graded(VERIFIERS[name], r"\boxed{27}", example(gold)) == 0


@pytest.mark.parametrize(
    "gold", ["<answer>B</answer>", r"\boxed{B}", "<think>A? No.</think>\n<answer>B</answer>"]
)
def test_letters(gold):
    assert graded(VERIFIERS["choice"], "<answer>B</answer>", example(gold)) == 1
    assert graded(VERIFIERS["choice"], "<answer>A</answer>", example(gold)) == 0


@pytest.mark.parametrize(
    "gold",
    [
        r"x \in \boxed{3} + 4",
        r"\boxed{1}, \boxed{2}",
        "# Title",
        "a #### b",
        "5 #",
        "<b>",
        r"$\frac{1}{2}$",
        "",
    ],
)
def test_other_golds_stay_as_they_are(gold):
    assert gold_answer(gold) == gold
