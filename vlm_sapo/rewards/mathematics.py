"""The verifier of mathematical answers."""

from __future__ import annotations

import re
from functools import lru_cache
from logging import getLogger

from vlm_sapo.rewards.answers import TAIL, BadGold, Finding, NoAnswer, boxed, find_answer, stated_answer
from vlm_sapo.rewards.latex import SIGNS, normalise, plain, roots
from vlm_sapo.types import Example

for _name in ("math_verify.parser", "math_verify.grader"):
    getLogger(_name).addFilter(lambda record: "Timeout is disabled" not in record.getMessage())  # the pool's
MARKED = re.compile(r"\$|\\\(|\\\[|boxed")
PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+|\d+,\d\d)")
"""With a decimal comma only before two decimals: `1,5` may be a list."""
LETTER_UNIT = re.compile(r"(?<=\d)(?:[mgslNJWVAK]|\^\{?[23]\}?)+$")
ASSIGNED = re.compile(r"^\s*\$*\s*([A-Za-z](?:[\w{}\\ ']{0,20}))(?:\([\w\\{}, ]{1,20}\))?\s*=\s*([^=]+)$")


def math(response: str, example: Example, *, finding: Finding = "marked") -> float:
    """1.0 where the answer equals the gold one as text, as a number, or as an expression, set, interval,
    equation, matrix or list (math-verify, behind a normalisation of spelling and units)."""
    gold = example.answer.strip()
    if not gold:
        raise BadGold("the gold answer is empty")
    if finding == "marked":
        return float(equal(find_answer(response), gold))
    if not response.strip():
        raise NoAnswer
    answer, whole = stated_answer(response), response[-TAIL:]
    return float((answer is not None and equal(answer, gold)) or same(whole, gold))


def equal(answer: str, gold: str) -> bool:
    """Whether two written answers mean the same; the gold one decides what is asked for."""
    boxes = boxed(gold)
    gold = boxes[0] if len(boxes) == 1 else gold
    one, other = _key(answer), _key(gold)
    if one == other:
        return True
    if PLAIN_NUMBER.fullmatch(other):
        one = LETTER_UNIT.sub("", one)
        if PLAIN_NUMBER.fullmatch(one):
            return same_number(_value(one), _value(other))
    (name, given), (gold_name, wanted) = _assigned(answer), _assigned(gold)
    if bool(name) != bool(gold_name):  # `x = 3` where 3 is asked for, and the other way round
        answer, gold = given, wanted
    return same(answer, gold)


def same(text: str, gold: str) -> bool:
    """Whether math-verify finds in the text what it finds in the gold answer."""
    golds = expressions(gold)
    if not golds:
        raise BadGold(f"the gold answer {gold!r} cannot be read as mathematics")
    from math_verify import verify  # seconds to import: sympy

    return verify(list(golds), list(expressions(text)), timeout_seconds=None)


def value(text: str) -> float | None:
    """The value of an expression that is a real number; None for anything else."""
    try:
        return float(text)
    except ValueError:
        pass
    found = [item for item in expressions(text) if not isinstance(item, str)]
    if not found or not found[0].is_number or found[0].is_extended_real is not True:
        return None
    return float(found[0].evalf())


def same_number(one: float, other: float) -> bool:
    """Integers exactly, others within one part in a million."""
    return one == other or abs(one - other) <= 1e-6 * abs(other)


@lru_cache(maxsize=4096)
def expressions(text: str) -> tuple:
    """What math-verify reads in a text; empty where it reads nothing.

    A text that marks its mathematics is read as it stands, any other one as mathematics throughout.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    if MARKED.search(text):
        text = roots(text.translate(SIGNS))
    else:
        text = normalise(text)
        text = f"$\\boxed{{{text}}}$"
    return tuple(parse(text, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None))


def _value(number: str) -> float:
    return float(number.replace(",", "."))


def _assigned(text: str) -> tuple[str, str]:
    """`x = 3` as x and 3; any other text as "" and itself."""
    match = ASSIGNED.match(text)
    return (match[1], match[2].strip(" $")) if match else ("", text)


def _key(text: str) -> str:
    """The text without spaces, delimiters and final full stop."""
    return re.sub(r"\s+", "", plain(text)).rstrip(".").strip("{}").casefold()
