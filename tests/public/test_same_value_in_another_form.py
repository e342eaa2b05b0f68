"""Equations in another form, upright constants and inequalities for intervals scored 0.

Source: https://github.com/huggingface/Math-Verify/issues/26
"""

import pytest

from tests.public.near_misses import verdicts
from tests.rewards.test_hard_cases import score
from tests.rewards.test_verifiers import example

RIGHT_AND_NEAR_MISS = [
    ("y=3x-2", ["3x-y-2=0", "y - 3x = -2", "2y=6x-4", "y=3x-2", "3x-2"], ["3x-y+2=0", "y=3x+2", "3x+y-2=0"]),
    ("3x-y-2=0", ["y=3x-2", "6x-2y-4=0"], ["y=2x-3", "6x-2y-2=0"]),
    ("x+2y-z=5", ["2x+4y-2z-10=0", "z=x+2y-5"], ["x+2y+z=5", "2x+4y-2z=5"]),
    (r"\frac{x^2}{9}+\frac{y^2}{5}=1", ["5x^2+9y^2=45"], ["9x^2+5y^2=45", "5x^2+9y^2=1"]),
    ("(x+2)^2+y^2=9", ["x^2+y^2+4x-5=0"], ["x^2+y^2-4x-5=0", "x^2+y^2+4x+5=0"]),
    ("y = 0.5x", ["x = 2y", "x-2y=0"], ["x = 0.5y"]),
    (r"x+\sqrt{2}y=1", [r"\sqrt{2}x+2y=\sqrt{2}"], [r"\sqrt{2}x+y=\sqrt{2}"]),
    ("x = 4", ["4"], ["2x = 8", "x^2 = 16"]),  # the problem restated is no solution
    ("y > 3x", ["3x < y"], ["y < 3x", "3x > y"]),
    (r"2 - \frac{3}{\mathrm{e}}", ["2 - 3e^{-1}", r"2-3/e"], ["2 - 3e", r"2+\frac{3}{\mathrm{e}}"]),
    (r"\mathrm{e}^{3}", ["e^3"], ["e^2", "3e"]),
    (r"1+4\mathrm{i}", ["1+4i", "4i+1"], ["1-4i", "4+i"]),
    (r"(2,\infty)", ["x>2", "2<x"], [r"x \ge 2", "x<2", "x>3"]),
    (r"[-3,5)", [r"-3 \le x < 5"], ["-3<x<5", r"-3 \le x \le 5"]),
    (r"(-\infty,0)\cup(4,\infty)", [r"x<0 \text{ or } x>4"], ["x<0", r"x<0 \text{ or } x>5"]),
    ("x > 2", [r"(2,\infty)"], ["y > 2", r"[2,\infty)"]),
    (r"3\sqrt{2}", [r"\sqrt{18}", r"\frac{6}{\sqrt2}"], [r"\sqrt{6}", "4.24"]),
    (r"\sqrt{7+4\sqrt{3}}", [r"2+\sqrt{3}"], [r"2+\sqrt{2}"]),
    (r"\dfrac{3}{4}", [r"\tfrac34", "0.75"], [r"\frac{4}{3}"]),
    (r"30^\circ", ["30"], [r"\frac{\pi}{6}"]),
]


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    verdicts(RIGHT_AND_NEAR_MISS),
)
def test_forms_of_one_value(gold, answer, expected):
    assert score("math", answer, example(gold)) == expected


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("10^{10^{10^{10}}}", "10^{10}"),
        ("((((9!)!)!)!)!", "2^{3^{4^{5^6}}}"),
        ("(x+y)^{900}=1", "(x+y)^{901}=1"),
    ],
)
def test_huge_numbers_are_not_computed(gold, answer):
    assert score("math", answer, example(gold)) == 0
