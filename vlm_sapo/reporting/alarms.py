"""Warns when a run collapses: its recent metrics against those of its first steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import Protocol

from vlm_sapo.reporting.console import Console

Record = dict[str, float]
REWARD_DROP_ERRORS = 4.0
"""Standard errors by which the reward must have fallen."""
HARMLESS_GRAD_NORM = 1.0
"""A gradient norm up to this is never an alarm."""
WATCHED_METRICS = (
    "policy/entropy",
    "response/tokens",
    "reward/mean",
    "policy/grad_norm",
    "response/identical",
)


@dataclass
class MetricHistory:
    """One metric: its mean over the first and over the last `window` steps, and the best of the latter."""

    window: int
    first: list[float] = field(default_factory=list)
    last: deque[float] = field(default_factory=deque)
    best: float = float("-inf")

    squared_differences: float = 0.0
    """Sum of squares of the differences between successive steps."""
    count: int = 0

    def add(self, value: float) -> None:
        self.squared_differences += (value - self.last[-1]) ** 2 if self.last else 0.0
        self.count += 1
        if len(self.first) < self.window:
            self.first.append(value)
        self.last.append(value)
        if len(self.last) > self.window:
            self.last.popleft()
        if self.full:
            self.best = max(self.best, self.now)

    @property
    def full(self) -> bool:
        return len(self.last) == self.window

    @property
    def start(self) -> float:
        return sum(self.first) / len(self.first)

    @property
    def error(self) -> float:
        """Standard error of the difference between two windows' means, estimated from differences of
        successive steps, so that a trend doesn't count as noise."""
        return math.sqrt(self.squared_differences / max(self.count - 1, 1) / self.window)

    @property
    def now(self) -> float:
        return sum(self.last) / len(self.last)


class StopRun(Protocol):
    """Asks the run to stop after this step."""

    def __call__(self, reason: str) -> None: ...


@dataclass
class Alarms:
    """Compares the last `window` steps with the first. An alarm is raised once, and again after it was off
    for `window` steps; `stop` is called with its text. The thresholds are those of the config's `alarms`."""

    console: Console
    _: KW_ONLY
    window: int
    entropy: float
    length: float
    reward: float
    grad_norm: float
    identical: float
    stop: StopRun | None = None

    def __post_init__(self) -> None:
        self.histories = {name: MetricHistory(self.window) for name in WATCHED_METRICS}
        self.steps = 0
        self.last_raised: dict[str, int] = {}
        """The value of `steps` when each alarm was last on."""

    def resume(self, records: Iterable[Record]) -> None:
        """Adds the steps before a resumed run, without warnings."""
        for record in records:
            self._add(record)
            self._new_alarms()

    def __call__(self, record: Record) -> None:
        """Adds a step's metrics and warns about new alarms."""
        self._add(record)
        for text in self._new_alarms():
            self.console.warn(f"step {record['step']}: {text}")
            if self.stop is not None:
                self.stop(text)

    def _new_alarms(self) -> list[str]:
        """Texts of the alarms that were off for the last `window` steps."""
        alarms = self._alarms()
        new = [
            name for name in alarms if self.steps - self.last_raised.get(name, -self.window) >= self.window
        ]
        self.last_raised |= dict.fromkeys(alarms, self.steps)
        return [alarms[name] for name in new]

    def _add(self, record: Record) -> None:
        self.steps += 1
        for name, history in self.histories.items():
            if name in record:
                history.add(record[name])

    def _alarms(self) -> dict[str, str]:
        """The alarms that are on: their texts by name."""
        entropy, length, reward, norm, identical = self.histories.values()
        over = f"over the last {self.window} steps"
        alarms = {}
        if entropy.full and entropy.now < self.entropy * entropy.start:
            alarms["entropy"] = (
                f"entropy has collapsed: {entropy.now:.3g} {over}, {entropy.start:.3g} at the start; lower "
                "train.lr, or raise algo.kl or rollout.temperature"
            )
        if length.full and not 1 / self.length <= length.now / max(length.start, 1) <= self.length:
            alarms["length"] = (
                f"responses have {length.now:.0f} tokens {over}, {length.start:.0f} at the start; read "
                "rollouts.jsonl: does the reward pay for length?"
            )
        fall = reward.best - reward.now
        if (
            reward.full
            and reward.now < self.reward * reward.best
            and fall > REWARD_DROP_ERRORS * reward.error
        ):
            alarms["reward"] = (
                f"the reward has fallen to {reward.now:.3f} {over}, from {reward.best:.3f}; lower train.lr "
                "and continue from the best checkpoint"
            )
        if norm.full and norm.now > max(self.grad_norm * norm.start, HARMLESS_GRAD_NORM):
            alarms["grad_norm"] = (
                f"gradients have a norm of {norm.now:.3g} {over}, {norm.start:.3g} at the start; lower "
                "train.lr"
            )
        if identical.full and identical.now > self.identical:
            alarms["identical"] = (
                f"{identical.now:.0%} of responses equal another one of their group {over}; raise "
                "rollout.temperature or algo.kl, or filter out problems that are too easy (vlm-sapo filter)"
            )
        return alarms
