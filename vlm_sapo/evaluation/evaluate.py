"""Measures a model: draws responses, scores them with training's own reward, and keeps every sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_sapo.evaluation.results import Measure, summarize
from vlm_sapo.evaluation.thumbnails import keep_pictures
from vlm_sapo.rewards.answers import stated_answer
from vlm_sapo.rewards.pool import Reward, score_groups
from vlm_sapo.rollout.engine import RolloutEngine
from vlm_sapo.types import Completion, Example, Prompt, RowError, Sampling, Score

BATCH = 64
"""Problems that are drawn, graded and written together; an interruption loses at most so many."""
LONGEST = 200
"""Characters of a column that a sample keeps."""


@dataclass
class SampleFile:
    """`samples.jsonl` of a folder: a line per problem, written batch by batch.

    `done` holds the finished batches by their first problem; a batch that was cut off in writing is dropped.
    """

    folder: Path
    name: str
    """The benchmark whose samples these are; a file may hold those of several."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "samples.jsonl"
        self.done: dict[int, list[dict]] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        whole = [record for record in map(_parsed, lines) if record is not None]
        for record in whole:
            if record["benchmark"] == self.name:
                self.done.setdefault(record["batch"][0], []).append(record)
        self.done = {start: batch for start, batch in self.done.items() if len(batch) == batch[0]["batch"][1]}
        kept = [r for r in whole if r["benchmark"] != self.name or r["batch"][0] in self.done]
        if len(kept) < len(lines):
            self.path.write_text("".join(map(_line, kept)), encoding="utf-8")

    def add(self, start: int, records: list[dict]) -> None:
        """Writes a finished batch."""
        records = [{"benchmark": self.name, **record, "batch": [start, len(records)]} for record in records]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, records)))
        self.done[start] = records


def evaluate(
    engine: RolloutEngine,
    examples: Sequence[Example],
    encode: Callable[[Example], Prompt],
    reward: Reward,
    sampling: Sampling,
    measure: Measure,
    *,
    samples: SampleFile | None = None,
    skip: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict, list[dict]]:
    """Draws `sampling.group` responses per problem and scores them; see `results.summarize` for the result.

    With `samples`, every batch is written as it is graded and batches that are there already are not drawn
    again: the draws of a problem depend on the seed and its place alone. With `skip`, unusable rows are
    counted as `skipped` and left out; otherwise they raise RowError. Returns the result and one record per
    problem.
    """
    records: list[dict] = []
    for start in range(0, len(examples), BATCH):
        if samples is None or start not in samples.done:
            indices = range(start, min(start + BATCH, len(examples)))
            rows, prompts = _prompts(examples, indices, encode, skip)
            groups = engine.generate(prompts, replace(sampling, seed=sampling.seed + start))
            scored = score_groups(reward, prompts, groups)
            made = [
                {"row": row} | _record(*item, measure)
                for row, *item in zip(rows, prompts, groups, scored, strict=True)
            ]
            if samples is not None:
                for record, prompt in zip(made, prompts, strict=True):
                    record["pictures"] = keep_pictures(samples.folder, prompt.images)
                samples.add(start, made)
            records += made
        else:
            records += samples.done[start]
        progress(len(records))
    if not records:
        raise ValueError("no usable row is left to evaluate on; run with on_error stop to see why")
    left_out = len(examples) - len(records)
    return summarize(records, measure) | ({"skipped": left_out} if left_out else {}), records


def _prompts(
    examples: Sequence[Example], indices: range, encode: Callable, skip: bool
) -> tuple[list[int], list[Prompt]]:
    """The usable rows among the indices, and their prompts."""
    found: dict[int, Prompt] = {}
    for index in indices:
        try:
            found[index] = encode(examples[index])
        except RowError:
            if not skip:
                raise
    return list(found), list(found.values())


def _record(
    prompt: Prompt, completions: Sequence[Completion], scores: Sequence[Score], measure: Measure
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


def _parsed(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
