"""The verifier of mathematical answers."""

from __future__ import annotations

import re
from decimal import Decimal
from functools import lru_cache
from logging import LogRecord, getLogger

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
from vlm_sapo.rewards.verifiers.normalize import NUMBER_WITH_LETTER, SIGNS, amount, normalize, write_roots
from vlm_sapo.types import Example


def _is_no_timeout_notice(record: LogRecord) -> bool:
    return "Timeout is disabled" not in record.getMessage()  # the reward pool sets the time limit


for _name in ("math_verify.parser", "math_verify.grader"):
    getLogger(_name).addFilter(_is_no_timeout_notice)
MATH_DELIMITERS = re.compile(r"(?<!\\)\$.+?(?<!\\)\$|\\\(|\\\[|\\boxed\s*\{", re.DOTALL)
SENTENCE_END = re.compile(r"[.;]\s+(?=[A-Z])")
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
METRIC_UNITS = {"mm", "cm", "dm", "m", "km", "mg", "g", "kg", "ml", "l", "s", "min", "h"}
"""Units of which two that differ make two answers differ."""
SYMBOL_PRODUCT = re.compile(r"[abcxyz]+|[b-df-hj-np-tv-z]+|[A-DF-HJ-NP-TV-Z]{2}|[A-Za-z]")
"""Letters that are read as a product of symbols, or as a segment, in any order; others are a word."""
MATH_NAMES = re.compile(
    r"\b(?:pi|infty|infinity|sqrt|a?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|alpha|beta|gamma|delta|theta"
    r"|lambda|mu|phi|omega|sigma)\b"
)
ANGLE = re.compile(r"\\(?:angle|triangle)\s*")
NOT_ONE_NUMBER = re.compile(
    r"\\(?:neq?|leq?|geq?|lt|gt|l?or|l?and|vee|wedge|mid|to|(?:long)?rightarrow|implies)(?![A-Za-z])|[<>]"
    r"|\d\s*[|:]\s*\d|\d\s*_|(?<![_^\d])\d+\s+\d",
    re.IGNORECASE,
)
"""What an answer that is one number can't contain: other relations, alternatives, ratios, several numbers."""
ASSIGNMENT = re.compile(r"^\s*\$*\s*([A-Za-z](?:[\w{}\\ ']{0,20}))(?:\([\w\\{}, ]{1,20}\))?\s*=\s*([^=]+)$")


def math(response: str, example: Example, *, finding: Finding = "marked") -> float:
    """1.0 where the answer equals the gold one as text, as a number, or as an expression, set, interval,
    equation, matrix or list (math-verify, after spelling and units are normalized)."""
    gold = example.answer.strip()
    if not gold:
        raise BadGold("the gold answer is empty")
    if finding == "marked":
        return float(answers_match(find_answer(response), gold))
    if not response.strip():
        raise NoAnswer
    response = response[-TAIL:]
    answer, boxes = _stated_sentence(response), boxed(response)
    if answer and answers_match(answer, gold):
        return 1.0
    if answer and not PROSE.search(normalize(answer, "expression")):  # only a sentence has a second chance
        return float(len(boxes) > 1 and answers_match(", ".join(boxes), gold))
    return float(expressions_match(response, gold))


def _stated_sentence(response: str) -> str:
    """The stated answer up to the end of its sentence; a number that is stated after the last box instead of
    that box."""
    later = SENTENCE_END.split(statement(response.rpartition("boxed{")[2]))[0]
    if amount(later)[0] is not None:
        return later
    answer = stated_answer(response) or ""
    return answer if answer in boxed(response) else SENTENCE_END.split(answer)[0]


def answers_match(answer: str, gold: str) -> bool:
    """Whether two written answers mean the same; the gold one decides which form is expected."""
    boxes = boxed(gold)
    gold = boxes[0] if len(boxes) == 1 else gold
    if normalize(answer, "spaced_digits") == normalize(gold, "spaced_digits"):
        return True
    (number, unit), (gold_number, gold_unit) = amount(answer), amount(gold)
    could_be_product = NUMBER_WITH_LETTER.search(normalize(gold, "latex"))  # such as 5N
    if gold_number is not None and not could_be_product:
        if number is not None:
            return numbers_match(number, gold_number) and not _units_conflict(unit, gold_unit)
        if not _may_state_number(answer, gold_number):
            return False
    (name, side), (gold_name, gold_side) = _split_assignment(answer), _split_assignment(gold)
    if bool(name) != bool(gold_name):  # `x = 3` where 3 is expected, or 3 where `x = 3` is
        answer, gold = side, gold_side
    return expressions_match(answer, gold)


