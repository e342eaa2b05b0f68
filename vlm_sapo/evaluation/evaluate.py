"""Measures a model: draws responses, scores them with training's own reward, and gives an interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from vlm_sapo.rewards.pool import Reward, score_groups
from vlm_sapo.rollout.engine import RolloutEngine
from vlm_sapo.types import Example, Prompt, RowError, Sampling

RESAMPLES = 2000


def evaluate(
    engine: RolloutEngine,
    examples: Sequence[Example],
    encode: Callable[[Example], Prompt],
    reward: Reward,
    sampling: Sampling,
    *,
    part: str,
    batch: int = 64,
    skip: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict, list[dict]]:
    """`pass@1`: the mean of a reward part over `sampling.group` samples per problem; with `ci95` and `n`.

    With `skip`, unusable rows are counted as `skipped` and left out; otherwise they raise RowError.
    Returns the result and one record per problem: id, problem, answer, scores and first response.
    """
    records: list[dict] = []
    for start in range(0, len(examples), batch):
        prompts = _prompts(examples, range(start, min(start + batch, len(examples))), encode, skip)
        groups = engine.generate(prompts, replace(sampling, seed=sampling.seed + start))
        scored = score_groups(reward, prompts, groups)
        for prompt, completions, scores in zip(prompts, groups, scored, strict=True):
            example = prompt.example
            records.append(
                {
                    "id": example.id,
                    "problem": example.problem,
                    "answer": example.answer,
                    "response": completions[0].text,
                    "scores": [score.parts[part] for score in scores],
                    "tokens": [len(completion.ids) for completion in completions],
                    "truncated": [completion.finish == "length" for completion in completions],
                }
            )
        progress(len(records))
    if not records:
        raise ValueError("eval.data has no usable row; run with data.on_error=stop to see why")
    left_out = len(examples) - len(records)
    return summarize(records) | ({"skipped": left_out} if left_out else {}), records


def _prompts(examples: Sequence[Example], indices: range, encode: Callable, skip: bool) -> list[Prompt]:
    prompts = []
    for index in indices:
        try:
            prompts.append(encode(examples[index]))
        except RowError:
            if not skip:
                raise
    return prompts


def summarize(records: list[dict]) -> dict:
    """The result of a list of records."""
    means = np.array([np.mean(record["scores"]) for record in records])
    return {
        "pass@1": float(means.mean()),
        "ci95": bootstrap(means),
        "n": len(records),
        "samples": len(records[0]["scores"]),
        "response_tokens": float(np.mean([n for record in records for n in record["tokens"]])),
        "truncated": float(np.mean([cut for record in records for cut in record["truncated"]])),
    }


def bootstrap(means: np.ndarray) -> list[float]:
    """95 % percentile interval of the mean over problems ([n] problem means), 2000 resamples, fixed seed."""
    draws = np.random.default_rng(0).integers(0, len(means), (RESAMPLES, len(means)))
    low, high = np.quantile(means[draws].mean(1), [0.025, 0.975])
    return [float(low), float(high)]
