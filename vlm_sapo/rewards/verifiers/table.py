"""The built-in verifiers by name: `(response, example, **args) -> float`.

In training they read the marked answer; with `finding: stated` also answers without a mark (answers.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from math import isfinite
from typing import Any

from vlm_sapo.plugins import resolve
from vlm_sapo.rewards.verifiers import boxes, text
from vlm_sapo.rewards.verifiers.answers import Finding, marked_answer, readable
from vlm_sapo.rewards.verifiers.boxes import box, point_in_box
from vlm_sapo.rewards.verifiers.choice import choice, is_multiple_choice
from vlm_sapo.rewards.verifiers.judge import judge
from vlm_sapo.rewards.verifiers.lists import is_ordered
from vlm_sapo.rewards.verifiers.math import list_items, math
from vlm_sapo.rewards.verifiers.number import count, number, read_number
from vlm_sapo.types import Example

__all__ = ["VERIFIERS", "auto", "boxes", "choice", "marked_answer", "math"]

NUMBERS = {"integer", "float", "integer_number", "decimal_number", "int", "numerical"}
TEXTS = {"string", "str"}


def auto(response: str, example: Example, *, finding: Finding = "marked") -> float:
    """The verifier that the row's recipe names. Without one the row decides: `choice` if its columns hold
    options, its problem lists options of which the gold answer is one, or its `question_type` says multiple
    choice; `anls` if its `metric` does, `number`, `list`, `exact` or `short` by its `answer_type`, and `math`
    for the others.
    """
    if example.verifier:
        name, args = example.verifier
        function = resolve(name, field="verifier.name", builtin=VERIFIERS)
        defaults = {"finding": finding} if "finding" in signature(function).parameters else {}
        return function(response, replace(example, verifier=None), **defaults | dict(args))
    response, example = readable(response, example)
    columns = example.columns
    kind, answer = (str(columns.get(name) or "").lower() for name in ("question_type", "answer_type"))
    if kind.startswith("multi") or is_multiple_choice(example):
        return choice(response, example, finding=finding)
    if str(columns.get("metric") or "").lower() == "anls":
        threshold = _number_in(columns, "threshold")
        threshold = 0.5 if threshold is None else threshold
        return text.anls(response, example, threshold=threshold, finding=finding)
    if answer in NUMBERS and read_number(example.answer) is not None:
        precision = _number_in(columns, "precision")
        decimals = None if precision is None else int(precision)
        return number(response, example, precision=decimals, finding=finding)
    if answer == "list":
        return list_items(response, example, ordered=is_ordered(example), finding=finding)
    if answer == "short" or kind == "open":
        return text.short(response, example, finding=finding)
    if answer in TEXTS:
        return text.exact(response, example, finding=finding)
    return math(response, example, finding=finding)


def _number_in(columns: Mapping[str, Any], name: str) -> float | None:
    """The finite number in a column; None if it has none."""
    try:
        value = float(columns.get(name))
    except (TypeError, ValueError):
        return None
    return value if isfinite(value) else None


VERIFIERS = {
    "anls": text.anls,
    "auto": auto,
    "box": box,
    "choice": choice,
    "count": count,
    "edit_distance": text.edit_distance,
    "exact": text.exact,
    "format": text.format,
    "json_fields": text.json_fields,
    "judge": judge,
    "language": text.language,
    "length": text.length,
    "list": list_items,
    "math": math,
    "number": number,
    "point_in_box": point_in_box,
    "short": text.short,
}


def own_verifier(example: Example, name: str, args: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The verifier that grades this row: for `auto` the one that its recipe names, if it names one."""
    return example.verifier if name == "auto" and example.verifier else (name, args)
