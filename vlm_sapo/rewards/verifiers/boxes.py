"""Verifiers of boxes and points in an image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from vlm_sapo.rewards.verifiers.answers import (
    BadGold,
    Finding,
    NoAnswer,
    fenced_json,
    find_answer,
    reads_answers,
)
from vlm_sapo.types import Example, ResponseText

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as shares of the image's width and height."""
Coordinates = Literal["resized", "original", "thousand", "unit"]
"""Pixels of the image as the model sees it (Qwen2.5-VL), pixels of the row's image, 0 to 1000 (Qwen3-VL), or
0 to 1."""
Layout = Literal["xyxy", "xywh"]
NUMBER = r"[-+]?\d+(?:\.\d+)?"
FOUR_NUMBERS = re.compile(
    rf"[\[(]\s*({NUMBER})\s*,\s*({NUMBER})\s*\)?\s*,\s*\(?\s*({NUMBER})\s*,\s*({NUMBER})\s*[\])]"
)
NUMBER_PAIR = re.compile(rf"[\[(]\s*({NUMBER})\s*[,\s]\s*({NUMBER})\s*[\])]")
NUMBER_OUTSIDE_WORDS = re.compile(rf"(?<![\w.]){NUMBER}")
OUTSIDE_MARGIN = 0.1
"""How far outside the image, in shares of its sides, a box may reach."""
POINT_BOX_AREA = 4.0
"""How many times the gold box's area a box may have that stands for a point."""


@dataclass(frozen=True)
class BoxFormat:
    """How four numbers say where a box is."""

    layout: Layout
    coordinates: Coordinates

    @classmethod
    def of_answer(cls, args: Mapping[str, Any]) -> BoxFormat:
        """The format of responses, by the arguments of `box`."""
        return cls(args.get("layout", "xyxy"), args.get("coordinates", "resized"))

    @classmethod
    def of_gold(cls, args: Mapping[str, Any]) -> BoxFormat:
        """The format of gold answers, by the arguments of `box`."""
        return cls(args.get("gold_layout", "xyxy"), args.get("gold_coordinates", "original"))

    def read(self, boxes: Sequence[Sequence[float]], response: ResponseText, example: Example) -> list[Box]:
        """Boxes of this format as shares of the image's sides."""
        if not boxes:
            return []
        width, height = self.frame(response, example)
        corners = [self._to_corners(*box) for box in boxes]
        return [
            (left / width, top / height, right / width, bottom / height)
            for left, top, right, bottom in corners
        ]

    def write(self, boxes: Sequence[Box], response: ResponseText, example: Example) -> list[Box]:
        """Shares of the image's sides as boxes of this format."""
        width, height = self.frame(response, example)
        corners = [
            (left * width, top * height, right * width, bottom * height) for left, top, right, bottom in boxes
        ]
        if self.layout == "xyxy":
            return corners
        return [(left, top, right - left, bottom - top) for left, top, right, bottom in corners]

    def frame(self, response: ResponseText, example: Example) -> tuple[float, float]:
        """Width and height of the whole image in these coordinates."""
        if self.coordinates == "unit":
            return 1.0, 1.0
        if self.coordinates == "thousand":
            return 1000.0, 1000.0
        resized = self.coordinates == "resized"
        sizes = response.resized if resized else [image.size for image in example.images]
        if len(sizes) != 1:
            raise ValueError(
                f"coordinates ({self.coordinates}) are pixels of one image, and {example.label} has "
                f"{len(sizes)} images; use thousand or unit"
            )
        return sizes[0]

    def _to_corners(self, left: float, top: float, right: float, bottom: float) -> Box:
        """Left, top, right, bottom; with layout `xywh` the last two are width and height."""
        if self.layout == "xywh":
            return left, top, left + right, top + bottom
        return left, top, right, bottom


@reads_answers
def box(
    response: ResponseText,
    example: Example,
    *,
    coordinates: Coordinates = "resized",
    gold_coordinates: Coordinates = "original",
    layout: Layout = "xyxy",
    gold_layout: Layout = "xyxy",
    metric: Literal["iou", "giou"] = "iou",
    threshold: float | None = 0.5,
    finding: Finding = "marked",
) -> float:
    """How well the answer's boxes cover the gold ones: intersection over union, or generalised IoU
    (arXiv 1902.09630), negative ones as 0; 1.0 or 0.0 at the threshold, graded where that is null.

    Several boxes are matched by descending overlap; missing and surplus boxes count as 0, and so do those
    without area or far outside the image.
    """
    gold_format, answer_format = BoxFormat(gold_layout, gold_coordinates), BoxFormat(layout, coordinates)
    golds = gold_format.read(gold_boxes(example), response, example)
    boxes = answer_format.read(_read_boxes(_box_text(response, finding)), response, example)
    if not boxes:
        raise NoAnswer
    overlap = {"iou": iou, "giou": giou}[metric]
    valid = [(i, box) for i, box in enumerate(boxes) if _is_valid(box)]
    pairs = sorted(
        ((overlap(box, gold), i, j) for i, box in valid for j, gold in enumerate(golds)), reverse=True
    )
    matched_boxes: set[int] = set()
    matched_golds: set[int] = set()
    total = 0.0
    for value, i, j in pairs:
        if i not in matched_boxes and j not in matched_golds:
            matched_boxes.add(i)
            matched_golds.add(j)
            total += max(value, 0.0) if threshold is None else value >= threshold
    return total / max(len(boxes), len(golds))


