"""The verifier of mathematical answers."""

from __future__ import annotations

import re
from decimal import Decimal
from functools import lru_cache
from logging import getLogger

from vlm_sapo.rewards.verifiers.answers import (
    TAIL,
    BadGold,
    Finding,
    NoAnswer,
    boxed,
    find_answer,
    stated_answer,
    statement,
)
from vlm_sapo.rewards.verifiers.normalize import JOINED, SIGNS, amount, normalise, plain, roots
from vlm_sapo.types import Example

for _name in ("math_verify.parser", "math_verify.grader"):
    getLogger(_name).addFilter(lambda record: "Timeout is disabled" not in record.getMessage())  # the pool's
MARKED = re.compile(r"(?<!\\)\$.+?(?<!\\)\$|\\\(|\\\[|\\boxed\s*\{", re.DOTALL)
SENTENCE_END = re.compile(r"[.;]\s+(?=[A-Z])")
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
METRIC = {"mm", "cm", "dm", "m", "km", "mg", "g", "kg", "ml", "l", "s", "min", "h"}
"""Units of which two that differ make two answers differ."""
PRODUCT = re.compile(r"[abcxyz]+|[b-df-hj-np-tv-z]+|[A-DF-HJ-NP-TV-Z]{2}|[A-Za-z]")
"""Letters that are read as a product of symbols, or as a segment, in any order; others are a word."""
NAMES = re.compile(
    r"\b(?:pi|infty|infinity|sqrt|a?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|alpha|beta|gamma|delta|theta"
    r"|lambda|mu|phi|omega|sigma)\b"
)
ANGLE = re.compile(r"\\(?:angle|triangle)\s*")
NOT_ONE_NUMBER = re.compile(
    r"\\(?:neq?|leq?|geq?|lt|gt|l?or|l?and|vee|wedge|mid|to|(?:long)?rightarrow|implies)(?![A-Za-z])|[<>]"
    r"|\d\s*[|:]\s*\d|\d\s*_|(?<![_^\d])\d+\s+\d",
    re.IGNORECASE,
)
"""What no answer holds that is a number: other relations, alternatives, ratios, several numbers."""
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
    response = response[-TAIL:]
    answer, boxes = _stated(response), boxed(response)
    if answer and equal(answer, gold):
        return 1.0
    if answer and not PROSE.search(normalise(answer)):  # only a sentence about it has a second chance
        return float(len(boxes) > 1 and equal(", ".join(boxes), gold))
    return float(same(response, gold))


def _stated(response: str) -> str:
    """The stated answer up to the end of its sentence; a number that is stated behind the last box instead of
    that box."""
    later = SENTENCE_END.split(statement(response.rpartition("boxed{")[2]))[0]
    if amount(later)[0] is not None:
        return later
    answer = stated_answer(response) or ""
    return answer if answer in boxed(response) else SENTENCE_END.split(answer)[0]


def equal(answer: str, gold: str) -> bool:
    """Whether two written answers mean the same; the gold one decides what is asked for."""
    boxes = boxed(gold)
    gold = boxes[0] if len(boxes) == 1 else gold
    if _key(answer) == _key(gold):
        return True
    (number, unit), (gold_number, gold_unit) = amount(answer), amount(gold)
    if gold_number is not None and not JOINED.search(plain(gold)):  # 5N may be a product
        if number is not None:
            return same_number(number, gold_number) and not _differ(unit, gold_unit)
        if not _may_be(answer, gold_number):
            return False
    (name, given), (gold_name, wanted) = _assigned(answer), _assigned(gold)
    if bool(name) != bool(gold_name):  # `x = 3` where 3 is asked for, and the other way round
        answer, gold = given, wanted
    return same(answer, gold)


def same(text: str, gold: str) -> bool:
    """Whether math-verify finds in the text what it finds in the gold answer; words must be the same."""
    if _is_words(plain(gold)):
        return _same_words(text, gold)
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
    from sympy import Expr

    found = [item for item in expressions(text) if not isinstance(item, str)]
    if not found or not isinstance(found[0], Expr) or not found[0].is_number or not found[0].is_extended_real:
        return None
    return float(found[0].evalf())


def same_number(one: Decimal, gold: Decimal) -> bool:
    """Integers exactly, golds with decimals within one part in a million."""
    whole = gold.as_tuple().exponent >= 0
    return one == gold or (not whole and abs(one - gold) <= abs(gold) / 1_000_000)


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


def _differ(unit: str, other: str) -> bool:
    """Whether both are metric units, and not the same."""
    one, two = (re.findall(r"[a-z]+", text.casefold()) for text in (unit, other))
    return one != two and bool(one and two) and METRIC.issuperset(one + two)


def _may_be(answer: str, gold: Decimal) -> bool:
    """Whether an answer states one number: no other relation, no side of an equation that is another number
    (sides may be rounded)."""
    text = normalise(answer)
    if NOT_ONE_NUMBER.search(text):
        return False
    values = [value(side) for side in text.split("=") if side.strip()] if "=" in text else []
    return all(side is None or abs(side - float(gold)) <= 0.01 * abs(float(gold)) for side in values)


def _is_words(text: str) -> bool:
    """Whether a plain text is words, or an angle's or triangle's name, and no product of symbols."""
    if ANGLE.match(text):
        return ANGLE.sub("", text, count=1).isalpha()
    if not re.fullmatch(r"[A-Za-z ,.'\"()!?-]+", text) or NAMES.search(text):
        return False
    return not all(PRODUCT.fullmatch(word) for word in re.findall("[A-Za-z]+", text))


def _same_words(text: str, gold: str) -> bool:
    """Whether the texts list the same words; the letters of an angle may be turned round."""
    one, other = (re.sub(rf"{ANGLE.pattern}|[\"()]", "", _key(item)) for item in (_assigned(text)[1], gold))
    turned = ANGLE.match(plain(gold)) is not None and one == other[::-1]
    return turned or sorted(one.split(",")) == sorted(other.split(","))


def _assigned(text: str) -> tuple[str, str]:
    """`x = 3` as x and 3; any other text as "" and itself."""
    match = ASSIGNED.match(text)
    return (match[1], match[2].strip(" $")) if match else ("", text)


def _key(text: str) -> str:
    """The text without delimiters, final punctuation, and spaces but between digits."""
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", plain(text))
    return text.rstrip(".,;").strip("{}").casefold()
