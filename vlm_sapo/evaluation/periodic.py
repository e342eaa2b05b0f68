"""Evaluations during a run: before the first step, every few steps, and after the last."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from vlm_sapo.data.rows import ExampleSet
from vlm_sapo.distributed import World
from vlm_sapo.evaluation.evaluate import Evaluation
from vlm_sapo.evaluation.results import OUTSIDE, Measure
from vlm_sapo.evaluation.samples import SAMPLES, SampleFile, drop_samples
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.vlm import VLM
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import EVALUATIONS, RunFolder, measured_alike
from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.rollout.sampler import Rollouts
from vlm_sapo.types import Sampling

WARNING_SHARE = 0.25
"""Share of truncated responses, or of responses without an answer, that leads to a warning."""


@dataclass(frozen=True)
class EvaluationSet:
    """A set of problems that the model is evaluated on during a run."""

    name: str
    examples: ExampleSet
    sampling: Sampling
    measure: Measure
    parts: Sequence[dict] | None = None
    """Parts of the set's own reward; None for the run's reward."""
    of_training: bool = False
    """Whether these are rows of the training data that are held out."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """The hashes by which results are compared (`measured_alike`)."""


@dataclass
class Evaluator:
    """Evaluates the model on each of `sets` and writes results and samples into the run's folder."""

    sets: Sequence[EvaluationSet]
    every: int
    folder: RunFolder
    console: Console
    vlm: VLM
    rollouts: Rollouts
    encode: Encoder
    reward: RewardPool
    skip_bad_rows: bool
    world: World

    def at(self, step: int, *, last: int) -> None:
        """Evaluates if it is due: before the first step, after every `every` steps and after the last. An
        evaluation that is already logged is not repeated."""
        due = step in (0, last) or (self.every and step % self.every == 0)
        if not due:
            return
        folder = self.folder.path / "evaluations" / f"step_{step:06d}"
        done = self.world.on_main(lambda: self._done(step, folder))
        for item in self.sets:
            if item.name not in done:
                self.rollouts.wait()
                self.rollouts.engine.sync(self.vlm)
                samples = self.world.on_main(lambda item=item: SampleFile(folder, item.name))
                result, records = self._measure(item, samples)
                record = {"step": step, "name": item.name, **result, **item.fingerprints}
                self.folder.append(EVALUATIONS, record, after=samples.lines)
                self._say(f"{item.name} pass@1 after {step} steps", result)
                if step in (0, last):
                    self.console.samples(records[:3])

    def _measure(self, item: EvaluationSet, samples: SampleFile) -> tuple[dict, list[dict]]:
        own = nullcontext(self.reward) if item.parts is None else closing(RewardPool(item.parts))
        title = f"evaluate {item.name}"
        with own as reward, self.console.progress(title, len(item.examples), lines=4) as show:
            show(0, f"problems, {item.sampling.group} responses each")
            evaluation = Evaluation(
                self.rollouts.engine,
                self.encode,
                reward,
                item.sampling,
                item.measure,
                batch=self.rollouts.engine.problems_at_once(item.sampling.group),
                skip=self.skip_bad_rows,
                world=self.world,
            )
            return evaluation.run(item.examples, samples, show)

    def _done(self, step: int, folder: Path) -> list[str]:
        """Names of the sets that are already logged for this step; without any, removes leftover samples.
        One that was measured in another way is not done: its samples are replaced."""
        logged = [record for record in self.folder.read(EVALUATIONS) if record["step"] == step]
        changed = {
            item.name
            for item in self.sets
            if (own := [record for record in logged if record["name"] == item.name])
            and not measured_alike(own[-1], item.fingerprints)
        }
        done = [record["name"] for record in logged if record["name"] not in changed]
        if not done:
            shutil.rmtree(folder, ignore_errors=True)
        elif changed and (folder / SAMPLES).is_file():
            drop_samples(folder, {*done, *(item.name for item in self.sets)} - changed)
        return done

    def _say(self, title: str, result: dict) -> None:
        low, high = result["ci95"]
        self.console.say(
            f"{title}: {result['pass@1']:.3f}  (95 % interval {low:.3f} to {high:.3f}, "
            f"{result['n']} problems, {result['response_tokens']:.1f} tokens per response{turns_of(result)})"
        )
        for warning in warnings_of(result):
            self.console.warn(warning)


def turns_of(result: dict) -> str:
    """How many turns and calls a response has, to append to a sentence; empty without an environment."""
    means = result.get("episodes", {})
    texts = [f"{means[name]:.2g} {name}" for name in ("turns", "calls") if name in means]
    return f", {', '.join(texts)} per response" if texts else ""


def warnings_of(result: dict) -> list[str]:
    """What is wrong with more than WARNING_SHARE of the responses, in words."""
    texts = {
        "truncated": "{:.0%} of these responses were truncated at the length limit",
        "no_answer": "{:.0%} of these responses have no answer that could be found",
        "outside": OUTSIDE,
    }
    return [text.format(result[key]) for key, text in texts.items() if result.get(key, 0.0) > WARNING_SHARE]
