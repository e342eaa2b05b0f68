"""Responses whose score is known before any model answers: the gold answer itself, and a wrong one."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from typing import Any

from vlm_sapo.rewards.verifiers.boxes import gold_boxes, in_coordinates
from vlm_sapo.rewards.verifiers.choice import named, option_column, options
from vlm_sapo.rewards.verifiers.number import read_number
from vlm_sapo.rewards.verifiers.text import golds
from vlm_sapo.types import Example, Response

PLACES = ("box", "point_in_box")
LISTED = ("anls", "chartqa", "edit_distance", "exact", "short")
"""Verifiers whose gold answer may be a list of accepted texts."""


def right(example: Example, name: str, args: Mapping[str, Any], resized: tuple = ()) -> Response:
    """The gold answer as a response that the verifier `name` must score 1; `resized` are the pictures' sizes
    as the model sees them."""
    name, args = own_verifier(example, name, args)
    answer = example.answer
    if name in PLACES:
        found = in_coordinates(gold_boxes(example), example, resized, args)
        answer = json.dumps([[round(side, 6) for side in box] for box in found])
    elif _by_text(example, name):
        answer = golds(example)[0]
    elif name == "json_fields":
        return Response(answer, resized=resized)
    return Response(f"\\boxed{{{answer}}}", resized=resized)


def wrong(example: Example, name: str, args: Mapping[str, Any], resized: tuple = ()) -> Response:
    """A response that the verifier `name` must score 0."""
    name, args = own_verifier(example, name, args)
    answer = "nothing of the kind"
    number = read_number(example.answer)
    given = options(example) if name in ("auto", "choice") else []
    lettered = (
        given or option_column(example.columns) or example.columns.get("question_type") == "multi_choice"
    )
    if name in PLACES:
        boxes = [
            (right + 1, bottom + 1, right + 2, bottom + 2) for _, _, right, bottom in gold_boxes(example)
        ]
        answer = json.dumps([list(box) for box in boxes])
    elif lettered and name in ("auto", "choice") and (chosen := named(example.answer, given)):
        count = len(given) or len(string.ascii_uppercase)
        answer = next(
            (string.ascii_uppercase[index] for index in range(count) if index not in chosen), answer
        )
    elif number is not None and not _by_text(example, name):
        answer = f"{abs(number) * 2 + 7:g}"
    return Response(f"\\boxed{{{answer}}}", resized=resized)


def _by_text(example: Example, name: str) -> bool:
    """Whether the verifier compares texts, of which the gold answer may list several."""
    return name.rpartition(":")[2] in LISTED or example.columns.get("metric") == "anls"


def own_verifier(example: Example, name: str, args: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The verifier that `auto` goes by for this row, where its recipe names one."""
    return example.verifier if name == "auto" and example.verifier else (name, args)
