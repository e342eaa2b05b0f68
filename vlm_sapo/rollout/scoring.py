"""Samples groups and scores them, each as soon as the engine reports it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from vlm_sapo.rewards.pool import RewardPool, Scoring, items_of
from vlm_sapo.rollout.engine import RolloutEngine
from vlm_sapo.types import Context, Prompt, Response, Reward, Sampling


@dataclass
class Stopwatch:
    """Durations by name."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds the block's duration."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


def sample_and_score(
    engine: RolloutEngine,
    reward: RewardPool,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    watch: Stopwatch | None = None,
) -> tuple[list[list[Response]], list[list[Reward]]]:
    """Each prompt's responses and their scores, as if they were scored at the end. The stopwatch gets the
    seconds of `rollout` and, of `reward`, those that scoring took longer."""
    watch = watch or Stopwatch()
    with reward.scoring() as scoring:
        contexts = [_reporting_to(scoring, prompt) for prompt in prompts]
        with watch.time("rollout"):
            groups = engine.generate(contexts, sampling)
        with watch.time("reward"):
            items = [items_of(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]
            scores = iter(scoring.results([item for group in items for item in group]))
            return groups, [[next(scores) for _ in group] for group in groups]


def _reporting_to(scoring: Scoring, prompt: Prompt) -> Context:
    """A new group of the prompt, whose responses are scored as soon as they are finished."""
    return Context(prompt, report=lambda responses: scoring.add(items_of(prompt, responses)))
