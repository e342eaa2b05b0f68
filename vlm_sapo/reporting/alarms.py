"""Says when a run collapses: what its metrics look like then, against how they began."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vlm_sapo.reporting.console import Console

Record = dict[str, float]
SURE = 4.0
"""Standard errors that a reward must have fallen by."""
CLIPPED = 1.0
"""Norm of a gradient under which nothing is wrong with it."""
WATCHED = ("policy/entropy", "response/tokens", "reward/mean", "policy/grad_norm", "response/identical")


@dataclass
class Trace:
    """One metric: its mean over the first steps, over the last ones, and the best of those."""

    window: int
    first: list[float] = field(default_factory=list)
    last: deque[float] = field(default_factory=deque)
    best: float = float("-inf")

    squares: float = 0.0
    """Of the differences between one step and the next."""
    count: int = 0

    def add(self, value: float) -> None:
        self.squares += (value - self.last[-1]) ** 2 if self.last else 0.0
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
        """Standard error of the difference between two windows, from one step's difference to the next,
        since a trend is no noise."""
        return math.sqrt(self.squares / max(self.count - 1, 1) / self.window)

    @property
    def now(self) -> float:
        return sum(self.last) / len(self.last)


class Alarms:
    """Watches `window` steps at a time. Each alarm is given once, and again when it was over for as long in
    between; `stop` is called with its text where that is wanted."""

    def __init__(
        self,
        console: Console,
        *,
        window: int,
        entropy: float,
        length: float,
        reward: float,
        grad_norm: float,
        identical: float,
        stop: Callable[[str], None] | None = None,
    ):
        self.console, self.window, self.stop = console, window, stop
        self.entropy, self.length, self.reward = entropy, length, reward
        self.grad_norm, self.identical = grad_norm, identical
        self.traces = {name: Trace(window) for name in WATCHED}
        self.steps = 0
        self.given: dict[str, int] = {}
        """The last step, counted by us, that each was found at."""

    def resume(self, records: Iterable[Record]) -> None:
        """Takes in the steps that a run has behind it."""
        for record in records:
            self._add(record)
            self._new()

    def __call__(self, record: Record) -> None:
        """Takes in a step's metrics."""
        self._add(record)
        for text in self._new():
            self.console.warn(f"step {record['step']}: {text}")
            if self.stop is not None:
                self.stop(text)

    def _new(self) -> list[str]:
        """What is wrong and was not just before."""
        found = self._found()
        new = [name for name in found if self.steps - self.given.get(name, -self.window) >= self.window]
        self.given |= dict.fromkeys(found, self.steps)
        return [found[name] for name in new]

    def _add(self, record: Record) -> None:
        self.steps += 1
        for name, trace in self.traces.items():
            if name in record:
                trace.add(record[name])

    def _found(self) -> dict[str, str]:
        """What is wrong, by name."""
        entropy, length, reward, norm, identical = self.traces.values()
        over = f"over the last {self.window} steps"
        found = {}
        if entropy.full and entropy.now < self.entropy * entropy.start:
            found["entropy"] = (
                f"entropy has collapsed: {entropy.now:.3g} {over}, {entropy.start:.3g} at the start; lower "
                "train.lr, or raise algo.kl or rollout.temperature"
            )
        if length.full and not 1 / self.length <= length.now / max(length.start, 1) <= self.length:
            found["length"] = (
                f"responses have {length.now:.0f} tokens {over}, {length.start:.0f} at the start; read "
                "rollouts.jsonl: does the reward pay for length?"
            )
        fall = reward.best - reward.now
        if reward.full and reward.now < self.reward * reward.best and fall > SURE * reward.error:
            found["reward"] = (
                f"the reward has fallen to {reward.now:.3f} {over}, from {reward.best:.3f}; lower train.lr "
                "and go on from the best checkpoint"
            )
        if norm.full and norm.now > max(self.grad_norm * norm.start, CLIPPED):
            found["grad_norm"] = (
                f"gradients have a norm of {norm.now:.3g} {over}, {norm.start:.3g} at the start; lower "
                "train.lr"
            )
        if identical.full and identical.now > self.identical:
            found["identical"] = (
                f"{identical.now:.0%} of responses equal another one to their prompt {over}; raise "
                "rollout.temperature or algo.kl, or filter out what the model knows (vlm-sapo filter)"
            )
        return found
