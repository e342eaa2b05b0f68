"""Units of measurement: which of them are the same, whatever the language and the spelling."""

from __future__ import annotations

import re

from vlm_sapo.rewards.verifiers.normalize import DEGREES, UNIT_WORDS

SPELLINGS = {
    "mm": "millimeter millimetre 毫米",
    "cm": "centimeter centimetre 厘米 公分",
    "dm": "decimeter decimetre 分米",
    "m": "meter metre 米",
    "km": "kilometer kilometre 千米 公里",
    "mg": "milligram 毫克",
    "g": "gram 克",
    "kg": "kilogram 千克 公斤",
    "t": "tonne 吨",
    "ml": "milliliter millilitre 毫升",
    "l": "liter litre 升",
    "s": "sec second 秒",
    "min": "minute 分钟",
    "h": "hr hour 小时 时",
    "deg": "degree 度",
    "rad": "radian 弧度",
}
UNIT_NAMES = {
    name + plural: unit
    for unit, names in SPELLINGS.items()
    for name in (unit, *names.split())
    for plural in ("", "s")
}
DIMENSIONS = {"square": 2, "sq": 2, "平方": 2, "cubic": 3, "立方": 3}
FACTOR = re.compile(
    r"(square|sq\.?|cubic|平方|立方)?\s*([a-z\u4e00-\u9fff]+)\.?\s*(?:\^\s*\{?\s*(-?\d)\s*\}?)?"
)


def units_conflict(unit: str, gold_unit: str) -> bool:
    """Whether both are known units, and not the same: `m` and `厘米`, `cm^2` and `square meters`."""
    factors, gold_factors = _factors(unit), _factors(gold_unit)
    return bool(factors and gold_factors) and factors != gold_factors


def final_unit(text: str) -> str:
    """The unit at the end of an expression; empty where it has none."""
    start = end = 0
    for match in UNIT_WORDS.finditer(text):
        if text[end : match.start()].strip():
            start = match.start()
        end = match.end()
    return text[start:end] if end and end == len(text) else ""


def _factors(text: str) -> dict[str, int] | None:
    """The powers of the units in a product or quotient; None where one isn't known."""
    powers: dict[str, int] = {}
    text = re.sub(DEGREES, "deg ", text.casefold())
    for sign, part in zip((1, -1), re.split(r"/|\bper\b|每", text, maxsplit=1), strict=False):
        for factor in re.split(r"\\cdot|\*", part):
            match = FACTOR.fullmatch(factor.strip())
            if not match or match[2] not in UNIT_NAMES:
                return None
            dimension = DIMENSIONS.get((match[1] or "").rstrip("."), 1) * int(match[3] or 1)
            powers[UNIT_NAMES[match[2]]] = sign * dimension
    return powers
