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
from vlm_sapo.evaluation.evaluate import SampleFile
from vlm_sapo.evaluation.thumbnails import keep_pictures
from vlm_sapo.reporting.alarms import Alarms
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.curves import draw_curves
from vlm_sapo.reporting.folder import RunFolder
from vlm_sapo.reporting.metrics import StepMeter, Trace, group_metrics, task_metrics
from vlm_sapo.rewards.boxes import Box, shown
from vlm_sapo.rewards.golds import own_verifier
from vlm_sapo.training.batch import MiniBatch
from vlm_sapo.training.checkpoint import FAILURES, Checkpoints, Progress, put_on_disk
from vlm_sapo.training.interruption import Interruption
from vlm_sapo.training.loss import PolicyLoss
from vlm_sapo.training.parity import ParityError
from vlm_sapo.training.policy import Policy
from vlm_sapo.training.rollouts import Drawn, Rollouts
from vlm_sapo.types import Example, Group, Prompt, Response
from vlm_sapo.world import Interrupted, World

FINISHED = "this run is finished; start it anew with run.overwrite=true, or choose another run.dir"


Boxes = tuple[list[Box], list[Box]]
"""Gold ones and the response's, as shares of the picture's sides."""
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
        done = self.world.from_main(lambda: self._done(step, folder))
        for name, run in self.measures.items():
            if name not in done:
                self.ready()
                samples = self.world.from_main(lambda name=name: SampleFile(folder, name))
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


@dataclass
class Core:
    """What `train` and `sft` have in common. Close it in the end."""

    folder: RunFolder
    console: Console
    policy: Policy
    stream: Mixture
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
    def rescuing(self) -> Iterator[None]:
        """Writes a checkpoint of the finished steps where the block, which lies between two, fails or is
        interrupted. What was given out and not trained on is given out again; what an engine drew that
        disagrees is drawn anew."""
        try:
            with self.interruption.at_once():
                yield
                self.world.wait()
        except Exception as error:
            if not isinstance(error, Interrupted):  # of which all know
                self.world.tell(error)
            self.checkpoints.settle()
            if self.progress.step and self.checkpoints.newest_step != self.progress.step:
                disagrees = any(self.world.gather(isinstance(error, ParityError)))
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
        return self.world.from_main(lambda: self._finish(steps, failed))

    def _finish(self, steps: int, failed: Exception | None) -> dict:
        try:
            if failed is not None:
                raise failed
            self.folder.settle()
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
        draw_curves(self.folder.path / "curves.png", self.folder.read("metrics.jsonl"), evaluations)
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
    checks: Sequence[Callable[[int, Drawn], dict[str, float]]]
    """Look at a step's groups before anything is trained on them; they return metrics."""
    advantage: Callable[[torch.Tensor], torch.Tensor]
    loss: PolicyLoss
    split: Callable[..., list[MiniBatch]]
    """(groups, advantages, layout=..., budget=...) to mini-batches."""
    report: Reporter

    def check(self, step: int, drawn: Drawn) -> dict[str, float]:
        """All checks."""
        return {name: value for check in self.checks for name, value in check(step, drawn).items()}


