"""A reward: named parts, each a verifier or a user's function, their weights and gates."""

from __future__ import annotations

import asyncio
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pickle import PicklingError
from typing import Any, Literal, Protocol, get_type_hints

import cloudpickle
from pydantic import TypeAdapter, ValidationError

from vlm_sapo.plugins import PYTHON, absolute, check_call, resolve
from vlm_sapo.rewards.trl import TrlReward, has_trl_signature, is_async
from vlm_sapo.rewards.verifiers.answers import Ungraded
from vlm_sapo.rewards.verifiers.table import VERIFIERS
from vlm_sapo.types import Example, ResponseText, Reward

ENTRY_POINTS = "vlm_sapo.rewards"
"""Installed packages offer rewards in this entry point group."""
MAX_CONCURRENT_CALLS = 64
"""Calls of an async reward that run at once."""
GRADED, NOT_APPLICABLE = "graded", "not_applicable"
_LOOP = asyncio.Runner()
"""One event loop per process: a function's clients are bound to the loop of their first call."""

Item = tuple[ResponseText, Example]


class RewardFunction(Protocol):
    """A verifier or a user's function: `(response, example, **args)` to a number or a dict of numbers;
    batched, `(responses, examples, **args)` to a list of them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class RewardError(ValueError):
    """A reward function raised, or returned something that is not a number."""


@dataclass(frozen=True)
class Verdict:
    """What one part says of one response."""

    value: float
    outcome: str = GRADED
    """`graded`, or what scores 0: `no_answer`, `outside`, `bad_gold`, `not_applicable`, `timeout`,
    `crash`, `error`."""
    components: Mapping[str, float] = field(default_factory=dict)
    """The values by name, where the function returned several; `value` is their sum."""
    detail: str = ""
    """What went wrong, for the message."""


@dataclass(frozen=True)
class Part:
    """One named part of a reward."""

    label: str
    function: RewardFunction
    args: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    gate: float | None = None
    """If the part scores less than this, the whole reward is 0."""
    kind: Literal["each", "batched", "async"] = "each"
    """How it is called: `(response, example)`, `(responses, examples)` for many, or awaited."""
    builtin: bool = False

    @property
    def compares(self) -> bool:
        """Whether a score may depend on the other responses, as TRL's functions get all of a batch."""
        return isinstance(self.function, TrlReward)

    def grade(self, items: Sequence[Item], timeout: float | None = None) -> list[Verdict]:
        """Verdicts of the responses; `timeout` in seconds is an async function's for each. Exceptions become
        verdicts with outcome `error`."""
        if self.kind == "batched":
            return self._grade_batch(items)
        if self.kind == "async":
            return _LOOP.run(self._grade_concurrently(items, timeout))
        return [self._grade_one(response, example) for response, example in items]

    def _grade_one(self, response: ResponseText, example: Example) -> Verdict:
        try:
            value = self.function(response, example, **self.args)
        except BaseException as error:
            return _failure(error)
        return _verdict(value)

    def _grade_batch(self, items: Sequence[Item]) -> list[Verdict]:
        responses, examples = [response for response, _ in items], [example for _, example in items]
        try:
            values = list(self.function(responses, examples, **self.args))
            if len(values) != len(items):
                raise ValueError(f"returned {len(values)} values for {len(items)} responses")
        except BaseException as error:
            return [_failure(error)] * len(items)
        if self.compares:  # None is TRL's word for a row that the function is not for
            return [Verdict(0.0, NOT_APPLICABLE) if value is None else _verdict(value) for value in values]
        return [_verdict(value) for value in values]

    async def _grade_concurrently(self, items: Sequence[Item], timeout: float | None) -> list[Verdict]:
        semaphore = asyncio.Semaphore(MAX_CONCURRENT_CALLS)

        async def grade_one(response: ResponseText, example: Example) -> Verdict:
            async with semaphore:
                try:
                    call = self.function(response, example, **self.args)
                    value = await asyncio.wait_for(call, timeout)
                except TimeoutError:
                    return Verdict(0.0, "timeout", detail=f"over {timeout} s")
                except BaseException as error:
                    return _failure(error)
            return _verdict(value)

        return await asyncio.gather(*(grade_one(*item) for item in items))


def _failure(error: BaseException) -> Verdict:
    """The verdict for what a function raised, `sys.exit()` included: no user's function may end a run without
    a message."""
    if isinstance(error, Ungraded):
        return Verdict(0.0, error.outcome, detail=str(error))
    return Verdict(0.0, "error", detail="".join(traceback.format_exception(error)))


