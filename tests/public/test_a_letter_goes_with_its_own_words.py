"""A letter with its option's words behind it lost its reward: an article or a letter in them was an option's.

Source: https://github.com/NVIDIA-NeMo/Gym/issues/1790
"""

import pytest

from vlm_sapo.rewards.verifiers.answers import NoAnswer
from vlm_sapo.rewards.verifiers.table import VERIFIERS
from vlm_sapo.types import Example, ResponseText

LENSES = [
    "A flat pane",
    "A prism of glass",
    "Two mirrors",
    "A lens that bends light inwards",
    "None of the above",
]
SETS = ["the north gate", "the south gate", "Both A and B", "Neither A nor B"]
NOTES = ["G", "C", "D", "B", "A"]
"""Options that are letters: https://github.com/MMMU-Benchmark/MMMU/issues/83."""
COUNTS = ["2", "3", "4", "1"]


def score(options, gold, answer) -> float:
    row = Example(id="1", problem="Which?", answer=gold, columns={"choices": options})
    try:
        return VERIFIERS["choice"](ResponseText(rf"So \boxed{{{answer}}}"), row)
    except NoAnswer:
        return 0


@pytest.mark.parametrize(
    ("options", "gold", "right", "wrong"),
    [
        (
            LENSES,
            "D",
            ["D: A lens", "D) A bending lens", "D. A lens that bends light inwards", r"\text{D: A lens}", "D - A lens"],
            ["D: A is the lens", "D. A or B", "D: A flat pane", "D. A prism of glass", "D, or A", "D. B bends light"],
        ),
        (LENSES, "A", ["A", "A: A flat pane", "A. A pane", "A) flat pane"], ["A prism of glass", "A lens", "A: Two mirrors"]),
        (LENSES, "E", ["E", "E. None of the above", "None of the above"], ["A. None of the above", "E. Two mirrors"]),
        (
            SETS,
            "C",
            ["C", "C. Both A and B", "(C) A and B", "Both A and B", "C: both A & B"],
            ["A and B", "A, B", "D. Both A and B", "C. A", "C. Neither A nor B", "C. B is right"],
        ),
        (SETS, "D", ["D. Neither A nor B", "Neither A nor B"], ["C. Neither A nor B", "D. Both A and B"]),
        (NOTES, "C", ["C", "(C) D", "C. D", "C: D", r"\text{(C) D}"], ["D", "(D) C", "C. B", "C or D", "C, D", "(C) G"]),
        (NOTES, "A", ["A", "A. G", "G"], ["G. A", "E. A", "A. A"]),
        (COUNTS, "B", ["B", "3", "B. 3", "(B) 3", "B: three"], ["2", "B. 2", "B. 4", "C. 3", "2, 3", "B. 5"]),
        (["not enough light", "a wrong lens"], "A", ["A. not enough light", "A. There is not enough light"], ["A. not", "B. not"]),
    ],
)  # fmt: skip
def test_a_letter_with_words(options, gold, right, wrong):
    assert [answer for answer in right if score(options, gold, answer) != 1] == []
    assert [answer for answer in wrong if score(options, gold, answer) != 0] == []


def test_without_options_the_words_are_taken_on_trust():
    for answer in ("B. A triangle", "B: A right triangle", "(B) I and II only", "B. not enough data"):
        assert score([], "B", answer) == 1 and score([], "A", answer) == 0


def test_several_options_are_a_set():
    trees = ["oak", "pine", "birch", "elm"]
    for gold in ("AC", "A, C", "A and C", '["A", "C"]', '["oak", "birch"]', "oak, birch", "A、C"):
        for answer in (
            "AC",
            "C and A",
            "A, C",
            "(A), (C)",
            "oak, birch",
            "birch and oak",
            "A. oak, C. birch",
        ):
            assert score(trees, gold, answer) == 1, (gold, answer)
        for answer in ("A", "ABC", "AB", "oak", "oak, elm", "A, birch or elm", "A. oak, C. elm"):
            assert score(trees, gold, answer) == 0, (gold, answer)
