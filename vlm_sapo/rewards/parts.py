"""A reward: named parts, each a verifier or a user's function, their weights and gates."""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError

from vlm_sapo.plugins import absolute, resolve
from vlm_sapo.rewards.verifiers.answers import Ungraded
from vlm_sapo.rewards.verifiers.table import VERIFIERS
from vlm_sapo.types import Example, ResponseText, Reward

ENTRY_POINTS = "vlm_sapo.rewards"
"""Installed packages offer rewards in this entry point group."""
CONCURRENT = 64
"""Calls of an async reward that are under way at once."""
GRADED = "graded"
_LOOP = asyncio.Runner()
"""One event loop per process: clients that a function keeps are bound to the loop of their first call."""

Item = tuple[ResponseText, Example]


class RewardError(ValueError):
    """A reward function raised, or returned something that is not a number."""


@dataclass(frozen=True)
class Verdict:
    """What one part says of one response."""

    value: float
    outcome: str = GRADED
    """`graded`, or why not: `no_answer`, `bad_gold`, `timeout`, `crash`, `error`; these score 0."""
    named: Mapping[str, float] = field(default_factory=dict)
    """The values by name, where the function returned several; `value` is their sum."""
    detail: str = ""
    """What went wrong, for a person."""


@dataclass(frozen=True)
class Part:
    """One named part of a reward."""

    label: str
    function: Callable[..., Any]
    weight: float = 1.0
    gate: float | None = None
    """Where the part scores below, the whole reward is 0."""
    kind: Literal["each", "batched", "async"] = "each"
    """How it is called: `(response, example)`, `(responses, examples)` for many, or awaited."""
    builtin: bool = False

    def grade(self, items: Sequence[Item], timeout: float | None = None) -> list[Verdict]:
        """Verdicts of the responses; `timeout` in seconds is an async function's for each. Exceptions become
        verdicts with outcome `error`."""
        if self.kind == "batched":
            try:
                values = list(self.function([item[0] for item in items], [item[1] for item in items]))
                if len(values) != len(items):
                    raise ValueError(f"returned {len(values)} values for {len(items)} responses")
            except BaseException as error:
                return [_failed(error)] * len(items)
            return [self._judged(lambda value=value: value) for value in values]
        if self.kind == "async":
            return _LOOP.run(self._gather(items, timeout))
        return [self._judged(partial(self.function, response, example)) for response, example in items]

    async def _gather(self, items: Sequence[Item], timeout: float | None) -> list[Verdict]:
        room = asyncio.Semaphore(CONCURRENT)

        async def one(response: ResponseText, example: Example) -> Verdict:
            async with room:
                try:
                    value = await asyncio.wait_for(self.function(response, example), timeout)
                except TimeoutError:
                    return Verdict(0.0, "timeout", detail=f"over {timeout} s")
                except BaseException as error:
                    return _failed(error)
            return self._judged(lambda: value)

        return await asyncio.gather(*(one(*item) for item in items))

    @staticmethod
    def _judged(call: Callable[[], Any]) -> Verdict:
        try:
            return _verdict(call())
        except BaseException as error:
            return _failed(error)


def _failed(error: BaseException) -> Verdict:
    """What a function raised, `sys.exit()` included: no user's function may end a run without a word."""
    if isinstance(error, Ungraded):
        return Verdict(0.0, error.outcome, detail=str(error))
    return Verdict(0.0, "error", detail="".join(traceback.format_exception(error)))


def _verdict(value: Any) -> Verdict:
    named = {name: _number(item, value) for name, item in value.items()} if isinstance(value, Mapping) else {}
    return Verdict(_number(sum(named.values()) if named else value, value), named=named)


def _number(item: Any, returned: Any) -> float:
    """A number of Python's, numpy's or torch's."""
    if isinstance(item, str | bytes) or not math.isfinite(number := float(item)):
        raise TypeError(f"returned {returned!r}; return a finite number, or a dict of them by name")
    return number


def _check_values(function: Callable, args: Mapping[str, Any], number: int) -> None:
    """Holds a verifier's arguments against the types of its parameters."""
    hints = get_type_hints(function)
    for name, value in args.items():
        try:
            TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            [first, *_] = error.errors()
            raise ValueError(
                f"reward.parts.{number}.args.{name} ({value!r}) is not valid: {first['msg']}"
            ) from error


def build_part(spec: Mapping[str, Any], number: int = 0) -> Part:
    """A part from its `name, label, weight, gate, args, batched` (the fields of the config's section).

    Raises ValueError naming the field where the function is not found or does not take the arguments.
    """
    name, args = spec["name"], spec.get("args", {})
    function = resolve(name, field=f"reward.parts.{number}.name", builtin=VERIFIERS, group=ENTRY_POINTS)
    batched = spec.get("batched", False)
    try:
        inspect.signature(function).bind("", None, **args)
    except TypeError as error:
        raise ValueError(
            f"reward.parts.{number}.args ({args}) must fit {name}{inspect.signature(function)}; {error}"
        ) from error
    builtin = name in VERIFIERS or name.startswith("vlm_sapo.rewards.")
    if builtin:
        _check_values(function, args, number)
    waits = inspect.iscoroutinefunction(function)
    return Part(
        label=spec.get("label") or name.rpartition(":")[2],
        function=partial(function, **args),
        weight=spec.get("weight", 1.0),
        gate=spec.get("gate"),
        kind="batched" if batched else "async" if waits else "each",
        builtin=builtin,
    )


def portable(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The part's fields with its file as an absolute path, for another process."""
    return {**spec, "name": absolute(spec["name"])}


def combine(parts: Sequence[Part], verdicts: Sequence[Verdict]) -> Reward:
    """The weighted sum of the parts' verdicts, 0 where a gate is closed."""
    closed = any(
        part.gate is not None and verdict.value < part.gate
        for part, verdict in zip(parts, verdicts, strict=True)
    )
    total = sum(part.weight * verdict.value for part, verdict in zip(parts, verdicts, strict=True))
    values: dict[str, float] = {}
    for part, verdict in zip(parts, verdicts, strict=True):
        values[part.label] = verdict.value
        values |= {f"{part.label}/{name}": value for name, value in verdict.named.items()}
    outcomes = {part.label: verdict.outcome for part, verdict in zip(parts, verdicts, strict=True)}
    details = {part.label: verdict.detail for part, verdict in zip(parts, verdicts, strict=True)}
    return Reward(0.0 if closed else total, values, outcomes, details)
