"""Verifiers of boxes and points in an image."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from vlm_sapo.rewards.verifiers.answers import (
    BadGold,
    Finding,
    NoAnswer,
    fenced_json,
    find_answer,
    reads_answers,
)
from vlm_sapo.rewards.verifiers.box_text import (
    Box,
    Layout,
    UnclearKeys,
    has_area,
    read_boxes,
    read_point,
)
from vlm_sapo.types import Coordinates, Example, ResponseText

BOX_VERIFIERS = ("box", "point_in_box")
OUTSIDE_MARGIN = 0.1
"""How far outside the image, in shares of its sides, a box may reach."""
POINT_BOX_AREA = 4.0
"""How many times the gold box's area a box may have that stands for a point."""


class Outside(NoAnswer):
    """The answer lies outside the image; where most do, they are in other coordinates."""

    outcome = "outside"


@dataclass(frozen=True)
class BoxFormat:
    """How four numbers say where a box is."""

    layout: Layout | None
    """None for the one that goes with the coordinates."""
    coordinates: Coordinates | None
    """None for those that the model's family writes."""

    @classmethod
    def of_answer(cls, args: Mapping[str, Any]) -> BoxFormat:
        """The format of responses, by the arguments of `box`."""
        return cls(args.get("layout"), args.get("coordinates"))

    @classmethod
    def of_gold(cls, args: Mapping[str, Any]) -> BoxFormat:
        """The format of gold answers, by the arguments of `box`."""
        return cls(args.get("gold_layout"), args.get("gold_coordinates", "original"))

    def read(self, text: str, response: ResponseText, example: Example) -> list[Box]:
        """The boxes of a text as shares of the image's sides. Raises UnclearKeys."""
        boxes = read_boxes(text, self.layout_for(response))
        if not boxes:
            return []
        width, height = self.frame(response, example)
        return [
            (left / width, top / height, right / width, bottom / height) for left, top, right, bottom in boxes
        ]

    def read_gold(self, response: ResponseText, example: Example) -> list[Box]:
        """The row's gold boxes as shares of the image's sides. Raises BadGold where there are none, or where
        they can't be in this format: without area, outside the image, or smaller than a pixel."""
        try:
            boxes = self.read(example.answer, response, example)
        except UnclearKeys as error:
            raise BadGold(f"the gold answer {error}") from error
        if not boxes:
            raise BadGold(
                f"the gold answer {example.answer[:100]!r} must contain boxes of four numbers, or mappings "
                "such as {x1, y1, x2, y2} or {x, y, width, height}"
            )
        if not self._fits(boxes, response, example):
            raise BadGold(
                f"the gold answer {example.answer[:100]!r} is no box inside its image with gold_layout "
                f"({self.layout_for(response)}) and gold_coordinates ({self.coordinates})"
                + self._remedy(response, example)
            )
        return boxes

    def write(self, boxes: list[Box], response: ResponseText, example: Example) -> list[Box]:
        """Shares of the image's sides as boxes of this format."""
        width, height = self.frame(response, example)
        corners = [
            (left * width, top * height, right * width, bottom * height) for left, top, right, bottom in boxes
        ]
        layout = self.layout_for(response)
        if layout == "xyxy":
            return corners
        if layout == "yxyx":
            return [(top, left, bottom, right) for left, top, right, bottom in corners]
        return [(left, top, right - left, bottom - top) for left, top, right, bottom in corners]

    def layout_for(self, response: ResponseText) -> Layout:
        """The order of a box's numbers in a response."""
        y_first = (self.coordinates or response.coordinates) == "thousand_yx"
        return self.layout or ("yxyx" if y_first else "xyxy")

    def frame(self, response: ResponseText, example: Example) -> tuple[float, float]:
        """Width and height of the whole image in these coordinates. Raises ValueError if they are unknown, or
        pixels of several images."""
        coordinates = self.coordinates or response.coordinates
        if coordinates is None:
            raise ValueError(missing_coordinates("the verifier's args"))
        if coordinates == "unit":
            return 1.0, 1.0
        if coordinates in ("thousand", "thousand_yx"):
            return 1000.0, 1000.0
        resized = coordinates == "resized"
        sizes = response.resized if resized else [image.size for image in example.images]
        if len(sizes) != 1:
            raise ValueError(
                f"coordinates ({coordinates}) are pixels of one image, and {example.label} has "
                f"{len(sizes)} images; use thousand or unit"
            )
        return sizes[0]

    def _fits(self, boxes: list[Box], response: ResponseText, example: Example) -> bool:
        width, height = self.frame(response, example)
        tiny = self.coordinates != "unit" and all(
            right * width <= 1 and bottom * height <= 1 for _, _, right, bottom in boxes
        )
        return all(map(_is_valid, boxes)) and not tiny

    def _remedy(self, response: ResponseText, example: Example) -> str:
        """What else the gold boxes would be right as."""
        layouts = get_args(Layout)
        others = {f"gold_layout={layout}": replace(self, layout=layout) for layout in layouts}
        others |= {
            f"gold_coordinates={name}": replace(self, coordinates=name)
            for name in ("original", "thousand", "unit")
        }
        fitting = []
        for name, other in others.items():
            with suppress(ValueError):  # pixels of several images
                boxes = other.read(example.answer, response, example)
                fitting += (
                    [name]
                    if not name.endswith(f"={self.layout_for(response)}")
                    and other != self
                    and other._fits(boxes, response, example)
                    else []
                )
        return f"; with {' or '.join(fitting)} it would be" if fitting else "; mend the row"


