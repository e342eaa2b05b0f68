"""Warns when a run collapses: its recent metrics against those of its first steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import Protocol

from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.reporting.console import Console

Record = dict[str, float]
REWARD_DROP_ERRORS = 4.0
"""Standard errors by which the reward must have fallen."""
HARMLESS_GRAD_NORM = 1.0
"""A gradient norm up to this is never an alarm."""
SOLVED = "solved"
"""Name of what is said, but is no alarm: every response gets the full reward."""
SILENT_STEPS_SHOWN = 20
"""Most steps without a learning signal whose cause is looked for."""
SILENT_SHARE = 0.8
"""Share of steps without a signal from which on a run has learnt nothing."""
FULL_SHARE = 0.95
"""Share of the full reward from which on rows are solved."""
TRUNCATED_SHARE, IDENTICAL_SHARE = 0.5, 0.9
"""Shares of truncated and of identical responses that explain a missing signal."""
WHOLE_REWARD = ("reward/mean", "reward/std", "reward/zero_variance")
"""Metrics that are of no part of the reward."""
PENALTIES = ("length",)
"""Verifiers that give 0 at most."""
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


@dataclass
class LearningSignal:
    """Steps that taught nothing: no group whose rewards differ, or no gradient."""

    full_reward: float
    """The most that verifiers give: the sum of their weights."""
    rewards_decide: bool
    """Whether equal rewards in a group mean no advantage."""
    steps: int = 0
    silent: int = 0
    in_a_row: int = 0
    last: deque[Record] = field(default_factory=lambda: deque(maxlen=SILENT_STEPS_SHOWN))
    """The latest silent steps."""

    def add(self, record: Record) -> None:
        if "reward/zero_variance" not in record or record.get("policy/skipped_updates"):
            return  # skipped updates have their own warning
        self.steps += 1
        equal = self.rewards_decide and record["reward/zero_variance"] == 1.0
        if equal or not record.get("policy/grad_norm", 0.0):
            self.silent, self.in_a_row = self.silent + 1, self.in_a_row + 1
            self.last.append(record)
        else:
            self.in_a_row = 0

    @property
    def solved(self) -> bool:
        """Whether every response of the latest silent steps got the full reward."""
        return bool(self.last) and self._mean("reward/mean") >= self.full_reward * FULL_SHARE > 0

    def _mean(self, name: str) -> float:
        return sum(record.get(name, 0.0) for record in self.last) / len(self.last)

    def cause(self) -> str:
        """The likely cause in the latest silent steps, and what to do."""
        reward = self._mean("reward/mean")
        if self._mean("reward/zero_variance") < 1.0:
            if self._mean("response/truncated") > TRUNCATED_SHARE:
                return "responses are cut off: raise rollout.max_tokens, or set algo.mask_truncated=false"
            return (
                "rewards differ, but the gradient is 0: see algo.objective, algo.advantage and model.freeze"
            )
        if self.solved:
            return f"every reward is {reward:.3g}: these rows are solved; take harder ones (vlm-sapo filter)"
        if self._mean("response/identical") > IDENTICAL_SHARE:
            return "the responses of a group are the same: raise rollout.temperature, or see rollouts.jsonl"
        lowest = all(record["reward/mean"] == self.last[0]["reward/mean"] for record in self.last)
        if not lowest:
            return (
                "problems are always or never solved: keep those that are solved sometimes "
                "(vlm-sapo filter), or raise rollout.group"
            )
        names = sorted({name for record in self.last for name in record})
        parts = [name for name in names if name.startswith("reward/") and name not in WHOLE_REWARD]
        facts = [f"part {name.split('/', 1)[1]} {self._mean(name):.3g}" for name in parts if len(parts) > 1]
        outcomes = [name for name in names if name.startswith("outcome/")]
        facts += [f"{name.split('/')[-1]} {self._mean(name):.0f} per step" for name in outcomes]
        known = f" ({', '.join(facts)})" if facts else ""
        return (
            f"every reward is {reward:.3g}{known}: read responses and answers in "
            "rollouts.jsonl and try the reward with vlm-sapo doctor; data.template must ask for the form "
            "that the verifier reads. If the problems are too hard, take easier ones (vlm-sapo filter) or a "
            "cold start (vlm-sapo sft)"
        )

    def conclusion(self) -> str:
        """A sentence for the end of a run that learnt nothing; empty for any other."""
        if not self.steps or self.silent < SILENT_SHARE * self.steps or self.solved:
            return ""
        return f"nothing was learnt in {self.silent} of {self.steps} steps; {self.cause()}"


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
    signal: int
    full_reward: float = 1.0
    rewards_decide: bool = True
    stop: StopRun | None = None

    def __post_init__(self) -> None:
        self.histories = {name: MetricHistory(self.window) for name in WATCHED_METRICS}
        self.learning = LearningSignal(self.full_reward, self.rewards_decide)
        self.steps = 0
        self.last_raised: dict[str, int] = {}
        """The value of `steps` when each alarm was last on."""

    @classmethod
    def of(cls, config: TrainConfig, console: Console, stop: StopRun | None = None) -> Alarms:
        """The alarms of a run, without its steps so far."""
        return cls(
            console,
            **config.alarms.model_dump(exclude={"stop"}),
            full_reward=sum(
                part.weight for part in config.reward.parts if part.weight > 0 and part.name not in PENALTIES
            ),
            rewards_decide=isinstance(config.algo.advantage, str),
            stop=stop,
        )

    def resume(self, records: Iterable[Record]) -> None:
        """Adds the steps before a resumed run, without warnings."""
        for record in records:
            self.add(record)

    def __call__(self, record: Record) -> None:
        """Adds a step's metrics and warns about new alarms."""
        for name, text in self.add(record).items():
            if name == SOLVED:
                self.console.say(f"step {record['step']}: {text}")
                continue
            self.console.warn(f"step {record['step']}: {text}")
            if self.stop is not None:
                self.stop(text)

    def add(self, record: Record) -> dict[str, str]:
        """Adds a step's metrics. Returns the texts of the alarms that are on and were off for the last
        `window` steps, by name."""
        self.steps += 1
        self.learning.add(record)
        for name, history in self.histories.items():
            if name in record:
                history.add(record[name])
        alarms = self._alarms()
        new = [
            name for name in alarms if self.steps - self.last_raised.get(name, -self.window) >= self.window
        ]
        self.last_raised |= dict.fromkeys(alarms, self.steps)
        return {name: alarms[name] for name in new}

    def _alarms(self) -> dict[str, str]:
        """The alarms that are on: their texts by name."""
        entropy, length, reward, norm, identical = self.histories.values()
        over = f"over the last {self.window} steps"
        alarms = {}
        if self.learning.in_a_row >= self.signal:
            name = SOLVED if self.learning.solved else "signal"
            alarms[name] = f"{self.learning.in_a_row} steps in a row taught nothing; {self.learning.cause()}"
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
