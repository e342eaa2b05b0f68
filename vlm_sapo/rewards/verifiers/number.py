"""Verifiers of numbers."""

from __future__ import annotations

import math
import re
import string

from vlm_sapo.rewards.verifiers.answers import BadGold, Finding, NoAnswer, find_answer
from vlm_sapo.rewards.verifiers.normalize import plain
from vlm_sapo.types import Example

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?%?")
FRACTION = re.compile(rf"({NUMBER.pattern})\s*/\s*({NUMBER.pattern})")
WORDS = dict(
    zip(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
        ],
        range(13),
        strict=True,
    )
)
CURRENCY = "$€£¥"
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
    + "|".join([*WORDS, *SCALES])
    + r")\b",
    re.IGNORECASE,
)


def read_number(text: str, *, percent: bool = True) -> float | None:
    """The value of a text that is one number: thousands separators, fractions, mixed numbers, percent
    (divided by 100 with `percent`), currency signs, `x =` before it, thousand to trillion and units behind
    it, and the words up to twelve; None for anything else."""
    text = _spelled(text)
    if (word := text.casefold().strip(string.punctuation)) in WORDS:
        return float(WORDS[word])
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


def _spelled(text: str) -> str:
    """The text with fractions as `1/2`, percent as `%`, and without what stands before the number."""
    text = plain(text).strip().strip("*").rstrip(".").strip()
    text = re.sub(r"^(?:[A-Za-z]\w{0,20}|\\[a-z]+)\s*=\s*", "", text)
    text = re.sub(r"\\[dtc]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r" \1/\2", text).strip()
    text = re.sub(r"(?<=\d)\s*(?:%|per\s?cent\b)", "%", text, flags=re.IGNORECASE)
    return re.sub(rf"^([-+]?)\s*[{re.escape(CURRENCY)}]?\s*", r"\1", text)


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
    answer, gold = find_answer(response, finding), example.answer
    percent = _spelled(answer).endswith("%") and _spelled(gold).endswith("%")
    wanted = read_number(gold, percent=not percent)
    if wanted is None:
        raise BadGold(f"the gold answer {gold!r} is not a number")
    given = read_number(answer, percent=not percent)
    if given is None and finding == "stated":
        given = _only_number(answer, percent=not percent)
    if given is None:
        raise NoAnswer
    if precision is not None:
        return float(round(given, precision) == round(wanted, precision))
    allowed = max(absolute, relative * abs(wanted), 0.0 if wanted.is_integer() else 1e-9 * abs(wanted))
    return float(abs(given - wanted) <= allowed)


def _only_number(text: str, *, percent: bool) -> float | None:
    """The number behind a text's last equals sign, else its one number, else None."""
    if "=" in text and (value := read_number(text.rpartition("=")[2], percent=percent)) is not None:
        return value
    found = NUMBER.findall(text)
    return _value(found[0], percent) if len(found) == 1 else None


def count(response: str, example: Example, *, finding: Finding = "marked") -> float:
    """1.0 where the answer is the gold integer, in digits or as a word up to twelve."""
    wanted = read_number(example.answer)
    if wanted is None or not wanted.is_integer():
        raise BadGold(f"the gold answer {example.answer!r} is not an integer")
    given = read_number(find_answer(response, finding))
    if given is None or math.isinf(given):
        raise NoAnswer
    return float(given == wanted)
