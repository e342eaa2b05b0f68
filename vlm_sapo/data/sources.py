"""Builds examples and streams from the `data` sections of a config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlm_sapo.config.data import DataConfig, RowsConfig
from vlm_sapo.data.rows import ExampleSet, open_rows
from vlm_sapo.data.stream import PromptStream, TaskMixture
from vlm_sapo.distributed import World
from vlm_sapo.plugins import resolve
from vlm_sapo.types import Example, Prompt


def build_examples(rows: RowsConfig, *, task: str | None = None) -> ExampleSet:
    """The examples of a section; `task` is their name in logs, by default the section's own."""
    transform = resolve(rows.transform, field="data.transform") if rows.transform else None
    return ExampleSet(
        open_rows(rows.source, subset=rows.subset, split=rows.split, args=rows.args),
        name=rows.source,
        columns=rows.columns,
        split=rows.split,
        keep=rows.filter,
        limit=rows.limit,
        transform=transform,
        task=task or rows.task,
        template=rows.template,
        system=rows.system,
        verifier=(rows.verifier.name, rows.verifier.args) if rows.verifier else None,
        anywhere=rows.pictures_anywhere,
    )


def build_stream(
    data: DataConfig,
    encode: Callable[[Example], Prompt],
    *,
    seed: Any,
    minibatch: int,
    world: World | None = None,
) -> TaskMixture:
    """The training rows as an endless stream, with every task's share in each mini-batch of prompts."""
    tasks = data.tasks
    total = sum(task.share for task in tasks)
    streams = {
        task.task: PromptStream(
            build_examples(task),
            encode,
            seed=f"{seed}/{task.task}" if data.mixture else seed,
            skip=data.on_error == "skip",
        )
        for task in tasks
    }
    shares = {task.task: task.share / total for task in tasks}
    return TaskMixture(streams, shares, minibatch=minibatch, world=world)
