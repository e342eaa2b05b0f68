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
    is_degenerate,
    reads_answers,
    stated_answer,
)
from vlm_sapo.rewards.verifiers.lists import (
    gold_items,
    is_ordered,
    list_readings,
    split_outside_brackets,
    without_brackets,
)
from vlm_sapo.rewards.verifiers.normalize import (
    DECIMAL_COMMA,
    NUMBER_WITH_LETTER,
    SIGNS,
    amount,
    normalize,
    with_decimal_point,
    write_roots,
)
from vlm_sapo.rewards.verifiers.number import NUMBER_WORDS, SCALES
from vlm_sapo.rewards.verifiers.units import final_unit, units_conflict
from vlm_sapo.types import Example


def _is_no_timeout_notice(record: LogRecord) -> bool:
    return "Timeout is disabled" not in record.getMessage()  # the reward pool sets the time limit


for _name in ("math_verify.parser", "math_verify.grader"):
    getLogger(_name).addFilter(_is_no_timeout_notice)
MATH_DELIMITERS = re.compile(r"(?<!\\)\$.+?(?<!\\)\$|\\\(|\\\[|\\boxed\s*\{", re.DOTALL)
SENTENCE_END = re.compile(r"[.;]\s+(?=[A-Z])")
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
DOTS = re.compile(r"\\(?:[lc]?dots[bcmio]?)(?![A-Za-z])|\.{3,}|[…⋯]")
ITEM_MARK = re.compile(r",(?!\d{3}(?!\d))")
SEQUENCE_MARK = re.compile(r"\s*[,;:+]\s*")
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
VALUE_MARK = re.compile(r"[=:]|\b(?:is|are|equals|gives)\b")
"""What stands before the value at the end of a last line."""
LONGEST_PROSE = 3000
"""Characters at a response's end in which math-verify looks for an answer; longer ones take it seconds."""
ASSIGNMENT = re.compile(r"^\s*\$*\s*([A-Za-z](?:[\w{}\\ ']{0,20}))(?:\([\w\\{}, ]{1,20}\))?\s*=\s*([^=]+)$")


@reads_answers
def math(response: str, example: Example, *, finding: Finding = "marked") -> float:
    """1.0 where the answer equals the gold one as text, as a number, or as an expression, set, interval,
    equation, matrix or list (math-verify, after spelling and units are normalized). A gold answer that is a
    list of texts is compared as one."""
    gold = example.answer.strip()
    if not gold:
        raise BadGold("the gold answer is empty")
    golds = gold_items(example)
    if len(golds) > 1:
        return list_items(response, example, ordered=is_ordered(example), finding=finding)
    gold = golds[0] if golds else gold
    if finding == "marked":
        return float(answers_match(find_answer(response), gold))
    if not response.strip():
        raise NoAnswer
    response = response[-TAIL:]
    answer, boxes = stated_answer(response), boxed(response)
    if is_degenerate(answer or response):
        raise NoAnswer
    if answer and answers_match(answer, gold):
        return 1.0
    if answer and not PROSE.search(normalize(answer, "expression")):  # only a sentence has a second chance
        return float(len(boxes) > 1 and answers_match(", ".join(boxes), gold))
    # without marked mathematics math-verify takes any number of a text for its answer
    if not answer and not MATH_DELIMITERS.search(response) and PROSE.search(response):
        return float(
            answers_match(VALUE_MARK.split(response.strip().splitlines()[-1])[-1].strip(" *."), gold)
        )
    if answer and not MATH_DELIMITERS.search(response) and not re.search(r"[\d\\]|[A-Z]{2}", answer):
        return 0.0
    return float(expressions_match(response[-LONGEST_PROSE:], gold))


@reads_answers
def list_items(
    response: str, example: Example, *, ordered: bool = False, finding: Finding = "marked"
) -> float:
    """1.0 where the answer lists the gold list's items and no others, each as often as it does, compared as
    `math` compares; in any order unless `ordered`. One item of several scores 0."""
    if not list_readings(example.answer):
        raise BadGold(f"the gold answer {example.answer!r} lists nothing")
    return float(_list_is(find_answer(response, finding), example.answer, ordered=ordered))


def _list_is(answer: str, gold: str, *, ordered: bool = False) -> bool:
    """Whether two texts list the same, in one of the ways in which they can be read."""
    golds = list_readings(gold)
    golds = [items for items in golds if len(items) > 1] or golds
    return any(_lists_match(items, gold, ordered) for items in list_readings(answer) for gold in golds)


def _lists_match(items: list[str], golds: list[str], ordered: bool) -> bool:
    """Whether two lists have equal items, each as often, or at the same index."""
    if len(items) != len(golds):
        return False
    if ordered:
        return all(_items_match(item, gold) for item, gold in zip(items, golds, strict=True))
    keys, gold_keys = ([normalize(item, "spaced_digits") for item in side] for side in (items, golds))
    if sorted(keys) == sorted(gold_keys):
        return True
    rest = list(items)
    for gold in golds:
        match = next((index for index, item in enumerate(rest) if _items_match(item, gold)), None)
        if match is None:
            return False
        del rest[match]
    return True


