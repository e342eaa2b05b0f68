"""Evaluations during a run: before the first step, every so many steps, and after the last."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlm_sapo.distributed import World
from vlm_sapo.evaluation.samples import SampleFile
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import RunFolder

MANY = 0.25
"""Share of responses cut or without an answer from which an evaluation says so."""

HELD_OUT = "held-out"
"""Name of the evaluation on `eval.data`."""


@dataclass
class Evaluator:
    """Measures the model and keeps results and samples in the run's folder; does nothing without anything to
    measure on."""

    measures: dict[str, Callable[[SampleFile], tuple[dict, list[dict]]]]
    """By name, what evaluates and keeps its samples."""
    every: int
    folder: RunFolder
    console: Console
    ready: Callable[[], None]
    """Gives the engine the present weights."""
    world: World

    def at(self, step: int, *, last: int) -> None:
        """Evaluates before the first step, every so many steps and after the last one, once each."""
        due = step in (0, last) or (self.every and step % self.every == 0)
        if not due:
            return
        folder = self.folder.path / "evaluations" / f"step_{step:06d}"
        done = self.world.on_main(lambda: self._done(step, folder))
        for name, run in self.measures.items():
            if name not in done:
                self.ready()
                samples = self.world.on_main(lambda name=name: SampleFile(folder, name))
                result, records = run(samples)
                record = {"step": step, "name": name} | result
                self.folder.append("evaluations.jsonl", record, after=samples.lines)
                self._say(f"{name} pass@1 after {step} steps", result, records)

    def _done(self, step: int, folder: Path) -> list[str]:
        """What this step was evaluated on already; where on nothing, its folder goes."""
        evaluations = self.folder.read("evaluations.jsonl")
        done = [record["name"] for record in evaluations if record["step"] == step]
        if not done:
            shutil.rmtree(folder, ignore_errors=True)
        return done

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
