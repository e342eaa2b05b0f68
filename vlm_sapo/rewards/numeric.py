"""Verifiers of numbers."""

from __future__ import annotations

import math
import re
import string

from vlm_sapo.rewards.answers import BadGold, Finding, NoAnswer, find_answer
from vlm_sapo.rewards.latex import plain
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


def read_number(text: str, *, percent: bool = True) -> float | None:
    """The value of a text that is one number: thousands separators, fractions, percent (divided by 100 with
    `percent`), currency signs, units behind it and the words up to twelve; None for anything else."""
    text = plain(text).strip().strip("*").rstrip(".").strip()
    if (word := text.casefold().strip(string.punctuation)) in WORDS:
        return float(WORDS[word])
    text = re.sub(rf"^([-+]?)\s*[{re.escape(CURRENCY)}]\s*", r"\1", text)
    for pattern in (FRACTION, NUMBER):
        match = pattern.match(text)
        if match:
            if not _is_unit(text[match.end() :]):
                return None
            parts = [_value(part, percent) for part in (match.groups() or (match[0],))]
            if len(parts) == 1:
                return parts[0]
            return parts[0] / parts[1] if parts[1] else None
    return None


def _value(text: str, percent: bool) -> float:
    value = float(text.rstrip("%").replace(",", ""))
    return value / 100 if percent and text.endswith("%") else value


def _is_unit(text: str) -> bool:
    """Whether what follows a number is nothing, a unit or a noun: words without digits or operators."""
    text = text.strip()
    return len(text) <= 40 and not re.search(r"[\d=+*/^<>\\:;,]|\bor\b|\band\b", text.replace("/", "", 1))


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
    percent = answer.strip().rstrip(".").endswith("%") and gold.strip().endswith("%")
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
    allowed = max(absolute, relative * abs(wanted), 1e-9 * abs(wanted))
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
