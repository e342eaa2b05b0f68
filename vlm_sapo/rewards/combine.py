"""A reward: named parts, each a verifier or a user's function, their weights and gates."""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from vlm_sapo.plugins import absolute, resolve
from vlm_sapo.rewards.answers import Ungraded
from vlm_sapo.rewards.verifiers import VERIFIERS
from vlm_sapo.types import Example, Response, Score

ENTRY_POINTS = "vlm_sapo.rewards"
"""Installed packages offer rewards in this entry point group."""
CONCURRENT = 64
"""Calls of an async reward that are under way at once."""
GRADED = "graded"

Item = tuple[Response, Example]


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


class PictureSize(NamedTuple):
    """Stands in for a picture where a verifier needs its size alone."""

    size: tuple[int, int]


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
            except Exception:
                return [Verdict(0.0, "error", detail=traceback.format_exc())] * len(items)
            return [self._judged(lambda value=value: value) for value in values]
        if self.kind == "async":
            return asyncio.run(self._gather(items, timeout))
        return [self._judged(partial(self.function, response, example)) for response, example in items]

    async def _gather(self, items: Sequence[Item], timeout: float | None) -> list[Verdict]:
        room = asyncio.Semaphore(CONCURRENT)

        async def one(response: Response, example: Example) -> Verdict:
            async with room:
                try:
                    value = await asyncio.wait_for(self.function(response, example), timeout)
                except TimeoutError:
                    return Verdict(0.0, "timeout", detail=f"over {timeout} s")
                except Exception as error:
                    return _failed(error)
            return self._judged(lambda: value)

        return await asyncio.gather(*(one(*item) for item in items))

    @staticmethod
    def _judged(call: Callable[[], Any]) -> Verdict:
        try:
            return _verdict(call())
        except Exception as error:
            return _failed(error)


def _failed(error: Exception) -> Verdict:
    if isinstance(error, Ungraded):
        return Verdict(0.0, error.outcome, detail=str(error))
    return Verdict(0.0, "error", detail="".join(traceback.format_exception(error)))


def _verdict(value: Any) -> Verdict:
    named = dict(value) if isinstance(value, Mapping) else {}
    for number in named.values() if named else (value,):
        if not isinstance(number, bool | int | float) or not math.isfinite(number):
            raise TypeError(f"returned {value!r}; return a finite number, or a dict of them by name")
    return Verdict(float(sum(named.values()) if named else value), named=named)


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
    waits = inspect.iscoroutinefunction(function)
    return Part(
        label=spec.get("label") or name.rpartition(":")[2],
        function=partial(function, **args),
        weight=spec.get("weight", 1.0),
        gate=spec.get("gate"),
        kind="batched" if batched else "async" if waits else "each",
        builtin=name in VERIFIERS or name.startswith("vlm_sapo.rewards."),
    )


def portable(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The part's fields with its file as an absolute path, for another process."""
    return {**spec, "name": absolute(spec["name"])}


def combine(parts: Sequence[Part], verdicts: Sequence[Verdict]) -> Score:
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
    return Score(0.0 if closed else total, values, outcomes)


def without_pictures(item: Item) -> Item:
    """The same with picture sizes in place of pictures, which cost time to send to another process."""
    response, example = item
    return response, replace(example, images=tuple(PictureSize(image.size) for image in example.images))