def missing_coordinates(where: str) -> str:
    """Why boxes can't be read; `where` is where coordinates can be set."""
    return (
        f"{where} must say which coordinates the responses are in, since their model is not known; add "
        "coordinates: thousand (0 to 1000: Qwen2-VL, Qwen3-VL, Qwen3.5), resized (pixels of the image as the "
        "model saw it: Qwen2.5-VL), thousand_yx (0 to 1000, y before x: Gemma 4), original (pixels of the "
        "row's image) or unit (0 to 1)"
    )


def needs_family(name: str, args: Mapping[str, Any]) -> bool:
    """Whether this verifier asks the model's family for its coordinates."""
    return name in BOX_VERIFIERS and args.get("coordinates") is None


@reads_answers
def box(
    response: ResponseText,
    example: Example,
    *,
    coordinates: Coordinates | None = None,
    gold_coordinates: Coordinates = "original",
    layout: Layout | None = None,
    gold_layout: Layout | None = None,
    metric: Literal["iou", "giou"] = "iou",
    threshold: float | None = 0.5,
    finding: Finding = "marked",
) -> float:
    """How well the answer's boxes cover the gold ones: intersection over union, or generalised IoU
    (arXiv 1902.09630), negative ones as 0; 1.0 or 0.0 at the threshold, graded where that is null.

    Several boxes are matched by descending overlap; missing and surplus boxes count as 0, and so do those
    without area or far outside the image. By default `coordinates` are those that the model's family writes;
    layouts are those of lists, since a mapping's keys say theirs, and by default those of the coordinates.
    """
    golds = BoxFormat(gold_layout, gold_coordinates).read_gold(response, example)
    boxes = _read_answer(response, example, BoxFormat(layout, coordinates), finding)
    if not boxes:
        raise NoAnswer
    if not any(map(_is_inside, boxes)):
        raise Outside(f"{boxes[0]} in shares of the image's sides lies outside the image")
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
    coordinates: Coordinates | None = None,
    gold_coordinates: Coordinates = "original",
    gold_layout: Layout | None = None,
    finding: Finding = "marked",
) -> float:
    """1.0 where the answer's one point is in a gold box, or the centre of its one box that is not much
    larger."""
    golds = BoxFormat(gold_layout, gold_coordinates).read_gold(response, example)
    try:
        written = BoxFormat(None, coordinates)
        point = read_point(_box_text(response, finding), written.layout_for(response))
    except UnclearKeys as error:
        raise NoAnswer(str(error)) from error
    if point is None:
        raise NoAnswer
    width, height = written.frame(response, example)
    x, y, area = point[0] / width, point[1] / height, point[2] / (width * height)
    if not _is_inside((x, y, x, y)):
        raise Outside(f"{x, y} in shares of the image's sides lies outside the image")
    return float(any(_contains(gold, x, y) and area <= POINT_BOX_AREA * _area(gold) for gold in golds))


def _read_answer(
    response: ResponseText, example: Example, answer_format: BoxFormat, finding: Finding
) -> list[Box]:
    """The answer's boxes as shares of the image's sides; raises NoAnswer."""
    try:
        return answer_format.read(_box_text(response, finding), response, example)
    except UnclearKeys as error:
        raise NoAnswer(str(error)) from error


def _box_text(response: str, finding: Finding) -> str:
    """The text with the boxes: fenced JSON, with `stated` a response that is JSON, else the answer; raises
    NoAnswer."""
    bare = response if finding == "stated" and _is_json_list_or_object(response) else None
    return fenced_json(response) or bare or find_answer(response, finding)


def _is_json_list_or_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


def _contains(box: Box, x: float, y: float) -> bool:
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def _is_valid(box: Box) -> bool:
    """Whether a box has an area and is inside the image, but for a margin."""
    return has_area(box) and _is_inside(box)


def _is_inside(box: Box) -> bool:
    return min(box) >= -OUTSIDE_MARGIN and max(box) <= 1 + OUTSIDE_MARGIN


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


def in_coordinates(
    response: ResponseText, example: Example, args: Mapping[str, Any], *, shift: float = 0.0
) -> list[Box]:
    """The row's gold boxes as the model of this response would write them, by the arguments of `box`, moved
    down and right by `shift` images; raises BadGold."""
    golds = BoxFormat.of_gold(args).read_gold(response, example)
    moved = [tuple(side + shift for side in gold) for gold in golds]
    return BoxFormat.of_answer(args).write(moved, response, example)


def shown(response: ResponseText, example: Example, args: Mapping[str, Any]) -> tuple[list[Box], list[Box]]:
    """The gold boxes and those of the response as shares of the image's sides, by the arguments of `box`;
    none where none can be read."""
    with suppress(BadGold, ValueError):
        golds = BoxFormat.of_gold(args).read_gold(response, example)
        try:
            return golds, _read_answer(
                response, example, BoxFormat.of_answer(args), args.get("finding", "marked")
            )
        except NoAnswer:
            return golds, []
    return [], []
