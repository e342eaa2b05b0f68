"""Grading hung on what a collapsed model had written.

Source: https://github.com/huggingface/Math-Verify/issues/65
"""

import pytest

from tests.rewards.test_verifiers import example, graded
from vlm_sapo.rewards.verifiers.table import VERIFIERS

NAMES = ("math", "number", "count", "choice", "exact", "short", "anls", "edit_distance", "auto")


@pytest.mark.parametrize(
    "response",
    [
        "a" * 9000,
        "so so " * 2000,
        "(" * 9000,
        r"\frac{" * 3000,
        "x^" * 5000,
        "1 2 3 " * 2500,
        r"\boxed{" + "7" * 9000 + "}",
    ],
    ids=lambda text: text[:8],
)
def test_it_has_no_answer(response):
    row = example("B", problem="p")
    for name in NAMES:
        gold = "3" if name in ("number", "count") else row.answer
        assert graded(VERIFIERS[name], response, example(gold), finding="stated") in ("no_answer", 0)


def test_a_long_thought_with_an_answer_is_read():
    response = "so so " * 2000 + r"\boxed{3}"
    assert graded(VERIFIERS["math"], response, example("3")) == 1
    assert graded(VERIFIERS["math"], response, example("4")) == 0
