"""Boxes and points in images, in pixels for tools and in the model's coordinates for the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vlm_sapo.types import Coordinates

Size = tuple[int, int]
"""Width and height in pixels."""


class BadCall(ValueError):
    """A tool call that can't be carried out. The model reads the message."""


class Box(NamedTuple):
    """A part of an image. A tool gets it in pixels of the image that it gets, inside it and with an area."""

    left: float
    top: float
    right: float
    bottom: float


class Point(NamedTuple):
    """A point of an image. A tool gets it in pixels of the image that it gets, inside it."""

    x: float
    y: float


UNITS = {
    "resized": "in pixels of the image as you see it",
    "original": "in pixels of the image",
    "thousand": "each from 0 to 1000 across the image",
    "thousand_yx": "each from 0 to 1000 across the image",
    "unit": "each from 0 to 1 across the image",
}


def explain(kind: type, coordinates: Coordinates) -> str:
    """How the model writes a box or point, for a tool's schema."""
    names = list(kind._fields)
    if coordinates == "thousand_yx":
        names = _swapped(names)
    return f"[{', '.join(names)}], {UNITS[coordinates]}"


def to_pixels(kind: type, value: object, coordinates: Coordinates, seen: Size, size: Size) -> Box | Point:
    """What the model wrote as a box or point of an image of `size` that it sees in the size `seen`. Parts
    outside the image are cut off.

    Raises BadCall if it is no list of numbers, reversed, or outside.
    """
    expected = explain(kind, coordinates)
    if not isinstance(value, list | tuple) or len(value) != len(kind._fields):
        raise BadCall(f"{value!r} must be a list of {len(kind._fields)} numbers: {expected}")
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in value):
        raise BadCall(f"{value!r} must hold numbers only: {expected}")
    numbers = _swapped(list(value)) if coordinates == "thousand_yx" else list(value)
    frame = {"resized": seen, "original": size, "unit": (1, 1)}.get(coordinates, (1000, 1000))
    whole = [number / frame[axis % 2] * size[axis % 2] for axis, number in enumerate(numbers)]
    inside = [min(max(number, 0.0), float(size[axis % 2])) for axis, number in enumerate(whole)]
    if kind is Point:
        if any(abs(a - b) > 1 for a, b in zip(whole, inside, strict=True)):
            raise BadCall(f"{value!r} lies outside the image: {expected}")
        return Point(*inside)
    if whole[0] >= whole[2] or whole[1] >= whole[3]:
        raise BadCall(f"{value!r} has no area: {expected}")
    if inside[2] - inside[0] < 1 or inside[3] - inside[1] < 1:
        raise BadCall(f"{value!r} lies outside the image or is smaller than a pixel: {expected}")
    return Box(*inside)


def _swapped(items: Sequence) -> list:
    """x and y of each pair the other way round."""
    return [items[index ^ 1] for index in range(len(items))]
