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
from vlm_sapo.rewards.verifiers import boxes, layout, official, text
from vlm_sapo.rewards.verifiers.answers import Finding, gold_answer, marked_answer
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
    name, args = own_verifier(example, "auto", {})
    function = resolve(name, field="data.verifier.name", builtin=VERIFIERS)
    defaults = {"finding": finding} if "finding" in signature(function).parameters else {}
    return function(response, replace(example, verifier=None), **defaults | dict(args))


def own_verifier(example: Example, name: str, args: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and arguments of the verifier that grades this row: for `auto` the one that its recipe names, else
    the one that its columns and its gold answer ask for."""
    if name != "auto":
        return name, args
    return example.verifier or _by_columns(replace(example, answer=gold_answer(example.answer)))


def _by_columns(example: Example) -> tuple[str, Mapping[str, Any]]:
    columns = example.columns
    kind, answer = (str(columns.get(name) or "").lower() for name in ("question_type", "answer_type"))
    if kind.startswith("multi") or is_multiple_choice(example):
        return "choice", {}
    if str(columns.get("metric") or "").lower() == "anls":
        threshold = _number_in(columns, "threshold")
        return "anls", {} if threshold is None else {"threshold": threshold}
    if answer in NUMBERS and read_number(example.answer) is not None:
        precision = _number_in(columns, "precision")
        return "number", {} if precision is None else {"precision": int(precision)}
    if answer == "list":
        return "list", {"ordered": is_ordered(example)}
    if answer == "short" or kind == "open":
        return "short", {}
    return ("exact", {}) if answer in TEXTS else ("math", {})


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
    "chartqa": official.chartqa,
    "choice": choice,
    "count": count,
    "edit_distance": text.edit_distance,
    "exact": text.exact,
    "format": layout.format,
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
