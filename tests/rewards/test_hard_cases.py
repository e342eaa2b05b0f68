"""Answers that were graded wrongly once: wrong ones that were rewarded, right ones that were refused."""

import pytest

from tests.rewards.test_verifiers import example
from vlm_sapo.rewards.answers import NoAnswer, boxed
from vlm_sapo.rewards.verifiers import VERIFIERS
from vlm_sapo.types import Example, Response

CASES = {
    "math": [
        # a power is no unit
        ("5", "5^2", 0), ("5", "5^3", 0), ("2", "2^{3}", 0), ("3", "3mgs^2", 0), ("5", "5J", 1), ("5", "5 m", 1),
        ("100", "10^2", 1), ("8", "2^3", 1), ("1000", "10^{3}", 1), ("64", "4^3", 1), ("5", "5 m^2", 1),
        # words are no products of letters
        ("cat", "act", 0), ("left", "felt", 0), ("no", "on", 0), ("listen", "silent", 0), ("No", "no.", 1),
        (r"\angle ADC", r"\angle ACD", 0), (r"\angle ADC", r"\angle CDA", 1), ("∠ADC", r"\angle ADC", 1),
        (r"\triangle ADC", r"\triangle ACD", 0), ("USA", "SUA", 0), ("BCA", "ABC", 0), ("cat", r"\text{Cat}", 1),
        ("cat, dog", "act, god", 0), ("x-axis", "axis-x", 0), ("cat", "cat.", 1), ("cat", "x = act", 0),
        ("ab", "ba", 1), ("xy", "yx", 1), ("2xy", "2yx", 1), ("mgh", "hmg", 1), ("AB", "BA", 1),
        ("AB = CD", "CD = AB", 1), ("pi", r"\pi", 1), ("a, b", "b, a", 1),
        # integers exactly
        ("1234567", "1234568", 0), ("1234567", "1,234,568", 0), ("1234567", "1234567.0", 1),
        ("12345678901234567890", "12345678901234567891", 0), ("0.3333333", "0.33333331", 1),
        # money and units
        ("5", r"\$5", 1), ("5", "$5", 1), ("5", r"$\$5$", 1), ("18.90", r"\$18.90", 1), (r"\$18.90", "18.90", 1),
        (r"\$18.90", r"\$18.9", 1), (r"\$18.90", "19", 0), ("60", "60 km/h", 1), ("60", r"60 \text{ km/h}", 1),
        ("60 km/h", "60", 1), ("60 km/h", "61", 0), ("5 m^2", "5", 1), ("5 m^2", "6", 0),
        ("5N", "5", 0), ("5N", "5 N", 1), ("60", "60 miles per hour", 1), ("5 cm", "5 m", 0), ("5 cm", r"5\,\mathrm{cm}", 1), ("3x", "3", 0),
        (r"\frac{3}{2} km/h", "1.5", 1), ("9.8", r"9.8\ \mathrm{m/s^2}", 1), ("1200", r"\$1,200", 1),
        # other relations and lists than the number
        ("7", "7_8", 0), ("7", r"\ne 7", 0), ("7", r"\le 7", 0), ("7", "6 | 7", 0), ("7", r"6 \lor 7", 0),
        ("7", r"6\Rightarrow 7", 0), ("7", "x=1=7", 0), ("5", "6=5", 0), ("3", "3:1", 0), ("12", "1 2", 0),
        ("7", "> 7", 0), ("7", "3+4=7", 1), ("6.67", r"x = \frac{20}{3} = 6.67", 1), ("1234", r"1\,234", 1),
        ("7", "7,", 1), ("7", "7;", 1), ("7", r"\color{red}7", 1), ("7", r"\textcolor{red}{7}", 1),
        ("1 1/2", "1.5", 1), ("1 1/2", "1/2", 0), ("1.5", r"1\frac{1}{2}", 1),
    ],
}  # fmt: skip
ROWS = [(name, *case) for name, cases in CASES.items() for case in cases]


def score(name: str, answer: str, row: Example, **args) -> float:
    """The score of an answer in a box; 0 where the verifier finds none."""
    try:
        return VERIFIERS[name](Response(rf"\boxed{{{answer}}}", resized=((100, 100),)), row, **args)
    except NoAnswer:
        return 0.0


@pytest.mark.parametrize(("name", "gold", "answer", "wanted"), ROWS)
def test_verdicts(name, gold, answer, wanted):
    assert score(name, answer, example(gold)) == wanted


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"I write it in \boxed{ as asked. \boxed{7}", ["7"]),
        (r"\boxed{\boxed{7}}", [r"\boxed{7}"]),
        (r"\boxed{\frac{1}{2}} and \boxed{\{1\}}", [r"\frac{1}{2}", r"\{1\}"]),
        (r"{ \boxed{7} } } \boxed{8}", ["7", "8"]),
        (r"\boxed{\boxed{7}", ["7"]),
        (r"\boxed{5", []),
    ],
)
def test_boxes_that_are_not_closed(text, found):
    assert boxed(text) == found
