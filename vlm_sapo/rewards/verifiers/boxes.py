"""Verifiers of places in a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from vlm_sapo.rewards.verifiers.answers import BadGold, Finding, NoAnswer, fenced_json, find_answer
from vlm_sapo.types import Example, ResponseText

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as shares of the picture's sides."""
Coordinates = Literal["resized", "original", "thousand", "unit"]
"""Pixels of the picture as the model sees it (Qwen2.5-VL), pixels of the row's picture, 0 to 1000
(Qwen3-VL), or 0 to 1."""
NUMBER = r"[-+]?\d+(?:\.\d+)?"
FOUR = re.compile(
    rf"[\[(]\s*({NUMBER})\s*,\s*({NUMBER})\s*\)?\s*,\s*\(?\s*({NUMBER})\s*,\s*({NUMBER})\s*[\])]"
)
PAIR = re.compile(rf"[\[(]\s*({NUMBER})\s*[,\s]\s*({NUMBER})\s*[\])]")
BARE = re.compile(rf"(?<![\w.]){NUMBER}")
MARGIN = 0.1
"""How far outside the picture, in shares of its sides, a box may reach."""
LARGER = 4.0
"""How much larger than the gold box a box may be that stands for a point."""


def box(
    response: ResponseText,
    example: Example,
    *,
    coordinates: Coordinates = "resized",
    gold_coordinates: Coordinates = "original",
    layout: Literal["xyxy", "xywh"] = "xyxy",
    gold_layout: Literal["xyxy", "xywh"] = "xyxy",
    metric: Literal["iou", "giou"] = "iou",
    threshold: float | None = 0.5,
    finding: Finding = "marked",
) -> float:
    """How well the answer's boxes cover the gold ones: intersection over union, or generalised IoU
    (arXiv 1902.09630), negative ones as 0; 1.0 or 0.0 at the threshold, graded where that is null.

    Several boxes are matched by descending overlap; boxes too many or too few count as 0, and so do those
    without area or far outside the picture.
    """
    golds = [
        _to_share(four, gold_layout, gold_coordinates, response, example) for four in gold_boxes(example)
    ]
    text = fenced_json(response) or find_answer(response, finding)
    given = [_to_share(four, layout, coordinates, response, example) for four in _fours(text)]
    if not given:
        raise NoAnswer
    overlap = {"iou": iou, "giou": giou}[metric]
    sound = [(i, one) for i, one in enumerate(given) if _is_sound(one)]
    pairs = sorted(
        ((overlap(one, gold), i, j) for i, one in sound for j, gold in enumerate(golds)), reverse=True
    )
    taken: tuple[set[int], set[int]] = (set(), set())
    matched = 0.0
    for value, i, j in pairs:
        if i not in taken[0] and j not in taken[1]:
            taken[0].add(i)
            taken[1].add(j)
            matched += max(value, 0.0) if threshold is None else value >= threshold
    return matched / max(len(given), len(golds))


def point_in_box(
    response: ResponseText,
    example: Example,
    *,
    coordinates: Coordinates = "resized",
    gold_coordinates: Coordinates = "original",
    gold_layout: Literal["xyxy", "xywh"] = "xyxy",
    finding: Finding = "marked",
) -> float:
    """1.0 where the answer's one point lies in a gold box, or the centre of its one box that is not much
    larger."""
    golds = [
        _to_share(four, gold_layout, gold_coordinates, response, example) for four in gold_boxes(example)
    ]
    text = fenced_json(response) or find_answer(response, finding)
    width, height = _frame(coordinates, response, example)
    x, y, area = _point(text)
    x, y, area = x / width, y / height, area / (width * height)
    return float(any(_holds(gold, x, y) and area <= LARGER * _area(gold) for gold in golds))


def _point(text: str) -> tuple[float, float, float]:
    """The text's one point, or the centre and the area of its one box; raises NoAnswer."""
    numbers = [float(number) for number in BARE.findall(text)]
    pairs = [(float(x), float(y)) for x, y in PAIR.findall(text)]
    if not pairs and len(numbers) == 2:
        pairs = [(numbers[0], numbers[1])]
    if len(pairs) == 1:
        return *pairs[0], 0.0
    boxes = [] if pairs else _fours(text)
    if len(boxes) != 1 or not _has_area(boxes[0]):
        raise NoAnswer
    left, top, right, bottom = boxes[0]
    return (left + right) / 2, (top + bottom) / 2, (right - left) * (bottom - top)