def _verdict(value: Any) -> Verdict:
    """The verdict for what a function returned; an error unless that is numbers."""
    try:
        if not isinstance(value, Mapping):
            return Verdict(_finite(value, value))
        components = {name: _finite(item, value) for name, item in value.items()}
        return Verdict(
            _finite(sum(components.values()) if components else value, value), components=components
        )
    except BaseException as error:
        return _failure(error)


def _finite(item: Any, returned: Any) -> float:
    """A number of Python's, numpy's or torch's."""
    if isinstance(item, str | bytes) or not math.isfinite(number := float(item)):
        raise TypeError(f"returned {returned!r}; return a finite number, or a dict of them by name")
    return number


def _check_values(function: RewardFunction, args: Mapping[str, Any], field: str) -> None:
    """Raises ValueError if an argument doesn't have the type of the verifier's parameter."""
    hints = get_type_hints(function)
    for name, value in args.items():
        try:
            TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            [first, *_] = error.errors()
            raise ValueError(f"{field}.args.{name} ({value!r}) is not valid: {first['msg']}") from error


def is_builtin(name: str) -> bool:
    return name in VERIFIERS or name.startswith("vlm_sapo.rewards.")


def resolve_reward(name: str, args: Mapping[str, Any], *, field: str) -> RewardFunction:
    """The reward function called `name`. Raises ValueError naming `field` (such as `reward.parts.0`) if there
    is none or it doesn't take the arguments."""
    function = resolve(name, field=f"{field}.name", builtin=VERIFIERS, group=ENTRY_POINTS)
    if has_trl_signature(function):
        adapted = TrlReward(function, name.rpartition(":")[2])
        adapted.check_args(args, field)
        return adapted
    check_call(function, "", None, name=name, field=f"{field}.name", args=args)
    if is_builtin(name):
        _check_values(function, args, field)
    return function


def build_part(spec: Mapping[str, Any], number: int = 0) -> Part:
    """A part from its `name, label, weight, gate, args, batched` (the fields of the config's section).

    Raises ValueError naming the field if there is no such function or it doesn't take the arguments.
    """
    name, args = spec["name"], spec.get("args", {})
    function = resolve_reward(name, args, field=f"reward.parts.{number}")
    batched = spec.get("batched", False) or isinstance(function, TrlReward)
    return Part(
        label=spec.get("label") or name.rpartition(":")[2],
        function=function,
        args=args,
        weight=spec.get("weight", 1.0),
        gate=spec.get("gate"),
        kind="batched" if batched else "async" if is_async(function) else "each",
        builtin=is_builtin(name),
    )


def portable(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The part's fields with its file as an absolute path, for another process."""
    return {**spec, "name": absolute(spec["name"])}


def pickled(specs: Sequence[Mapping[str, Any]]) -> bytes:
    """The functions of parts that a Python program passed, by name and with their code, for processes that
    can't import them. Raises ValueError for one that can't be pickled."""
    passed = {}
    for number, name in enumerate(spec["name"] for spec in specs):
        if name.startswith(PYTHON):
            field = f"reward.parts.{number}.name"
            passed[name] = resolve(name, field=field)
            try:
                cloudpickle.dumps(passed[name])
            except (PicklingError, TypeError, ValueError, AttributeError, RecursionError) as error:
                raise ValueError(
                    f"{field} ({name}) can't be sent to the processes that grade ({error}); define it at the "
                    "top level of a module, and let it create or import what it uses"
                ) from error
    return cloudpickle.dumps(passed)


def combine(parts: Sequence[Part], verdicts: Sequence[Verdict]) -> Reward:
    """The weighted sum of the parts' verdicts, 0 if one is below its gate."""
    below_gate = any(
        part.gate is not None and verdict.value < part.gate
        for part, verdict in zip(parts, verdicts, strict=True)
    )
    total = sum(part.weight * verdict.value for part, verdict in zip(parts, verdicts, strict=True))
    values: dict[str, float] = {}
    for part, verdict in zip(parts, verdicts, strict=True):
        values[part.label] = verdict.value
        values |= {f"{part.label}/{name}": value for name, value in verdict.components.items()}
    outcomes = {part.label: verdict.outcome for part, verdict in zip(parts, verdicts, strict=True)}
    details = {part.label: verdict.detail for part, verdict in zip(parts, verdicts, strict=True)}
    return Reward(0.0 if below_gate else total, values, outcomes, details)
