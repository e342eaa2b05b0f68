"""Verifiers of numbers."""

from __future__ import annotations

import math
import re
import string

from vlm_sapo.rewards.verifiers.answers import BadGold, Finding, NoAnswer, find_answer, reads_answers
from vlm_sapo.rewards.verifiers.normalize import DECIMAL_COMMA, normalize, with_decimal_point
from vlm_sapo.types import Example

NUMBER = re.compile(r"[-+]?(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?%?")
FRACTION = re.compile(rf"({NUMBER.pattern})\s*/\s*({NUMBER.pattern})")
UNDER_TWENTY = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NUMBER_WORDS = {
    **{word: float(value) for value, word in enumerate(UNDER_TWENTY)},
    **{word: 10.0 * value for value, word in enumerate(TENS, 2)},
    **{
        f"{tens}{joint}{word}": 10.0 * value + unit
        for value, tens in enumerate(TENS, 2)
        for unit, word in enumerate(UNDER_TWENTY[1:10], 1)
        for joint in "- "
    },
}
"""The English words up to ninety-nine."""
SCALES = {
    "dozen": 12.0,
    "hundred": 1e2,
    "thousand": 1e3,
    "k": 1e3,
    "million": 1e6,
    "billion": 1e9,
    "trillion": 1e12,
}
SCALE = re.compile(r"\s*\b(?i:dozen|hundred|thousand|million|billion|trillion)\b|k\b")
MIXED = re.compile(r"([-+]?)(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)")
UNIT_POWER = re.compile(r"(?:(?<=[A-Za-z]{2})|(?<=\bm))(?:\^\{?[23]\}?)")
LEADING_WORD = re.compile(
    "(" + "|".join(sorted(NUMBER_WORDS, key=len, reverse=True)) + r")\b(?!\s+of\b)", re.I
)
LEAD = re.compile(
    r"^(?:(?:there|they|these|it|this|that|is|are|was|were|a|an|the|total|of|number|count|final|answer"
    r"|about|approximately|roughly)\s+)+",
    re.IGNORECASE,
)
"""Words before a number that say nothing else: `There are a total of`."""
DENIAL = re.compile(r"\b(?:not|no|cannot|unable|unknown|unclear|neither|nor|or)\b|n't", re.IGNORECASE)
REFERENCE = re.compile(
    r"(?:\b(?:figure|fig\.?|table|page|step|row|line|chapter|section|question|problem|image)|[图圖表第])\s*\d+",
    re.IGNORECASE,
)
"""What is numbered in a text, and is no answer: `Figure 7`."""
NO_UNIT = re.compile(
    r"[\d=+*/^<>\\:;,|_]|(?:^|\s)-\s|\b(?:or|and|to|times|squared|cubed|plus|minus|half|"
    + "|".join([*NUMBER_WORDS, *SCALES])
    + r")\b",
    re.IGNORECASE,
)


def read_number(text: str, *, percent: bool = True) -> float | None:
    """The value of a text that is one number: thousands separators, fractions, mixed numbers, percent
    (divided by 100 with `percent`), currency signs, `x =` before it, thousand to trillion and units after
    it, and the words up to ninety-nine; None for anything else."""
    text = normalize(text, "number")
    if (word := text.casefold().strip(string.punctuation)) in NUMBER_WORDS:
        return NUMBER_WORDS[word]
    if match := MIXED.match(text):
        sign, whole, top, bottom = match.groups()
        value = float(f"{sign}1") * (float(whole) + float(top) / float(bottom)) if float(bottom) else None
    elif match := FRACTION.match(text):
        top, bottom = (_value(part, percent) for part in match.groups())
        value = top / bottom if bottom else None
    elif match := NUMBER.match(text):
        value = _value(match[0], percent)
    if not match or value is None:
        return None
    rest = text[match.end() :]
    if scale := SCALE.match(rest):
        value, rest = value * SCALES[scale[0].strip().casefold()], rest[scale.end() :]
    return value if _is_unit(rest) else None


def _value(text: str, percent: bool) -> float:
    value = float(text.rstrip("%").replace(",", ""))
    return value / 100 if percent and text.endswith("%") else value


def _is_unit(text: str) -> bool:
    """Whether what follows a number is nothing, a unit or a noun: words that are no numbers, no operators."""
    text = UNIT_POWER.sub("", text.strip())
    return len(text) <= 40 and not NO_UNIT.search(text.replace("/", "", 1))


def read_sentence(text: str, *, percent: bool = True) -> float | None:
    """The value of a text that is one number, or says no more than that: `There are 10 objects.`"""
    value = read_number(text, percent=percent)
    if value is not None:
        return value
    text = LEAD.sub("", normalize(text, "latex"), count=1)
    if (word := LEADING_WORD.match(text)) and _is_unit(text[word.end() :].rstrip(".")):
        return NUMBER_WORDS[word[1].casefold()]
    return read_number(text, percent=percent)


@reads_answers
def number(
    response: str,
    example: Example,
    *,
    absolute: float = 0.0,
    relative: float = 0.0,
    precision: int | None = None,
    finding: Finding = "marked",
) -> float:
    """1.0 where the answer is within the absolute or the relative tolerance of the gold number, or equal to
    it when both are rounded to `precision` decimals. ChartQA's relaxed accuracy is `relative: 0.05`."""
    text, gold_text = find_answer(response, finding), example.answer
    both_percent = all(normalize(side, "number").endswith("%") for side in (text, gold_text))
    gold = read_number(gold_text, percent=not both_percent)
    if gold is None and DECIMAL_COMMA.search(gold_text):
        text, gold_text = with_decimal_point(text), with_decimal_point(gold_text)
        gold = read_number(gold_text, percent=not both_percent)
    if gold is None:
        raise BadGold(f"the gold answer {gold_text!r} is not a number")
    answer = read_sentence(text, percent=not both_percent)
    if answer is None and finding == "stated":
        answer = _only_number(text, percent=not both_percent)
    if answer is None:
        raise NoAnswer
    if precision is not None:
        return float(round(answer, precision) == round(gold, precision))
    tolerance = max(absolute, relative * abs(gold), 0.0 if gold.is_integer() else 1e-9 * abs(gold))
    return float(abs(answer - gold) <= tolerance)


def _only_number(text: str, *, percent: bool) -> float | None:
    """The number after a text's last equals sign, else its one number; None where it has none or several, or
    denies."""
    if "=" in text and (value := read_number(text.rpartition("=")[2], percent=percent)) is not None:
        return value
    numbers = NUMBER.findall(REFERENCE.sub(" ", text))
    return _value(numbers[0], percent) if len(numbers) == 1 and not DENIAL.search(text) else None


@reads_answers
def count(response: str, example: Example, *, finding: Finding = "marked") -> float:
    """1.0 where the answer is the gold integer, in digits or as a word up to ninety-nine, alone or in a
    sentence that says no more: `There are 10 objects.`"""
    gold = read_number(example.answer)
    if gold is None or not gold.is_integer():
        raise BadGold(f"the gold answer {example.answer!r} is not an integer")
    answer = read_sentence(find_answer(response, finding))
    if answer is None or math.isinf(answer):
        raise NoAnswer
    return float(answer == gold)