def _holds(box: Box, x: float, y: float) -> bool:
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def _is_sound(box: Box) -> bool:
    """Whether a box has an area and lies in the picture, but for a margin."""
    return _has_area(box) and min(box) >= -MARGIN and max(box) <= 1 + MARGIN


def _has_area(box: Sequence[float]) -> bool:
    return box[0] < box[2] and box[1] < box[3]


def iou(one: Box, other: Box) -> float:
    """Intersection over union."""
    return _overlap(one, other)[0]


def giou(one: Box, other: Box) -> float:
    """Generalised IoU, from -1 to 1."""
    value, union = _overlap(one, other)
    hull = _area((min(one[0], other[0]), min(one[1], other[1]), max(one[2], other[2]), max(one[3], other[3])))
    return value - (hull - union) / hull if hull else value


def _overlap(one: Box, other: Box) -> tuple[float, float]:
    shared = _area(
        (max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3]))
    )
    union = _area(one) + _area(other) - shared
    return (shared / union if union else 0.0), union


def _area(area: Box) -> float:
    return max(area[2] - area[0], 0.0) * max(area[3] - area[1], 0.0)


def _fours(text: str) -> list[tuple[float, ...]]:
    found = [tuple(map(float, four)) for four in FOUR.findall(text)]
    numbers = re.findall(NUMBER, text)
    return found or ([tuple(map(float, numbers))] if len(numbers) == 4 else [])


def gold_boxes(example: Example) -> list[tuple[float, ...]]:
    """The row's gold boxes as they stand there; raises BadGold."""
    found = _fours(example.answer)
    if not found:
        raise BadGold(f"the gold answer {example.answer!r} must hold boxes of four numbers")
    return found


def in_coordinates(
    boxes: Sequence[Sequence[float]], example: Example, resized: tuple, args: Mapping[str, Any]
) -> list[tuple[float, ...]]:
    """Gold boxes as a model would write them, by the arguments of `box`; `resized` are the pictures' sizes as
    the model sees them."""
    response = ResponseText("", resized=resized)
    width, height = _frame(args.get("coordinates", "resized"), response, example)
    gold = args.get("gold_layout", "xyxy"), args.get("gold_coordinates", "original")
    shares = [_to_share(box, *gold, response, example) for box in boxes]
    scaled = [
        (left * width, top * height, right * width, bottom * height) for left, top, right, bottom in shares
    ]
    if args.get("layout", "xyxy") == "xyxy":
        return scaled
    return [(left, top, right - left, bottom - top) for left, top, right, bottom in scaled]


def shown(response: ResponseText, example: Example, args: Mapping[str, Any]) -> tuple[list[Box], list[Box]]:
    """The gold boxes and those of the response as shares of the picture's sides, by the arguments of `box`;
    none where none can be read."""
    gold = args.get("gold_layout", "xyxy"), args.get("gold_coordinates", "original")
    given = args.get("layout", "xyxy"), args.get("coordinates", "resized")
    with suppress(BadGold, ValueError):
        golds = [_to_share(four, *gold, response, example) for four in gold_boxes(example)]
        try:
            text = fenced_json(response) or find_answer(response, args.get("finding", "marked"))
        except NoAnswer:
            return golds, []
        return golds, [_to_share(four, *given, response, example) for four in _fours(text)]
    return [], []


def _to_share(four, layout: str, coordinates: Coordinates, response: ResponseText, example: Example) -> Box:
    width, height = _frame(coordinates, response, example)
    left, top, right, bottom = four
    if layout == "xywh":
        right, bottom = left + right, top + bottom
    return left / width, top / height, right / width, bottom / height


def _frame(coordinates: Coordinates, response: ResponseText, example: Example) -> tuple[float, float]:
    if coordinates == "unit":
        return 1.0, 1.0
    if coordinates == "thousand":
        return 1000.0, 1000.0
    sizes = response.resized if coordinates == "resized" else [image.size for image in example.images]
    if len(sizes) != 1:
        raise ValueError(
            f"coordinates ({coordinates}) are pixels of one picture; {example.label} has {len(sizes)} here, "
            "use thousand or unit"
        )
    return sizes[0]
