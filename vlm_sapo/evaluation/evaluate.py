"""Measures a model: samples responses, scores them with training's own reward, and writes every sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from vlm_sapo.distributed import World
from vlm_sapo.evaluation.results import Measure, summarize
from vlm_sapo.evaluation.samples import SampleFile
from vlm_sapo.models.encode import Encoder
from vlm_sapo.reporting.console import ShowProgress
from vlm_sapo.reporting.images import save_images
from vlm_sapo.reporting.transcript import SaveImages, transcript
from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.rewards.verifiers.answers import stated_answer
from vlm_sapo.rollout.engine import RolloutEngine
from vlm_sapo.rollout.scoring import sample_and_score
from vlm_sapo.types import Example, Prompt, Response, Reward, RowError, Sampling

MAX_COLUMN_CHARACTERS = 200
"""Longest text of a column that is stored with a sample."""


@dataclass(frozen=True)
class Evaluation:
    """How a model is measured. `run` samples `sampling.group` responses per problem and scores them."""

    engine: RolloutEngine
    encode: Callable[[Example], Prompt]
    reward: RewardPool
    sampling: Sampling
    measure: Measure
    batch: int = 16
    """Problems that each process samples, scores and writes together."""
    skip: bool = False
    """Whether rows that can't be used are counted as `skipped`; otherwise they raise RowError."""
    world: World = field(default_factory=World)
    """The processes that share the problems. All of them call `run`."""

    def run(
        self, examples: Sequence[Example], samples: SampleFile, show: ShowProgress | None = None
    ) -> tuple[dict, list[dict]]:
        """Returns the result (see `results.summarize`) and a record per problem.

        Problems that `samples` already has are not sampled again. Responses depend only on the seed and the
        problem's row.
        """
        missing = [row for row in range(len(examples)) if row not in samples.done]
        together = self.batch * self.world.size
        for start in range(0, len(missing), together):
            own = missing[start : start + together][self.world.rank :: self.world.size]
            records = self._measure(examples, own, samples)
            gathered = [record for theirs in self.world.all_gather(records) for record in theirs]
            samples.add(sorted(gathered, key=_row), write=self.world.main)
            if show is not None:
                show(len(samples.done), "problems")
        records = [samples.done[row] for row in sorted(samples.done)]
        if not records:
            raise ValueError("no usable row is left to evaluate on; run with on_error stop to see why")
        result, skipped = summarize(records, self.measure), len(examples) - len(records)
        return result | ({"skipped": skipped} if skipped else {}), records

    def _measure(self, examples: Sequence[Example], rows: Sequence[int], samples: SampleFile) -> list[dict]:
        """Samples and scores rows; returns their records."""
        prompts = self._prompts(examples, rows)
        self.world.barrier()  # a bad row in one process must not leave the others waiting in a sharded model
        sampling = replace(self.sampling, slots=tuple(prompts))
        groups, scores = sample_and_score(self.engine, self.reward, list(prompts.values()), sampling)
        save = partial(save_images, samples.folder)
        return [
            {"benchmark": samples.name, "row": row}
            | _record(prompt, responses, rewards, self.measure)
            | _episodes(responses, self.encode, save)
            | {"pictures": save(prompt.images)}
            for (row, prompt), responses, rewards in zip(prompts.items(), groups, scores, strict=True)
        ]

    def _prompts(self, examples: Sequence[Example], rows: Sequence[int]) -> dict[int, Prompt]:
        """Prompts of the usable rows, by row."""
        prompts: dict[int, Prompt] = {}
        for row in rows:
            try:
                prompts[row] = self.encode(examples[row])
            except RowError:
                if not self.skip:
                    raise
        return prompts


def _row(record: dict) -> int:
    return record["row"]


def _record(
    prompt: Prompt, responses: Sequence[Response], rewards: Sequence[Reward], measure: Measure
) -> dict:
    example = prompt.example
    outcomes = [reward.outcomes[measure.part] for reward in rewards]
    record = {
        "id": example.id,
        "problem": example.problem,
        "answer": example.answer,
        "responses": [response.text for response in responses],
        "answers": [
            None if outcome == "no_answer" else stated_answer(response.text)
            for response, outcome in zip(responses, outcomes, strict=True)
        ],
        "scores": [reward.parts[measure.part] for reward in rewards],
        "outcomes": outcomes,
        "tokens": [int(response.mask.sum()) for response in responses],
        "truncated": [response.finish == "length" for response in responses],
        "columns": {name: value for name, value in example.columns.items() if _is_short(value)},
    }
    if measure.official:
        record["official"] = [reward.parts[measure.official] for reward in rewards]
    return record


def _episodes(
    responses: Sequence[Response], encode: Callable[[Example], Prompt], save: SaveImages
) -> dict[str, list]:
    """What happened in the environment of each response, and its turns if `encode` can decode them; empty
    without an environment."""
    if not any(response.counts for response in responses):
        return {}
    counts = {"counts": [dict(response.counts) for response in responses]}
    if not isinstance(encode, Encoder):
        return counts
    tokens = {encode.vlm.model.config.image_token_id}
    return {"turns": [transcript(response, encode.decode, save, tokens) for response in responses]} | counts


def _is_short(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= MAX_COLUMN_CHARACTERS)
