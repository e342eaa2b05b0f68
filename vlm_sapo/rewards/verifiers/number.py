"""Verifiers of numbers."""

from __future__ import annotations

import math
import re
import string

from vlm_sapo.rewards.verifiers.answers import BadGold, Finding, NoAnswer, find_answer
from vlm_sapo.rewards.verifiers.normalize import normalize
from vlm_sapo.types import Example

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?%?")
FRACTION = re.compile(rf"({NUMBER.pattern})\s*/\s*({NUMBER.pattern})")
NUMBER_WORDS = {
    "zero": 0.0, "one": 1.0, "two": 2.0, "three": 3.0, "four": 4.0, "five": 5.0, "six": 6.0, "seven": 7.0,
    "eight": 8.0, "nine": 9.0, "ten": 10.0, "eleven": 11.0, "twelve": 12.0,
}  # fmt: skip
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
NO_UNIT = re.compile(
    r"[\d=+*/^<>\\:;,|_]|(?:^|\s)-\s|\b(?:or|and|to|times|squared|cubed|plus|minus|half|"
    + "|".join([*NUMBER_WORDS, *SCALES])
    + r")\b",
    re.IGNORECASE,
)


def read_number(text: str, *, percent: bool = True) -> float | None:
    """The value of a text that is one number: thousands separators, fractions, mixed numbers, percent
    (divided by 100 with `percent`), currency signs, `x =` before it, thousand to trillion and units after
    it, and the words up to twelve; None for anything else."""
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
    if gold is None:
        raise BadGold(f"the gold answer {gold_text!r} is not a number")
    answer = read_number(text, percent=not both_percent)
    if answer is None and finding == "stated":
        answer = _only_number(text, percent=not both_percent)
    if answer is None:
        raise NoAnswer
    if precision is not None:
        return float(round(answer, precision) == round(gold, precision))
    tolerance = max(absolute, relative * abs(gold), 0.0 if gold.is_integer() else 1e-9 * abs(gold))
    return float(abs(answer - gold) <= tolerance)


def _only_number(text: str, *, percent: bool) -> float | None:
    """The number after a text's last equals sign, else its one number, else None."""
    if "=" in text and (value := read_number(text.rpartition("=")[2], percent=percent)) is not None:
        return value
    numbers = NUMBER.findall(text)
    return _value(numbers[0], percent) if len(numbers) == 1 else None


def count(response: str, example: Example, *, finding: Finding = "marked") -> float:
    """1.0 where the answer is the gold integer, in digits or as a word up to twelve."""
    gold = read_number(example.answer)
    if gold is None or not gold.is_integer():
        raise BadGold(f"the gold answer {example.answer!r} is not an integer")
    answer = read_number(find_answer(response, finding))
    if answer is None or math.isinf(answer):
        raise NoAnswer
    return float(answer == gold)
