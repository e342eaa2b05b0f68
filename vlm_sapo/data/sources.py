"""Builds examples and streams from the `data` sections of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlm_sapo.config.data import DataConfig, RowsConfig
from vlm_sapo.data.rows import ExampleSet, open_rows
from vlm_sapo.data.stream import Preparation, PromptStream, TaskMixture
from vlm_sapo.distributed import World
from vlm_sapo.types import RowError

if TYPE_CHECKING:
    from vlm_sapo.models.encode import Encoder


def build_examples(section: RowsConfig, *, task: str | None = None) -> ExampleSet:
    """The examples of a section; `task` is their name in logs, by default the section's own."""
    rows = open_rows(
        section.source,
        subset=section.subset,
        split=section.split,
        args=section.args,
        revision=section.revision,
    )
    return ExampleSet(rows, section, task=task)


def build_tasks(data: DataConfig) -> dict[str, ExampleSet]:
    """The training rows of each task, also those that `data.holdout` holds out."""
    if not data.mixture:
        return {task.task: build_examples(task) for task in data.tasks}
    tasks = {}
    for number, task in enumerate(data.mixture):
        try:
            tasks[task.task] = build_examples(task)
        except RowError:  # it names its source
            raise
        except ValueError as error:
            raise ValueError(f"data.mixture.{number} ({task.task}): {error}") from error
    return tasks


def build_stream(
    data: DataConfig,
    encode: Encoder,
    *,
    seed: Any,
    minibatch: int,
    world: World | None = None,
    preparation: Preparation | None = None,
    examples: Mapping[str, ExampleSet] | None = None,
) -> TaskMixture:
    """The training rows as an endless stream, each mini-batch with every task's share. `examples` are the
    rows of each task, by default all."""
    tasks, examples = data.tasks, build_tasks(data) if examples is None else examples
    total = sum(task.share for task in tasks)
    streams = {
        task.task: PromptStream(
            examples[task.task],
            encode,
            seed=f"{seed}/{task.task}" if data.mixture else seed,
            skip=data.on_error == "skip",
        )
        for task in tasks
    }
    shares = {task.task: task.share / total for task in tasks}
    return TaskMixture(streams, shares, minibatch=minibatch, world=world, preparation=preparation)
