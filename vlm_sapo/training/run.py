"""A run under way: what the loops work with, and what they leave in the run's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlm_sapo.data.stream import Mixture
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.curves import draw_curves
from vlm_sapo.reporting.folder import RunFolder
from vlm_sapo.training import checkpoint
from vlm_sapo.training.batch import MiniBatch
from vlm_sapo.training.loss import PolicyLoss
from vlm_sapo.training.parity import ParityError
from vlm_sapo.training.policy import Policy
from vlm_sapo.training.rollouts import Drawn, Rollouts
from vlm_sapo.types import Example, Group, Prompt

FINISHED = "this run is finished; start it anew with run.overwrite=true, or choose another run.dir"


MANY = 0.25
"""Share of responses cut or without an answer from which an evaluation says so."""
HELD_OUT = "held-out"
"""Name of the evaluation on `eval.data`."""


@dataclass
class Evaluator:
    """Measures the model and keeps results and samples in the run's folder; does nothing without anything to
    measure on."""

    measures: dict[str, Callable[[Path], tuple[dict, list[dict]]]]
    """By name, what evaluates into a folder."""
    every: int
    folder: RunFolder
    console: Console
    ready: Callable[[], None]
    """Gives the engine the present weights."""

    def at(self, step: int, *, last: int) -> None:
        """Evaluates before the first step, every so many steps and after the last one, once each."""
        due = step in (0, last) or (self.every and step % self.every == 0)
        if not due:
            return
        done = {(record["step"], record["name"]) for record in self.folder.read("evaluations.jsonl")}
        folder = self.folder.path / "evaluations" / f"step_{step:06d}"
        if not any(key[0] == step for key in done):
            shutil.rmtree(folder, ignore_errors=True)
        for name, run in self.measures.items():
            if (step, name) not in done:
                self.ready()
                result, records = run(folder)
                self.folder.append("evaluations.jsonl", {"step": step, "name": name} | result)
                self._say(f"{name} pass@1 after {step} steps", result, records)

    def _say(self, title: str, result: dict, records: list[dict]) -> None:
        low, high = result["ci95"]
        self.console.say(
            f"{title}: {result['pass@1']:.3f}  (95 % interval {low:.3f} to {high:.3f}, "
            f"{result['n']} problems, {result['response_tokens']:.1f} tokens per response)"
        )
        if result["truncated"] > MANY or result["no_answer"] > MANY:
            self.console.warn(
                f"{result['truncated']:.0%} of these responses were cut at the length limit, "
                f"{result['no_answer']:.0%} state no answer"
            )
        self.console.samples(records[:3])


@dataclass
class Core:
    """What `train` and `sft` have in common. Close it in the end."""

    folder: RunFolder
    console: Console
    policy: Policy
    stream: Mixture
    encode: Callable[[Example], Prompt]
    evaluator: Evaluator
    progress: checkpoint.Progress
    checkpoint_every: int
    keep: int
    rollouts: Rollouts

    def close(self) -> None:
        """Ends what runs beside this process."""
        self.rollouts.close()

    @contextmanager
    def rescuing(self, drawn: Drawn | None = None) -> Iterator[None]:
        """Writes a checkpoint of the finished steps where the block, which lies between two, fails. `drawn`
        was given out and not trained on; what an engine drew that disagrees is drawn anew."""
        try:
            yield
        except Exception as error:
            if self.progress.step and checkpoint.latest_step(self._checkpoints) != self.progress.step:
                if drawn is None:
                    state = self.rollouts.state()
                elif isinstance(error, ParityError):
                    state = {"stream": drawn.before}
                else:
                    state = self.rollouts.untrained(drawn)
                self.save_checkpoint(state)
                self.console.say(f"a checkpoint after {self.progress.step} steps is in {self._checkpoints}")
            raise

    def checkpoint_if_due(self, step: int) -> None:
        """Writes a checkpoint after every so many steps."""
        if self.checkpoint_every and step % self.checkpoint_every == 0:
            self.save_checkpoint(self.rollouts.state())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes a checkpoint with this state of the rollouts."""
        checkpoint.save(self._checkpoints, self.policy, self.progress, state, keep=self.keep)

    @property
    def _checkpoints(self) -> Path:
        return self.folder.path / "checkpoints"

    def finish(self, steps: int) -> dict:
        """Writes `final/`, `curves.png` and `summary.json`; returns the summary."""
        self.policy.save(self.folder.path / "final")
        evaluations = self.folder.read("evaluations.jsonl")
        draw_curves(self.folder.path / "curves.png", self.folder.read("metrics.jsonl"), evaluations)
        summary: dict = {"steps": steps, "seconds": round(self.progress.seconds, 1)}
        for name, step in (("eval_before", 0), ("eval_after", steps)):
            found = [record for record in evaluations if record["step"] == step]
            for place, record in enumerate(found):
                short = {key: record[key] for key in ("pass@1", "ci95", "n")}
                summary[f"{name}/{record['name']}" if place else name] = short
        if self.stream.skipped:
            summary["rows_skipped"] = self.stream.skipped
        self.folder.replace("summary.json", json.dumps(summary, indent=2) + "\n")
        self.console.say(
            f"done: {steps} steps in {summary['seconds']} s; everything is in {self.folder.path}"
        )
        return summary


@dataclass
class Training:
    """What the loop of `train` works with."""

    core: Core
    checks: Sequence[Callable[[int, Drawn], dict[str, float]]]
    """Look at a step's groups before anything is trained on them; they return metrics."""
    advantage: Callable[[torch.Tensor], torch.Tensor]
    loss: PolicyLoss
    split: Callable[..., list[MiniBatch]]
    """(groups, advantages, layout=...) to mini-batches."""
    minibatches: int
    log_rollouts: Callable[[int, list[Group], list[torch.Tensor]], None]

    def check(self, step: int, drawn: Drawn) -> dict[str, float]:
        """All checks."""
        return {name: value for check in self.checks for name, value in check(step, drawn).items()}


def write_rollouts(
    folder: RunFolder, count: int, step: int, groups: list[Group], advantages: list[torch.Tensor]
) -> None:
    """Adds the first `count` groups of a step to `rollouts.jsonl`, a line per response."""
    for group, values in zip(groups[:count], advantages[:count], strict=True):
        for completion, score, value in zip(group.completions, group.scores, values.tolist(), strict=True):
            folder.append(
                "rollouts.jsonl",
                {
                    "step": step,
                    "id": group.prompt.example.id,
                    "task": group.prompt.example.task,
                    "problem": group.prompt.example.problem,
                    "answer": group.prompt.example.answer,
                    "response": completion.text,
                    "reward": score.total,
                    "parts": dict(score.parts),
                    "outcomes": dict(score.outcomes),
                    "advantage": value,
                    "tokens": len(completion.ids),
                    "finish": completion.finish,
                },
            )
