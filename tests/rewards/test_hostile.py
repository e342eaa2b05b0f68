"""Adversarial and malformed responses: every verifier returns a score for each of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sapo.rewards.verifiers.answers import NoAnswer
from vlm_sapo.rewards.verifiers.table import VERIFIERS
from vlm_sapo.types import Example, ResponseText

ARGS = {name: {} for name in VERIFIERS if name != "judge"} | {"length": {"allowed": 10, "buffer": 5}}
for boxed in ("box", "point_in_box"):
    ARGS[boxed] = {"gold_coordinates": "thousand", "coordinates": "resized"}
GOLDS = {
    "box": "[1, 2, 3, 4]",
    "point_in_box": "[1, 2, 3, 4]",
    "json_fields": '{"a": 1}',
    "choice": "B",
    "auto": "B",
}
TEXTS = {
    "empty": "",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x9b2J\\boxed{\x1b[2J3}",
    "right to left": "\u202e\\boxed{3}\u2066 התשובה היא 3 \u200f",
    "surrogate": "\ud800\\boxed{\udfff}",
    "non-ASCII digits": "\\boxed{٣} \\boxed{３} \\boxed{③}",
    "combining marks": "\\boxed{3" + "\u0300" * 5000 + "}",
    "long number": "\\boxed{" + "9" * 6000 + "}",
    "non-finite numbers": "\\boxed{nan} \\boxed{inf} \\boxed{1e999999999}",
    "powers": "\\boxed{9**9**9**9}",
    "open boxes": "\\boxed{" * 3000,
    "open lists": "[" * 3000,
    "open objects": '{"a":' * 3000,
    "numbers in lists": "[1e400, NaN, Infinity, -0]",
    "special tokens": "<|im_end|><|image_pad|>\\boxed{3}<|endoftext|>",
    "markup": "<script>alert(1)</script>[red]\\boxed{3}[/]",
    "format string": "%s%n{0.__class__}${jndi:ldap://x}\\boxed{3}",
}
MEGABYTES = {
    "one number": "1",
    "answers": "the answer is 3 ",
    "open boxes": "\\boxed{",
    "open lists": "[",
    "lists": "[1, 2, 3, 4], ",
    "fences": "```json\n",
    "thoughts": "<think>",
    "right to left": "\u202e\u05d0",
}


def grade(name: str, text: str) -> float:
    columns = {"options": ["one", "two", "three"], "answer_type": "float"}
    example = Example("1", "p \\boxed{}", GOLDS.get(name, "3"), columns=columns)
    try:
        return VERIFIERS[name](ResponseText(text, tokens=9, resized=((100, 50),)), example, **ARGS[name])
    except NoAnswer:
        return 0.0


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ARGS)
def test_every_verifier_returns_a_score(name, text):
    assert 0.0 <= grade(name, text) <= 1.0 or name == "length"


@pytest.mark.slow
@pytest.mark.parametrize("piece", MEGABYTES.values(), ids=MEGABYTES)
@pytest.mark.parametrize("name", ARGS)
def test_ten_megabytes(name, piece):
    assert 0.0 <= grade(name, piece * (10_000_000 // len(piece))) <= 1.0 or name == "length"


def test_invisible_characters_do_not_make_an_answer_correct():
    assert grade("math", "\\boxed{3}") == 1.0
    assert grade("math", "\\boxed{4\u202e}") == 0.0


PIECES = [
    "\\boxed{",
    "}",
    "{",
    "$",
    "\\frac",
    "\\sqrt",
    "^",
    "_",
    "[",
    "]",
    "(",
    ")",
    ",",
    ".",
    "-",
    "+",
    "/",
    "*",
    "%",
    "°",
    "<",
    ">",
    "|",
    "=",
    "0",
    "1",
    "2",
    "3",
    "10",
    "0.5",
    "1e9",
    "π",
    "\\pi",
    "x",
    "y",
    "A",
    "B",
    "C",
    "yes",
    "no",
    '"a":',
    ":",
    "null",
    "true",
    "NaN",
    "```",
    "```json",
    "answer",
    "is",
    "Answer:",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "and",
    "or",
    "\n",
    "\\text{",
    "km",
]


@pytest.mark.parametrize("name", ARGS)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=30))
def test_random_responses_get_a_score(name, pieces):
    for text in ("".join(pieces), " ".join(pieces), "\\boxed{" + " ".join(pieces) + "}"):
        assert 0.0 <= grade(name, text) <= 1.0 or name == "length"
