"""Measures a model: draws responses, scores them with training's own reward, and keeps every sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vlm_sapo.distributed import World
from vlm_sapo.evaluation.results import Measure, summarize
from vlm_sapo.evaluation.samples import SampleFile
from vlm_sapo.reporting.images import save_images
from vlm_sapo.rewards.pool import RewardPool, score_groups
from vlm_sapo.rewards.verifiers.answers import stated_answer
from vlm_sapo.rollout.engine import RolloutEngine
from vlm_sapo.types import Example, Prompt, Response, Reward, RowError, Sampling

LONGEST = 200
"""Characters of a column that a sample keeps."""


def evaluate(
    engine: RolloutEngine,
    examples: Sequence[Example],
    encode: Callable[[Example], Prompt],
    reward: RewardPool,
    sampling: Sampling,
    measure: Measure,
    *,
    samples: SampleFile,
    batch: int = 16,
    skip: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    world: World | None = None,
) -> tuple[dict, list[dict]]:
    """Draws `sampling.group` responses per problem and scores them; see `results.summarize` for the result.

    `batch` problems are drawn, graded and written together; what `samples` holds already is not drawn again.
    Processes of `world` share the problems.
    The draws of a problem depend on the seed and its row alone. With `skip`, unusable rows are counted as
    `skipped` and left out; otherwise they raise RowError. Returns the result and one record per problem.
    """
    world = world or World()
    missing = [row for row in range(len(examples)) if row not in samples.done]
    together = batch * world.size
    for start in range(0, len(missing), together):
        own = missing[start : start + together][world.rank :: world.size]
        rows, prompts = _prompts(examples, own, encode, skip)
        world.barrier()  # a bad row in one process must not leave the others in a model that all share
        groups = engine.generate(prompts, replace(sampling, places=tuple(rows)))
        scored = score_groups(reward, prompts, groups)
        made = []
        for row, prompt, drawn, scores in zip(rows, prompts, groups, scored, strict=True):
            record = {"benchmark": samples.name, "row": row} | _record(prompt, drawn, scores, measure)
            made.append(record | {"pictures": save_images(samples.folder, prompt.images)})
        told = [record for records in world.all_gather(made) for record in records]
        samples.add(sorted(told, key=lambda record: record["row"]), write=world.main)
        progress(len(samples.done))
    records = [samples.done[row] for row in sorted(samples.done)]
    if not records:
        raise ValueError("no usable row is left to evaluate on; run with on_error stop to see why")
    left_out = len(examples) - len(records)
    return summarize(records, measure) | ({"skipped": left_out} if left_out else {}), records


def _prompts(
    examples: Sequence[Example], rows: Sequence[int], encode: Callable, skip: bool
) -> tuple[list[int], list[Prompt]]:
    """The usable ones of the rows, and their prompts."""
    found: dict[int, Prompt] = {}
    for row in rows:
        try:
            found[row] = encode(examples[row])
        except RowError:
            if not skip:
                raise
    return list(found), list(found.values())


def _record(
    prompt: Prompt, completions: Sequence[Response], scores: Sequence[Reward], measure: Measure
) -> dict:
    example = prompt.example
    record = {
        "id": example.id,
        "problem": example.problem,
        "answer": example.answer,
        "responses": [completion.text for completion in completions],
        "answers": [stated_answer(completion.text) for completion in completions],
        "scores": [score.parts[measure.part] for score in scores],
        "outcomes": [score.outcomes[measure.part] for score in scores],
        "tokens": [len(completion.ids) for completion in completions],
        "truncated": [completion.finish == "length" for completion in completions],
        "columns": {name: value for name, value in example.columns.items() if _small(value)},
    }
    if measure.official:
        record["official"] = [score.parts[measure.official] for score in scores]
    return record


def _small(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= LONGEST)
