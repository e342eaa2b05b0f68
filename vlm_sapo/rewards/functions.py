"""Reward functions that a Python program passes: what a config calls them."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_sapo.fingerprint import fingerprint_function
from vlm_sapo.plugins import PYTHON

Reward = Callable[..., Any] | str | Mapping[str, Any]


def config_parts(reward: Reward | Sequence[Reward]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """`reward.parts` for one or several functions, built-in names, or parts as in a config file whose `name`
    may be a function; and the functions that these name `python:NAME`.

    A function at the top level of an importable module is named by that, and a stored config finds it again.
    Raises ValueError for anything else than these.
    """
    parts: list[dict[str, Any]] = []
    passed: dict[str, Any] = {}
    for item in reward if isinstance(reward, list | tuple) else [reward]:
        part = dict(item) if isinstance(item, Mapping) else {"name": item}
        function = part.get("name")
        if callable(function):
            label = _unused(part.get("label") or short_name(function), parts)
            part |= {"name": importable_name(function) or f"{PYTHON}{label}", "label": label}
            if part["name"].startswith(PYTHON):
                part["fingerprint"] = fingerprint_function(function)
                passed[part["name"]] = function
        elif not isinstance(function, str):
            raise ValueError(
                f"reward ({item!r:.80}) must be a function, the name of a verifier, a part as in "
                "reward.parts, or a list of these"
            )
        parts.append(part)
    return parts, passed


def importable_name(function: Callable[..., Any]) -> str | None:
    """`module:name` if that is where other processes can import it; None for functions of the script or
    notebook that runs, lambdas, methods and functions inside others."""
    if not inspect.isroutine(function) or function.__module__ == "__main__":
        return None
    module = sys.modules.get(function.__module__)
    if module is None or vars(module).get(function.__name__) is not function:
        return None
    return f"{function.__module__}:{function.__name__}"


def short_name(function: Callable[..., Any]) -> str:
    """A name for logs: of the function, or of the class of a callable object."""
    if isinstance(function, functools.partial):
        return short_name(function.func)
    name = function.__name__ if inspect.isroutine(function) else type(function).__name__
    return name if name.isidentifier() else "reward"


def _unused(label: str, parts: Sequence[Mapping[str, Any]]) -> str:
    """The label, with a number where another part has it."""
    labels = {part.get("label") for part in parts}
    numbered = (f"{label}_{number}" for number in range(2, len(labels) + 3))
    return label if label not in labels else next(name for name in numbered if name not in labels)
