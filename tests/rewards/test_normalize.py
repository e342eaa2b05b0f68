"""The levels of the text normaliser, and edit distances against a reference."""

import re
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from vlm_sapo.rewards.verifiers.normalize import Level, normalize

LEVELS = get_args(Level)
PIECES = [
    "$", "\\", "{", "}", "(", ")", ",", ".", ";", "%", "°", " ", "\n", "\u2009", "×", "²", "ﬀ", "İ", "…", "1", "12", "1,234",
    "\\frac{1}{2}", "\\text{", "\\left", "\\,", "sqrt(", "cm", "km/h", "x = ", "A", "b", "and", "per cent",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join)


@pytest.mark.parametrize(
    ("level", "text", "normalized"),
    [
        ("unicode", "ﬁve  x", "five  x"),
        ("text", " New \n York²", "New York2"),
        ("folded", "STRASSE  Straße", "strasse strasse"),
        ("latex", r"$\left(\text{New York}\right)$ 5\,\% × 2", "( New York ) 5 % * 2"),
        ("expression", r"\dfrac12 \text{ cm}", r"\frac{1}{2}"),
        ("expression", "sqrt(3), 1,234", r"\sqrt{3}, 1,234"),
        ("expression", "1,234 km/h", "1234"),
        ("expression", "30°", "30"),
        ("number", r"x = \frac{1}{2}", "1/2"),
        ("number", "$ 5 per cent", "5%"),
        ("compact", r"\text{New York} 1 2.", "newyork12."),
        ("spaced_digits", r"{New York 1 2}.", "newyork1 2"),
        ("words", "It's (dark) blue: 3.5, no.", "it s dark blue 3.5 no"),
        ("letters", r"\textbf{B}. \frac{1}{8}", "bfrac18"),
        ("mathvision", r"x = 30^{\circ} units.", "30"),
        ("mathvision", "(B)", "b"),
    ],
)
def test_each_level(level, text, normalized):
    assert normalize(text, level) == normalized


def test_every_level_is_explained():
    rows = re.findall(r"^    \| `(\w+)` \|", normalize.__doc__, re.MULTILINE)
    assert sorted(rows) == sorted(LEVELS)


@given(TEXTS)
def test_a_level_builds_on_the_one_below(text):
    latex = normalize(text, "latex")
    assert normalize(text, "text") == " ".join(normalize(text, "unicode").split())
    assert normalize(text, "folded") == normalize(text, "text").casefold()
    assert normalize(text, "compact") == latex.replace(" ", "").casefold()
    assert normalize(text, "spaced_digits").replace(" ", "") in normalize(text, "compact")
    assert "  " not in latex and latex == latex.strip()


@given(TEXTS, TEXTS)
def test_equal_at_a_finer_level_is_equal_at_a_coarser_one(one, other):
    for finer, coarser in (
        ("unicode", "text"),
        ("text", "folded"),
        ("latex", "compact"),
        ("latex", "letters"),
    ):
        if normalize(one, finer) == normalize(other, finer):
            assert normalize(one, coarser) == normalize(other, coarser)


def reference_distance(one, other) -> int:
    row = list(range(len(other) + 1))
    for count, item in enumerate(one, 1):
        diagonal, row[0] = row[0], count
        for column, counterpart in enumerate(other, 1):
            substituted = diagonal + (item != counterpart)
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, substituted)
    return row[-1]


@given(TEXTS, TEXTS)
def test_edit_distances_of_characters_and_words(one, other):
    assert Levenshtein.distance(one, other) == reference_distance(one, other)
    words, other_words = one.split(), other.split()
    assert Levenshtein.distance(words, other_words) == reference_distance(words, other_words)
    longest = max(len(one), len(other))
    distance = reference_distance(one, other) / longest if longest else 0.0
    assert Levenshtein.normalized_distance(one, other) == distance