@reads_answers
def point_in_box(
    response: ResponseText,
    example: Example,
    *,
    coordinates: Coordinates = "resized",
    gold_coordinates: Coordinates = "original",
    gold_layout: Layout = "xyxy",
    finding: Finding = "marked",
) -> float:
    """1.0 where the answer's one point is in a gold box, or the centre of its one box that is not much
    larger."""
    golds = BoxFormat(gold_layout, gold_coordinates).read(gold_boxes(example), response, example)
    text = _box_text(response, finding)
    width, height = BoxFormat("xyxy", coordinates).frame(response, example)
    x, y, area = _read_point(text)
    x, y, area = x / width, y / height, area / (width * height)
    return float(any(_contains(gold, x, y) and area <= POINT_BOX_AREA * _area(gold) for gold in golds))


def _box_text(response: str, finding: Finding) -> str:
    return fenced_json(response) or find_answer(response, finding)


def _read_point(text: str) -> tuple[float, float, float]:
    """The text's one point, or the centre and the area of its one box; raises NoAnswer."""
    numbers = [float(number) for number in NUMBER_OUTSIDE_WORDS.findall(text)]
    pairs = [(float(x), float(y)) for x, y in NUMBER_PAIR.findall(text)]
    if not pairs and len(numbers) == 2:
        pairs = [(numbers[0], numbers[1])]
    if len(pairs) == 1:
        return *pairs[0], 0.0
    boxes = [] if pairs else _read_boxes(text)
    if len(boxes) != 1 or not _has_area(boxes[0]):
        raise NoAnswer
    left, top, right, bottom = boxes[0]
    return (left + right) / 2, (top + bottom) / 2, (right - left) * (bottom - top)


def _contains(box: Box, x: float, y: float) -> bool:
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def _is_valid(box: Box) -> bool:
    """Whether a box has an area and is inside the image, but for a margin."""
    return _has_area(box) and min(box) >= -OUTSIDE_MARGIN and max(box) <= 1 + OUTSIDE_MARGIN


def _has_area(box: Sequence[float]) -> bool:
    return box[0] < box[2] and box[1] < box[3]


def iou(box: Box, other: Box) -> float:
    """Intersection over union."""
    return _overlap(box, other)[0]


def giou(box: Box, other: Box) -> float:
    """Generalised IoU, from -1 to 1."""
    value, union = _overlap(box, other)
    hull = _area((min(box[0], other[0]), min(box[1], other[1]), max(box[2], other[2]), max(box[3], other[3])))
    return value - (hull - union) / hull if hull else value


def _overlap(box: Box, other: Box) -> tuple[float, float]:
    """Intersection over union, and the union's area."""
    shared = _area(
        (max(box[0], other[0]), max(box[1], other[1]), min(box[2], other[2]), min(box[3], other[3]))
    )
    union = _area(box) + _area(other) - shared
    return (shared / union if union else 0.0), union


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def _read_boxes(text: str) -> list[tuple[float, ...]]:
    """The lists of four numbers in a text, or its four numbers if it has no others."""
    boxes = [tuple(map(float, numbers)) for numbers in FOUR_NUMBERS.findall(text)]
    numbers = re.findall(NUMBER, text)
    return boxes or ([tuple(map(float, numbers))] if len(numbers) == 4 else [])


def gold_boxes(example: Example) -> list[tuple[float, ...]]:
    """The row's gold boxes as written there; raises BadGold."""
    boxes = _read_boxes(example.answer)
    if not boxes:
        raise BadGold(f"the gold answer {example.answer!r} must contain boxes of four numbers")
    return boxes


def in_coordinates(
    boxes: Sequence[Sequence[float]], example: Example, resized: tuple, args: Mapping[str, Any]
) -> list[Box]:
    """Gold boxes as a model would write them, by the arguments of `box`; `resized` are the images' sizes as
    the model sees them."""
    response = ResponseText("", resized=resized)
    shares = BoxFormat.of_gold(args).read(boxes, response, example)
    return BoxFormat.of_answer(args).write(shares, response, example)


def shown(response: ResponseText, example: Example, args: Mapping[str, Any]) -> tuple[list[Box], list[Box]]:
    """The gold boxes and those of the response as shares of the image's sides, by the arguments of `box`;
    none where none can be read."""
    with suppress(BadGold, ValueError):
        golds = BoxFormat.of_gold(args).read(gold_boxes(example), response, example)
        try:
            text = _box_text(response, args.get("finding", "marked"))
        except NoAnswer:
            return golds, []
        return golds, BoxFormat.of_answer(args).read(_read_boxes(text), response, example)
    return [], []
