"""Fractions that are tiny, and sequences with dots, were all equal to each other.

Source: https://github.com/huggingface/Math-Verify/issues/14
"""

import pytest

from tests.public.near_misses import verdicts
from tests.rewards.test_hard_cases import score
from tests.rewards.test_verifiers import example

RIGHT_AND_NEAR_MISS = [
    ("1/907!", ["1/907!", r"\frac{1}{907 \cdot 906!}"], ["1/905!", "0"]),
    (r"\frac{1}{3^{70}}", ["3^{-70}"], [r"\frac{1}{3^{69}}", "3^{-71}"]),
    (r"\frac{5^{80}+1}{4 \cdot 5^{81}}", [], [r"\frac{1}{4 \cdot 5^{81}}", r"\frac{1}{20}"]),
    (r"10^{-25}", [r"\frac{1}{10^{25}}", "1e-25"], [r"2 \cdot 10^{-25}", "10^{-26}"]),
    (r"2.5 \times 10^{-20}", [r"25 \times 10^{-21}"], [r"2.6 \times 10^{-20}", r"2.5 \times 10^{-21}"]),
    (r"10^{-25}\pi", [r"\pi/10^{25}"], [r"10^{-26}\pi"]),
    (r"10^{-25}x", ["x/10^{25}"], ["10^{-26}x"]),
    (r"(10^{-25}, 1)", [], ["(10^{-26}, 1)"]),
    (r"\{10^{-25}, 1\}", [r"\{1, 10^{-25}\}"], [r"\{10^{-26}, 1\}"]),
    (r"[0, 10^{-25}]", [], ["[0, 10^{-26}]"]),
    (r"\begin{pmatrix}10^{-25}\\1\end{pmatrix}", [], [r"\begin{pmatrix}10^{-26}\\1\end{pmatrix}"]),
    ("3^{90}", ["8727963568087712425891397479476727340041449"], ["3^{90}+1", "3^{90}-1"]),
    ("90!", [r"90 \cdot 89!"], ["90!+1"]),
    (r"\frac{1}{7000}", [], ["0.000143"]),
    (r"2, 4, \ldots, 2n", ["2, 4, ..., 2n", r"2,4,\dots,2n", r"\{2, 4, \ldots, 2n\}"],
     [r"1, 2, \ldots, n", r"2, 4, \ldots, n", r"2, 4, 6, \ldots, 2n", "2, 4, 2n", "2n"]),
    (r"1+3+\cdots+(2n-1)", [r"1+3+\ldots+(2n-1)"], [r"1+2+\cdots+(2n-1)", r"1+3+\cdots+(2n+1)"]),
    (r"1:2:4:\ldots", [r"1:2:4:\dots"], [r"1:3:9:\ldots"]),
    (r"\frac12, \frac14, \ldots", [r"0.5, \frac{1}{4}, \ldots"], [r"\frac12, \frac13, \ldots"]),
    ("6", ["6..."], ["1, 2, ..., 6", r"\ldots, 6"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    verdicts(RIGHT_AND_NEAR_MISS),
)
def test_values_and_items_are_compared_as_they_are(gold, answer, expected):
    assert score("math", answer, example(gold)) == expected
