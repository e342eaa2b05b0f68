"""A run under way: what the loops work with, and what they leave in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vlm_sapo.data.stream import TaskMixture
from vlm_sapo.distributed import Interrupted, World
from vlm_sapo.evaluation.periodic import Evaluator
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.curves import plot_curves
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.rollout.sampler import Rollouts
from vlm_sapo.training.batch import MiniBatch
from vlm_sapo.training.checkpoint import FAILURES, Checkpoints, Progress, put_on_disk
from vlm_sapo.training.checks import ParityError
from vlm_sapo.training.interruption import Interruption
from vlm_sapo.training.loss import PolicyLoss
from vlm_sapo.training.policy import Policy
from vlm_sapo.types import Example, Prompt, RolloutBatch

FINISHED = "this run is finished; start it anew with run.overwrite=true, or choose another run.dir"


@dataclass
class Core:
    """What `train` and `sft` have in common. Close it in the end."""

    folder: RunFolder
    console: Console
    policy: Policy
    stream: TaskMixture
    encode: Callable[[Example], Prompt]
    evaluator: Evaluator
    progress: Progress
    checkpoint_every: int
    checkpoints: Checkpoints
    interruption: Interruption
    rollouts: Rollouts
    world: World

    def close(self) -> None:
        """Ends what runs beside this process."""
        self.rollouts.close()
        self.checkpoints.close()
        self.folder.close()

    def advance(self, step: int, seconds: float) -> None:
        """A step is done; it took so long."""
        self.progress.advance(step, seconds)
        self.rollouts.trained()

    @contextmanager
    def checkpoint_on_error(self) -> Iterator[None]:
        """Writes a checkpoint of the finished steps where the block, which lies between two, fails or is
        interrupted. What was given out and not trained on is given out again; what an engine drew that
        disagrees is drawn anew."""
        try:
            with self.interruption.interruptible():
                yield
                self.world.barrier()
        except Exception as error:
            if not isinstance(error, Interrupted):  # of which all know
                self.world.fail_everywhere(error)
            self.checkpoints.settle()
            if self.progress.step and self.checkpoints.newest_step != self.progress.step:
                disagrees = any(self.world.all_gather(isinstance(error, ParityError)))
                self.save_checkpoint(self.rollouts.state(anew=disagrees))
                self.console.say(
                    f"a checkpoint after {self.progress.step} steps is in {self.checkpoints.folder}"
                )
            self.checkpoints.settle()
            raise

    def checkpoint_if_due(self, step: int, *, last: int) -> None:
        """Writes a checkpoint after every so many steps, and after the last one."""
        if self.checkpoint_every and (step == last or step % self.checkpoint_every == 0):
            self.save_checkpoint(self.rollouts.state())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes a checkpoint with this state of the rollouts."""
        self.checkpoints.save(self.policy, self.progress, state)

    def finish(self, steps: int) -> dict:
        """Writes `final/`, `curves.png` and `summary.json`; returns the summary."""
        self.checkpoints.settle()
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
            put_on_disk(self.folder.path / "final")
            return self._summarize(steps)
        except FAILURES as error:
            raise ValueError(
                f"all {steps} steps are done, but the result cannot be written ({error}); the newest "
                f"checkpoint in {self.checkpoints.folder} is of step {self.checkpoints.newest_step}: make "
                "room, then start the same command again"
            ) from error

    def _summarize(self, steps: int) -> dict:
        evaluations = self.folder.read("evaluations.jsonl")
        plot_curves(self.folder.path / "curves.png", self.folder.read("metrics.jsonl"), evaluations)
        summary: dict = {"steps": steps, "seconds": round(self.progress.seconds, 1)}
        for name, step in (("eval_before", 0), ("eval_after", steps)):
            found = [record for record in evaluations if record["step"] == step]
            for place, record in enumerate(found):
                short = {key: record[key] for key in ("pass@1", "ci95", "n")}
                summary[f"{name}/{record['name']}" if place else name] = short
        if self.stream.skipped:
            summary["rows_skipped"] = self.stream.skipped
            self.console.warn(
                f"{self.stream.skipped} times a row was left out that can't be used (data.on_error=skip); "
                "vlm-sapo doctor names them"
            )
        self.folder.replace("summary.json", json.dumps(summary, indent=2) + "\n")
        self.console.say(
            f"done: {steps} steps in {summary['seconds']} s; everything is in {self.folder.path}"
        )
        return summary


@dataclass
class Training:
    """What the loop of `train` works with."""

    core: Core
    checks: Sequence[Callable[[int, RolloutBatch], dict[str, float]]]
    """Look at a step's groups before anything is trained on them; they return metrics."""
    advantage: Callable[[torch.Tensor], torch.Tensor]
    loss: PolicyLoss
    split: Callable[..., list[MiniBatch]]
    """(groups, advantages, layout=..., budget=...) to mini-batches."""
    report: Callable[..., str]
    """Writes what a step leaves, and returns the numbers that matter most."""

    def check(self, step: int, drawn: RolloutBatch) -> dict[str, float]:
        """All checks."""
        return {name: value for check in self.checks for name, value in check(step, drawn).items()}
