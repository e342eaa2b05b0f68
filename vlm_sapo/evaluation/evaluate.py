"""Measures a model: samples responses, scores them with training's own reward, and keeps every sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vlm_sapo.distributed import World
from vlm_sapo.evaluation.results import Measure, summarize
from vlm_sapo.evaluation.samples import SampleFile
from vlm_sapo.reporting.images import save_images
from vlm_sapo.rewards.pool import RewardPool, score_groups
from vlm_sapo.rewards.verifiers.answers import stated_answer
from vlm_sapo.rollout.engine import RolloutEngine, as_contexts
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
    """Samples `sampling.group` responses per problem and scores them; see `results.summarize` for the result.

    `batch` problems are sampled, graded and written together; what `samples` holds already is not sampled
    again. Processes of `world` share the problems. The responses to a problem depend on the seed and its row
    alone. With `skip`, unusable rows are counted as
    `skipped` and left out; otherwise they raise RowError. Returns the result and one record per problem.
    """
    world = world or World()
    missing = [row for row in range(len(examples)) if row not in samples.done]
    together = batch * world.size
    for start in range(0, len(missing), together):
        own = missing[start : start + together][world.rank :: world.size]
        rows, prompts = _prompts(examples, own, encode, skip)
        world.barrier()  # a bad row in one process must not leave the others in a model that all share
        groups = engine.generate(as_contexts(prompts), replace(sampling, slots=tuple(rows)))
        graded = score_groups(reward, prompts, groups)
        own_records = []
        for row, prompt, responses, rewards in zip(rows, prompts, groups, graded, strict=True):
            record = {"benchmark": samples.name, "row": row} | _record(prompt, responses, rewards, measure)
            own_records.append(record | {"pictures": save_images(samples.folder, prompt.images)})
        gathered = [record for records in world.all_gather(own_records) for record in records]
        samples.add(sorted(gathered, key=lambda record: record["row"]), write=world.main)
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
    prompts: dict[int, Prompt] = {}
    for row in rows:
        try:
            prompts[row] = encode(examples[row])
        except RowError:
            if not skip:
                raise
    return list(prompts), list(prompts.values())


def _record(
    prompt: Prompt, responses: Sequence[Response], rewards: Sequence[Reward], measure: Measure
) -> dict:
    example = prompt.example
    record = {
        "id": example.id,
        "problem": example.problem,
        "answer": example.answer,
        "responses": [response.text for response in responses],
        "answers": [stated_answer(response.text) for response in responses],
        "scores": [reward.parts[measure.part] for reward in rewards],
        "outcomes": [reward.outcomes[measure.part] for reward in rewards],
        "tokens": [int(response.mask.sum()) for response in responses],
        "truncated": [response.finish == "length" for response in responses],
        "columns": {name: value for name, value in example.columns.items() if _small(value)},
    }
    if measure.official:
        record["official"] = [reward.parts[measure.official] for reward in rewards]
    return record


def _small(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= LONGEST)
