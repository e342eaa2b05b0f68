"""A run: its folder, progress, checkpoints, evaluations and signals."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch

from vlm_sapo.data.stream import TaskMixture
from vlm_sapo.distributed import Interrupted, World, deferring_signals
from vlm_sapo.evaluation.periodic import Evaluator
from vlm_sapo.models.encode import Encoder
from vlm_sapo.reporting.callbacks import Callback, Callbacks
from vlm_sapo.reporting.card import write_card
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.curves import plot_curves
from vlm_sapo.reporting.metrics import Metrics, UpdateStats
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.reporting.step_report import StepRecords, StepReport
from vlm_sapo.rollout.sampler import Rollouts
from vlm_sapo.rollout.scoring import Stopwatch
from vlm_sapo.training.batch import Batch
from vlm_sapo.training.checkpoint import FAILURES, FREE_DISK, Checkpoints, Progress, sync_to_disk
from vlm_sapo.training.checks import ParityError
from vlm_sapo.training.policy import Policy
from vlm_sapo.types import RolloutBatch

SAME_SIGNAL = 2.0
"""Seconds within which repeated signals count as one."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Stops a run on a signal, inside `handling_signals`.

    In generation, checks and evaluation a signal raises Interrupted at once; an update is finished first.
    Several processes stop together after a step. Another signal more than SAME_SIGNAL seconds later exits at
    once; until then repetitions are ignored, since launchers forward signals that processes also get.
    """

    def __init__(self, world: World):
        self.world, self.reason, self.alarm, self._between = world, "", False, False
        self._first = math.inf
        """Time of the first signal."""

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # Python lets no other set handlers
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A signal in the block raises Interrupted, and so does an earlier one. All processes call it."""
        reason, alarm = max(self.world.all_gather((self.reason, self.alarm)))
        if reason:
            raise Interrupted(reason, alarm=alarm)
        self._between = self.world.size == 1
        try:
            yield
        finally:
            self._between = False

    def request_stop(self, reason: str, *, alarm: bool = False) -> None:
        """Stops the run before its next step."""
        self.reason, self.alarm = reason, alarm

    def stop_at_alarm(self, reason: str) -> None:
        """Stops the run before its next step, because of an alarm."""
        self.request_stop(reason, alarm=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._first > SAME_SIGNAL:
            sys.exit(128 + number)
        self._first = min(self._first, now)
        if not self.reason:
            self.request_stop(signal.Signals(number).name)
        if self._between:
            self._between = False
            deferring_signals.raise_or_defer(Interrupted(self.reason, alarm=self.alarm))


class Check(Protocol):
    """Checks a step's groups before they are trained on."""

    def __call__(self, step: int, rollout: RolloutBatch) -> Metrics: ...


class Advantage(Protocol):
    """Computes advantages from a batch's rewards or other fields; see training/loss.py."""

    rewards_decide: bool
    """Whether equal rewards in a group mean zero advantages."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """[N, T] float64."""


@dataclass
class Run:
    """The parts that `train` and `sft` share. Close it at the end."""

    folder: RunFolder
    console: Console
    policy: Policy
    stream: TaskMixture
    encode: Encoder
    evaluator: Evaluator
    progress: Progress
    checkpoint_every: int
    checkpoints: Checkpoints
    interruption: Interruption
    rollouts: Rollouts
    world: World
    watch: Stopwatch = field(default_factory=Stopwatch)
    started: float = 0.0

    def close(self) -> None:
        """Ends engines, workers, background writes and trackers."""
        self.rollouts.close()
        self.checkpoints.close()
        self.folder.close()

    def calling(self, callbacks: Sequence[Callback]) -> Callbacks:
        """Calls callbacks during a `with` block. At its end raises the exception of one that failed, once the
        run has stopped."""
        listener = Callbacks(callbacks, self.interruption.request_stop)
        if self.world.main:
            self.folder.listeners.append(listener)
        return listener

    def begin_step(self) -> None:
        self.started, self.watch = time.perf_counter(), Stopwatch()

    def end_step(self, step: int) -> None:
        """Counts a finished step."""
        self.progress.advance(step, time.perf_counter() - self.started)
        self.rollouts.mark_trained()

    @property
    def seconds(self) -> dict[str, float]:
        """Durations of the current step's parts, and of the step so far."""
        return dict(self.watch.seconds) | {"step": time.perf_counter() - self.started}

    @contextmanager
    def before_update(self, name: str) -> Iterator[None]:
        """Times a part of a step before its first update; it may be interrupted."""
        with self.watch.time(name), self.checkpoint_on_error():
            yield

    @contextmanager
    def checkpoint_on_error(self) -> Iterator[None]:
        """If the block, which runs between updates, fails or is interrupted, writes a checkpoint of the
        finished steps. Groups that were sampled but not trained on are replayed on resume; after a
        ParityError they are resampled."""
        try:
            with self.interruption.interruptible():
                yield
                self.world.barrier()
        except Exception as error:
            if not isinstance(error, Interrupted):  # all processes raise that
                self.world.fail_everywhere(error)
            self.checkpoints.wait()
            if self.progress.step and self.checkpoints.newest_step != self.progress.step:
                disagrees = any(self.world.all_gather(isinstance(error, ParityError)))
                self.save_checkpoint(self.rollouts.state(resample=disagrees))
                self.checkpoints.wait()
                if self.checkpoints.newest_step is not None:
                    self.console.say(
                        f"a checkpoint after {self.progress.step} steps is in {self.checkpoints.folder}"
                    )
            raise

    def evaluate(self, step: int, *, last: int) -> None:
        """Evaluates if it is due: before the first step, every `eval.every` steps, and after the last."""
        with self.checkpoint_on_error():
            self.evaluator.at(step, last=last)

    def checkpoint_if_due(self, step: int, *, last: int) -> None:
        """Writes a checkpoint after every `checkpoint_every` steps and after the last one."""
        if self.checkpoint_every and (step == last or step % self.checkpoint_every == 0):
            self.save_checkpoint(self.rollouts.state())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes a checkpoint with this state of the rollouts."""
        self.checkpoints.save(self.policy, self.progress, state)

    def finish(self, steps: int) -> dict:
        """Writes `final/`, `curves.png` and `summary.json`; returns the summary."""
        self.checkpoints.wait()
        failed = None
        try:
            self.policy.export(self.folder.path / "final", write=self.world.main)
        except FAILURES as error:
            failed = error
        return self.world.on_main(lambda: self._finish(steps, failed))

    def _finish(self, steps: int, failed: Exception | None) -> dict:
        try:
            if failed is not None:
                raise failed
            self.folder.flush()
            sync_to_disk(self.folder.path / "final")
            return self._summarize(steps)
        except FAILURES as error:
            raise ValueError(
                f"all {steps} steps are done, but the result cannot be written ({error}), and "
                f"{self.checkpoints.newest_written}; {FREE_DISK}"
            ) from error

    def _summarize(self, steps: int) -> dict:
        evaluations = self.folder.evaluations()
        plot_curves(self.folder.path / "curves.png", self.folder.read("metrics.jsonl"), evaluations)
        summary: dict = {"steps": steps, "seconds": round(self.progress.seconds, 1)}
        for record in evaluations:
            for name, step in (("eval_before", 0), ("eval_after", steps)):
                if record["step"] == step:
                    short = {key: record[key] for key in ("pass@1", "ci95", "n")}
                    summary[f"{name}/{record['name']}"] = short
        after = [key.partition("/")[2] for key in summary if key.startswith("eval_after/")]
        if added := [name for name in after if f"eval_before/{name}" not in summary]:
            summary["not_evaluated_before"] = added
        if conclusion := self.conclusion():
            summary["learnt_nothing"] = conclusion
        if self.stream.skipped:
            summary["rows_skipped"] = self.stream.skipped
            self.console.warn(
                f"unusable rows were skipped {self.stream.skipped} times (data.on_error=skip); "
                "vlm-sapo doctor names them"
            )
        if edited := write_card(self.folder, summary):
            self.console.warn(
                f"the model card was edited by hand; it is kept as {edited}, beside the new one"
            )
        self.folder.replace("summary.json", json.dumps(summary, indent=2) + "\n")
        done = f"{steps} steps in {summary['seconds']} s; everything is in {self.folder.path}"
        if conclusion:
            self.console.warn(f"done, but {conclusion}. {done}")
        else:
            self.console.say(f"done: {done}")
        return summary

    def conclusion(self) -> str:
        """A sentence for the end of a run that learnt nothing; empty for any other."""
        return ""


@dataclass(kw_only=True)
class TrainingRun(Run):
    """The further parts of reinforcement learning."""

    minibatches: int
    mask_truncated: bool
    keep_zero_advantages: bool
    """Whether groups without an advantage are trained on too, as a KL term needs."""
    checks: Sequence[Check]
    advantage: Advantage
    report: StepReport

    def conclusion(self) -> str:
        """A sentence for the end of a run that learnt nothing; empty for any other."""
        return self.report.alarms.learning.conclusion()

    def check(self, step: int, rollout: RolloutBatch) -> Metrics:
        """Runs all checks; returns their metrics."""
        return {name: value for check in self.checks for name, value in check(step, rollout).items()}

    def log(
        self,
        step: int,
        rollout: RolloutBatch,
        batches: tuple[Batch, Batch],
        updates: list[UpdateStats | None],
        further: Mapping[str, float],
    ) -> str:
        """Writes the step's report; returns its console line. `batches` are the one with the responses that
        this process sampled and the one that it trained on."""
        sampled, trained = batches
        records = StepRecords(
            rollout=rollout,
            advantages=sampled.mean_advantages(),
            updates=updates,
            origins=[minibatch.origins for minibatch in trained.split()],
            seconds=self.seconds | dict(rollout.seconds),
            further=further,
            shortages=self.policy.memory.shortages,
            tokens_per_microbatch=self.policy.memory.tokens,
        )
        return self.report.write(step, records)
