"""Reads lists: those of gold answers, and those that a response writes in its own way."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from vlm_sapo.rewards.verifiers.normalize import normalize
from vlm_sapo.types import Example

SEPARATORS = tuple(
    re.compile(rf"\s*(?:{marks})(?:\s*(?:and|&)\s)?\s*{joint}")
    for marks in (r";|\n", r",(?=\s)", ",")
    for joint in (r"|\s+(?:and|&)\s+", "")
)
"""What stands between the items, one reading each: the first marks that fit, `and` as a mark or as a word."""
BRACKETS = {"[": "]", "(": ")", "{": "}"}
TRUE = {"true", "yes", "1"}


def parse_list(text: str) -> list | None:
    """The value of a JSON list, or of a Python list in a text, as MMMU stores one; None for other texts."""
    if not text.lstrip().startswith("["):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        return value if isinstance(value, list) else None
    return None


def gold_items(example: Example) -> list[str]:
    """The items of a gold answer that is a list of texts and numbers; empty for any other one.

    Bare numbers in brackets, `[3, 5]`, are an interval or a vector unless a column of the row holds that list
    as a list.
    """
    items = parse_list(example.answer.strip())
    if not items or not all(_is_scalar(item) for item in items):
        return []
    if any(isinstance(item, str) for item in items) or _holds(example, items):
        return [str(item) for item in items]
    return []


def is_ordered(example: Example) -> bool:
    """Whether the row's column `ordered` says that the order of its list counts."""
    return str(example.columns.get("ordered") or "").casefold() in TRUE


def list_readings(text: str) -> list[list[str]]:
    """The lists that a text can be read as: `red, blue and green` with and without its `and` as a mark."""
    text = text.strip()
    for candidate in (text, normalize(text, "latex")):
        items = parse_list(candidate)
        if items is not None and all(_is_scalar(item) for item in items):
            return [[str(item) for item in items]]
    bare = without_brackets(normalize(text.replace("\n", ";"), "latex").rstrip("."))
    readings: list[list[str]] = []
    for separator in SEPARATORS:
        items = [item.strip(" \"'") for item in split_outside_brackets(bare, separator)]
        if items not in readings:
            readings.append(items)
    return [items for items in readings if all(items)]


def without_brackets(text: str) -> str:
    """The text without one pair of brackets or braces around all of it."""
    inner = re.fullmatch(r"\\?([\[({])(.*?)\\?([\])}])", text, re.DOTALL)
    if inner and BRACKETS[inner[1]] == inner[3] and _stays_inside(inner[2]):
        return inner[2].strip()
    return text


def split_outside_brackets(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts of a text between the separators that are in no brackets."""
    parts, start, depth, checked = [], 0, 0, 0
    for match in separator.finditer(text):
        piece = text[checked : match.start()]
        depth += sum((c in BRACKETS) - (c in BRACKETS.values()) for c in piece)
        checked = match.start()
        if depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def _stays_inside(text: str) -> bool:
    """Whether no bracket closes that wasn't opened before in the text."""
    depth = 0
    for character in text:
        depth += (character in BRACKETS) - (character in BRACKETS.values())
        if depth < 0:
            return False
    return True


def _is_scalar(item: Any) -> bool:
    return isinstance(item, str | int | float) and not isinstance(item, bool)


def _holds(example: Example, items: list) -> bool:
    return any(isinstance(value, list) and value == items for value in example.columns.values())
