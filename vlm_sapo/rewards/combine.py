"""A reward: named parts, each a verifier or a user's function, and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from vlm_sapo.plugins import resolve
from vlm_sapo.rewards.verifiers import VERIFIERS
from vlm_sapo.types import Completion, Example, Score


class RewardError(ValueError):
    """A reward function raised, or returned something that is not a number."""


@dataclass(frozen=True)
class Part:
    """One named part: `function(response, example) -> float`, times `weight`."""

    label: str
    function: Callable[[str, Example], float]
    weight: float

    def __call__(self, response: str, example: Example) -> float:
        """Raises RewardError with row, response and cause; a bug must not train as "always wrong"."""
        where = f"reward {self.label}, {example.label}, response {response[:300]!r}"
        try:
            value = self.function(response, example)
        except Exception as error:
            raise RewardError(f"{where}: {type(error).__name__}: {error}; mend the function") from error
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return float(value)
        raise RewardError(f"{where}: returned {value!r}; return a finite float")


class Reward:
    """Scores completions by the weighted sum of its parts."""

    def __init__(self, parts: list[Part]):
        self.parts = parts

    def __call__(self, completion: Completion, example: Example) -> Score:
        values = {part.label: part(completion.text, example) for part in self.parts}
        return Score(total=sum(part.weight * values[part.label] for part in self.parts), parts=values)


def build_reward(parts: list[dict[str, Any]]) -> Reward:
    """A reward from `name, label, weight, args` of each part (the fields of the config's section)."""
    built = []
    for number, part in enumerate(parts):
        function = resolve(part["name"], field=f"reward.{number}.name", builtin=VERIFIERS)
        label = part.get("label") or part["name"].rpartition(":")[2]
        function = partial(function, **part.get("args", {}))
        built.append(Part(label=label, function=function, weight=part.get("weight", 1.0)))
    return Reward(built)
