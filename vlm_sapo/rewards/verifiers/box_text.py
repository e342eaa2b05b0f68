"""Reads boxes and points from a text: lists of numbers, and mappings whose keys name the sides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import Literal

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
Layout = Literal["xyxy", "xywh", "yxyx"]
NUMBER = r"[-+]?\d+(?:\.\d+)?"
FOUR_NUMBERS = re.compile(
    rf"[\[(\"']\s*({NUMBER})\s*,\s*({NUMBER})\s*\)?\s*,\s*\(?\s*({NUMBER})\s*,\s*({NUMBER})\s*[\])\"']"
)
NUMBER_PAIR = re.compile(rf"[\[(]\s*({NUMBER})\s*[,\s]\s*({NUMBER})\s*[\])]")
NUMBER_OUTSIDE_WORDS = re.compile(rf"(?<![\w.]){NUMBER}")
MAPPING = re.compile(r"\{[^{}]*\}")
"""An innermost mapping."""
KEY = re.compile(rf"\b([A-Za-z]\w*)[\"']?\s*[:=]\s*(?:[\"']?({NUMBER})[\"']?(?![\w%/*^]|\.\d))?")
"""A key, with its value where that is a number: JSON, Python, or `x1 = 5`."""
CORNERS = (
    ("x1", "y1", "x2", "y2"),
    ("x0", "y0", "x1", "y1"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("minx", "miny", "maxx", "maxy"),
    ("left", "top", "right", "bottom"),
)
SIZES = (("width", "height"), ("w", "h"))
STARTS = (("x", "y"), ("left", "top"), ("xmin", "ymin"))
CENTRES = (("cx", "cy"), ("xcenter", "ycenter"), ("centerx", "centery"))
KEYS = {
    **{frozenset(names): ("corners", names) for names in CORNERS},
    **{frozenset(start + size): ("start", start + size) for start, size in product(STARTS, SIZES)},
    **{frozenset(centre + size): ("centre", centre + size) for centre, size in product(CENTRES, SIZES)},
}
"""The keys that name a box, without capitals and underscores: what the first two are, and their order."""
SIDES = frozenset().union(*KEYS)


class UnclearKeys(ValueError):
    """A mapping whose keys don't say where the box is. The message quotes it."""


def read_boxes(text: str, layout: Layout) -> list[Box]:
    """The boxes of a text: its lists of four numbers in this layout, and its mappings, whose keys say theirs;
    else its four numbers if it has no others.

    Raises UnclearKeys for a mapping with keys of sides that are not those of a box.
    """
    mappings: list[str] = []

    def collect(match: re.Match) -> str:
        if not KEY.search(match[0]):
            return match[0]
        mappings.append(match[0])
        return " "

    rest = MAPPING.sub(collect, text)
    boxes = [box for mapping in mappings for box in _of_mapping(mapping, layout)]
    boxes += _listed(rest, layout)
    if boxes or mappings:
        return boxes
    if sides := _sides(text):
        return [_by_keys(sides, text)]
    numbers = re.findall(NUMBER, text)
    return [corners(tuple(map(float, numbers)), layout)] if len(numbers) == 4 else []


def read_point(text: str, layout: Layout = "xyxy") -> tuple[float, float, float] | None:
    """The text's one point, or the centre and the area of its one box; None if it has none or several. In
    layout `yxyx` a point's y comes first.

    Raises UnclearKeys as `read_boxes` does.
    """
    pairs = [(float(first), float(second)) for first, second in NUMBER_PAIR.findall(text)]
    if not pairs:
        sides = _sides(text)
        numbers = [float(number) for number in NUMBER_OUTSIDE_WORDS.findall(text)]
        if sides.keys() == {"x", "y"}:
            return sides["x"], sides["y"], 0.0
        if not sides and len(numbers) == 2:
            pairs = [(numbers[0], numbers[1])]
    if pairs:
        x, y = pairs[0][::-1] if layout == "yxyx" else pairs[0]
        return (x, y, 0.0) if len(pairs) == 1 else None
    boxes = read_boxes(text, layout)
    if len(boxes) != 1 or not has_area(boxes[0]):
        return None
    left, top, right, bottom = boxes[0]
    return (left + right) / 2, (top + bottom) / 2, (right - left) * (bottom - top)


def corners(numbers: Sequence[float], layout: Layout) -> Box:
    """Left, top, right, bottom of four numbers; in layout `xywh` the last two are width and height, in `yxyx`
    y comes before x."""
    if layout == "yxyx":
        top, left, bottom, right = numbers
        return left, top, right, bottom
    left, top, right, bottom = numbers
    return (left, top, left + right, top + bottom) if layout == "xywh" else (left, top, right, bottom)


def has_area(box: Box) -> bool:
    """Whether its right side is right of its left one, and its bottom below its top."""
    return box[0] < box[2] and box[1] < box[3]


def _listed(text: str, layout: Layout) -> list[Box]:
    return [corners(tuple(map(float, numbers)), layout) for numbers in FOUR_NUMBERS.findall(text)]


def _of_mapping(mapping: str, layout: Layout) -> list[Box]:
    """The boxes that one mapping has: by its keys, or its lists such as that of `bbox_2d`."""
    sides, listed = _sides(mapping), _listed(mapping, layout)
    if sides and listed:
        raise UnclearKeys(f"{mapping[:100]!r} has keys of sides ({', '.join(sides)}) and a list")
    return [_by_keys(sides, mapping)] if sides else listed


def _sides(text: str) -> dict[str, float]:
    """The numbers under keys of sides, by key in lower case without underscores."""
    sides: dict[str, float] = {}
    for key, number in KEY.findall(text):
        name = key.lower().replace("_", "")
        if name in SIDES:
            if not number or name in sides:
                raise UnclearKeys(f"{text[:100]!r} must have one number for {key}")
            sides[name] = float(number)
    return sides


def _by_keys(sides: dict[str, float], text: str) -> Box:
    if frozenset(sides) not in KEYS:
        raise UnclearKeys(
            f"{text[:100]!r} names the sides {', '.join(sides)}; a box has x1, y1, x2, y2 or "
            "xmin, ymin, xmax, ymax or left, top, right, bottom or x, y, width, height"
        )
    first, names = KEYS[frozenset(sides)]
    x, y, right, bottom = (sides[name] for name in names)
    if first == "centre":
        x, y = x - right / 2, y - bottom / 2
    return corners((x, y, right, bottom), "xyxy" if first == "corners" else "xywh")