def expressions_match(text: str, gold: str) -> bool:
    """Whether math-verify reads in the text what it reads in the gold answer; words must be the same."""
    if _is_words(normalize(gold, "latex")):
        return _words_match(text, gold)
    gold_expressions = parse_expressions(gold)
    if not gold_expressions:
        raise BadGold(f"the gold answer {gold!r} cannot be read as mathematics")
    from math_verify import verify  # seconds to import: sympy

    return verify(list(gold_expressions), list(parse_expressions(text)), timeout_seconds=None)


def real_value(text: str) -> float | None:
    """The value of an expression that is a real number; None for anything else."""
    try:
        return float(text)
    except ValueError:
        pass
    from sympy import Expr

    expressions = [item for item in parse_expressions(text) if not isinstance(item, str)]
    if not expressions or not isinstance(expressions[0], Expr):
        return None
    first = expressions[0]
    return float(first.evalf()) if first.is_number and first.is_extended_real else None


def numbers_match(number: Decimal, gold: Decimal) -> bool:
    """Integers exactly, golds with decimals within one part in a million."""
    is_integer = gold.as_tuple().exponent >= 0
    return number == gold or (not is_integer and abs(number - gold) <= abs(gold) / 1_000_000)


@lru_cache(maxsize=4096)
def parse_expressions(text: str) -> tuple:
    """What math-verify reads in a text; empty where it reads nothing.

    A text that marks its mathematics is read unchanged, any other one as mathematics throughout.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    if MATH_DELIMITERS.search(text):
        text = write_roots(text.translate(SIGNS))
    else:
        text = normalize(text, "expression")
        text = f"$\\boxed{{{text}}}$"
    return tuple(parse(text, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None))


def _units_conflict(unit: str, gold_unit: str) -> bool:
    """Whether both are metric units, and not the same."""
    names, gold_names = (re.findall(r"[a-z]+", text.casefold()) for text in (unit, gold_unit))
    both = bool(names and gold_names)
    return both and names != gold_names and METRIC_UNITS.issuperset(names + gold_names)


def _may_state_number(answer: str, gold: Decimal) -> bool:
    """Whether an answer states one number: no other relation, no side of an equation that is another number
    (sides may be rounded)."""
    text = normalize(answer, "expression")
    if NOT_ONE_NUMBER.search(text):
        return False
    values = [real_value(side) for side in text.split("=") if side.strip()] if "=" in text else []
    return all(side is None or abs(side - float(gold)) <= 0.01 * abs(float(gold)) for side in values)


def _is_words(text: str) -> bool:
    """Whether a text at level `latex` is words, or an angle's or triangle's name, and no product of
    symbols."""
    if ANGLE.match(text):
        return ANGLE.sub("", text, count=1).isalpha()
    if not re.fullmatch(r"[A-Za-z ,.'\"()!?-]+", text) or MATH_NAMES.search(text):
        return False
    return not all(SYMBOL_PRODUCT.fullmatch(word) for word in re.findall("[A-Za-z]+", text))


def _words_match(text: str, gold: str) -> bool:
    """Whether the texts list the same words; the letters of an angle may be reversed."""
    words, gold_words = (
        re.sub(rf"{ANGLE.pattern}|[\"()]", "", normalize(item, "spaced_digits"))
        for item in (_split_assignment(text)[1], gold)
    )
    if ANGLE.match(normalize(gold, "latex")) and words == gold_words[::-1]:
        return True
    return sorted(words.split(",")) == sorted(gold_words.split(","))


def _split_assignment(text: str) -> tuple[str, str]:
    """`x = 3` as x and 3; any other text as "" and itself."""
    match = ASSIGNMENT.match(text)
    return (match[1], match[2].strip(" $")) if match else ("", text)