class Reporter:
    """Writes a step's line of metrics and of histograms, and `rollouts` groups of it, of all processes: the
    first, the last and those evenly between, since early groups are trained on while ratios are still 1."""

    def __init__(
        self,
        core: Core,
        *,
        minibatches: int,
        rollouts: int,
        alarms: Alarms,
        parts: Sequence[tuple[str, dict]],
    ):
        self.core, self.minibatches, self.rollouts, self.alarms = core, minibatches, rollouts, alarms
        self.parts = parts
        """Names and arguments of the reward's."""

    def __call__(
        self,
        step: int,
        meter: StepMeter,
        drawn: Drawn,
        advantages: Sequence[torch.Tensor],
        further: dict[str, float],
    ) -> str:
        """Returns the numbers that matter most. All processes call it."""
        world, memory = self.core.world, self.core.policy.memory
        own = [group.without_pictures() for group in drawn.groups]
        replaced = [group.without_pictures() for group in drawn.replaced]
        chosen = evenly(len(own) * world.size, self.rollouts)
        shown = [
            Shown(place, group, values.tolist(), *self._seen(original, meter))
            for place, original, group, values in zip(
                drawn.places, drawn.groups, own, advantages, strict=True
            )
            if place in chosen
        ]
        placed = list(zip(drawn.places, own, strict=True))
        told = world.collect((placed, replaced, shown, (memory.shortages, memory.budget)))
        if not told:
            return ""
        placed = sorted((item for items, *_ in told for item in items), key=lambda item: item[0])
        groups = [group for _, group in placed]
        replaced = [group for _, groups, *_ in told for group in groups]
        shown = sorted((item for _, _, items, _ in told for item in items), key=lambda item: item.place)
        record = {"step": step} | further | meter.record(drawn.seconds)
        record |= group_metrics(groups, replaced, drawn.seconds)
        record |= task_metrics(groups, replaced, self.minibatches)
        if shortages := sum(count for *_, (count, _) in told):
            budget = min(budget for *_, (_, budget) in told)
            record |= {"memory/shortages": shortages, "memory/tokens_per_microbatch": budget}
        self.core.folder.append("metrics.jsonl", record)
        self.alarms(record)
        folder = self.core.folder
        folder.append("histograms.jsonl", {"step": step, "minibatches": meter.distributions})
        for item in shown:
            for line in rollout_lines(item):
                folder.append("rollouts.jsonl", {"step": step, "place": item.place} | line)
            folder.append("traces.jsonl", {"step": step, "place": item.place} | self._trace(item))
        return headline(record)

    def _seen(self, group: Group, meter: StepMeter) -> tuple[list[str], list[Trace | None], list[Boxes]]:
        """Names of a group's pictures, which are kept, and by response what the update saw of it and its
        boxes."""
        names = keep_pictures(self.core.folder.path, group.prompt.images)
        traces = [meter.traces.get(id(completion.ids)) for completion in group.completions]
        example = group.prompt.example
        asked = [own_verifier(example, name, args) for name, args in self.parts]
        args = next((args for name, args in asked if name in ("box", "point_in_box")), None)
        if args is None:
            return names, traces, [([], [])] * len(traces)
        responses = [Response.of(group.prompt, completion) for completion in group.completions]
        return names, traces, [shown(response, example, args) for response in responses]

    def _trace(self, item: Shown) -> dict[str, list]:
        """Token by token, by response: its text, and what the update saw, nothing where it saw none."""
        tokenizer = self.core.policy.vlm.tokenizer
        found: dict[str, list] = {
            "pieces": [pieces(tokenizer, completion.ids.tolist()) for completion in item.group.completions]
        }
        for name in ("log_ratio", "effective", "entropy"):
            found[name] = [
                [float(f"{value:.4g}") for value in getattr(trace, name).tolist()] if trace else []
                for trace in item.traces
            ]
        return found


def headline(record: dict) -> str:
    """The numbers of a step that matter most, for the console."""
    cut = f" ({record['response/truncated']:.0%} cut)" if record["response/truncated"] >= 0.05 else ""
    trained = "no group with variance"
    if "policy/effective_update" in record:
        update = record["policy/effective_update"]
        trained = f"entropy {record['policy/entropy']:.3f}  effective update {update:.3f}"
    elif "policy/skipped_updates" in record:
        trained = "no update"
    return (
        f"reward {record['reward/mean']:.3f}  tokens {record['response/tokens']:.1f}{cut}  {trained}  "
        f"{record['time/step']:.1f} s ({record['rollout/tokens_per_second']:.0f} tok/s)"
    )


@dataclass(frozen=True)
class Shown:
    """A group that people look at."""

    place: int
    group: Group
    advantages: list[float]
    pictures: list[str]
    """Files of the pictures as the model saw them, small, relative to the run's folder."""
    traces: list[Trace | None]
    boxes: list[Boxes]


def evenly(count: int, wanted: int) -> set[int]:
    """So many places of 0 to count - 1, the first and the last among them."""
    if wanted < 2:
        return set(range(min(wanted, count)))
    return {round(number * (count - 1) / (wanted - 1)) for number in range(wanted)}


def pieces(tokenizer, ids: Sequence[int]) -> list[str]:
    """Text by token; of characters that several tokens spell, at the last of them."""
    found, waiting = [], []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        whole = not text.endswith("\ufffd") or len(waiting) == 4
        found.append(text if whole else "")
        waiting = [] if whole else waiting
    return found


def rollout_lines(item: Shown) -> Iterator[dict[str, Any]]:
    """A group's responses for `rollouts.jsonl`."""
    group = item.group
    rows = zip(group.completions, group.scores, item.advantages, item.boxes, strict=True)
    for completion, score, value, (golds, given) in rows:
        yield {
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
            "pictures": item.pictures,
            **({"gold_boxes": golds, "boxes": given} if golds or given else {}),
        }