def _items_match(item: str, gold: str) -> bool:
    try:
        return answers_match(item, gold)
    except BadGold:
        return False


def answers_match(answer: str, gold: str) -> bool:
    """Whether two written answers mean the same; the gold one decides which form is expected."""
    boxes = boxed(gold)
    gold = boxes[0] if len(boxes) == 1 else gold
    if normalize(answer, "spaced_digits") == normalize(gold, "spaced_digits"):
        return True
    if DOTS.search(answer) or DOTS.search(gold):
        return _sequences_match(answer, gold)
    if _repeats_items(gold):
        return _list_is(answer, gold)
    (number, unit), (gold_number, gold_unit) = _amount(answer), _amount(gold)
    could_be_product = NUMBER_WITH_LETTER.search(normalize(gold, "latex"))  # such as 5N
    if gold_number is not None and not could_be_product:
        if number is not None:
            return numbers_match(number, gold_number) and not units_conflict(unit, gold_unit)
        if not _may_state_number(answer, gold_number):
            return False
    if gold_number is None and DECIMAL_COMMA.search(gold) and _decimals_match(answer, gold):
        return True
    (name, side), (gold_name, gold_side) = _split_assignment(answer), _split_assignment(gold)
    if bool(name) != bool(gold_name) and not ("=" in answer and "=" in gold):
        return answers_match(side, gold_side)  # `x = 3` where 3 is expected, or 3 where `x = 3` is
    units = (final_unit(normalize(text, "latex")) for text in (answer, gold))
    return not units_conflict(*units) and expressions_match(answer, gold)


def _amount(text: str) -> tuple[Decimal | None, str]:
    """The number and unit of a text that is nothing else, in digits or words: `seven`, `2 million`."""
    words = normalize(text, "latex").casefold().rstrip(".! ")
    word, _, scale = words.rpartition(" ")
    if scale not in SCALES or len(scale) == 1:
        word, scale = words, ""
    number, unit = amount(word if scale else text)
    if word in NUMBER_WORDS:
        number, unit = Decimal(int(NUMBER_WORDS[word])), ""
    return (None if number is None else number * int(SCALES.get(scale, 1)), unit)


def _repeats_items(text: str) -> bool:
    """Whether a text is a list, without braces, in which an item comes twice: 2, 2 is not 2."""
    items = split_outside_brackets(normalize(text, "spaced_digits"), ITEM_MARK)
    return len(set(items)) < len(items)


def _decimals_match(answer: str, gold: str) -> bool:
    """Whether the texts are equal numbers when the gold one's comma is read as a decimal comma."""
    (number, unit), (gold_number, gold_unit) = amount(answer), amount(with_decimal_point(gold))
    if number is None:
        number, unit = amount(with_decimal_point(answer))
    if number is None or gold_number is None:
        return False
    return numbers_match(number, gold_number) and not units_conflict(unit, gold_unit)


def _sequences_match(answer: str, gold: str) -> bool:
    """Whether two texts of which one has an ellipsis are equal item by item. One at the end of an answer
    that is no sequence is left out."""
    answer, gold = (without_brackets(DOTS.sub("…", normalize(text, "latex"))) for text in (answer, gold))
    if "…" not in gold:
        answer = re.sub(r"(?<=[\w)}])…$", "", answer)
        return "…" not in answer and answers_match(answer, gold)
    items, golds = (split_outside_brackets(text, SEQUENCE_MARK) for text in (answer, gold))
    return len(items) == len(golds) and all(
        item == gold if "…" in item + gold else _items_match(item, gold)
        for item, gold in zip(items, golds, strict=True)
    )


def expressions_match(text: str, gold: str) -> bool:
    """Whether math-verify reads in the text what it reads in the gold answer; words must be the same."""
    if _is_words(normalize(gold, "latex")):
        return _words_match(text, gold)
    gold_expressions = parse_expressions(gold)
    if not gold_expressions:
        raise BadGold(f"the gold answer {gold!r} cannot be read as mathematics")
    from vlm_sapo.rewards.verifiers.equality import equal  # seconds to import: sympy

    answers = parse_expressions(text)
    return any(equal(answer, expression) for expression in gold_expressions for answer in answers)


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
        re.sub(rf"{ANGLE.pattern}|[\"()!]", "", normalize(item, "spaced_digits"))
        for item in (_split_assignment(text)[1], gold)
    )
    if ANGLE.match(normalize(gold, "latex")) and words == gold_words[::-1]:
        return True
    return sorted(words.split(",")) == sorted(gold_words.split(","))


def _split_assignment(text: str) -> tuple[str, str]:
    """`x = 3` as x and 3; any other text as "" and itself."""
    match = ASSIGNMENT.match(text)
    return (match[1], match[2].strip(" $")) if match else ("", text)
