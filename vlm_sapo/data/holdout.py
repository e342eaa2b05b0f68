"""Holds rows out of training for evaluation, so that no image is on both sides."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vlm_sapo.config.data import HELD_OUT
from vlm_sapo.data.images import is_blank, pixel_digest
from vlm_sapo.data.rows import ExampleSet
from vlm_sapo.types import RowError

Row = tuple[str, int]
"""A task and the index of one of its rows."""
Mark = tuple[str, str]
"""`image` or `problem`, and a digest of it."""
ROWS_PER_CHUNK = 64
"""Rows that are read between two messages of progress."""


@dataclass(frozen=True)
class Split:
    """The indices of each task's rows that are held out, in order."""

    rows: Mapping[str, list[int]]
    images: int
    """Different images of the rows that are held out."""
    trained_images: int
    """Different images of the others; no image is counted twice."""
    unreadable: Sequence[Row] = ()
    """Rows that can't be read."""


@dataclass(frozen=True)
class TaskRows:
    """The rows of each task that are trained on, and by the name of its evaluation what is held out of it."""

    trained: Mapping[str, ExampleSet]
    held_out: Mapping[str, ExampleSet]


def apply(parts: Split | None, tasks: Mapping[str, ExampleSet], *, mixture: bool) -> TaskRows:
    """The two sides of a split. The held-out one is evaluated as `held-out`, or `held-out/TASK`."""
    if parts is None:
        return TaskRows(tasks, {})
    trained, held_out = {}, {}
    for task, examples in tasks.items():
        out, name = set(parts.rows[task]), f"{HELD_OUT}/{task}" if mixture else HELD_OUT
        trained[task] = examples.select([index for index in range(len(examples)) if index not in out])
        held_out[name] = examples.select(parts.rows[task], task=name)
    return TaskRows(trained, held_out)


def split(
    tasks: Mapping[str, ExampleSet],
    size: float,
    progress: Callable[[int], None] | None = None,
) -> Split:
    """Holds out `size` rows of each task, or this share of them if it is below 1.

    Rows that share an image stay together, whatever their task and the image's file format, and so do rows
    without images that have the same problem. The order in which such groups are held out is that of a hash
    of their content: it depends neither on a seed nor on the order of the rows. A group that would exceed the
    size is left to training. Rows that can't be read are left to training too, and don't count.
    Raises ValueError where one side would be empty, and RowError where no row of a task can be read.
    """
    for task, examples in tasks.items():
        _goal(task, len(examples), size)  # before all images are read
    marks = _marks(tasks, progress)
    readable = Counter(task for task, _ in marks)
    for task in tasks:
        if not readable[task]:
            _read_first(tasks[task])
    goals = {task: _goal(task, readable[task], size) for task in tasks}
    rows: dict[str, list[int]] = {task: [] for task in tasks}
    for task, index in _choose(_groups(marks), goals):
        rows[task].append(index)
    for task in (task for task in tasks if not rows[task]):
        raise ValueError(
            f"data.holdout ({size}) must leave rows on both sides; the {len(tasks[task])} rows of {task} "
            f"share images or problems, and no group of them has {goals[task]} rows or fewer; raise it, or "
            "give held-out rows as eval.data"
        )
    images = [
        {mark for row in side for mark in marks[row] if mark[0] == "image"} for side in _sides(rows, marks)
    ]
    unreadable = [(task, n) for task, examples in tasks.items() for n in range(len(examples))]
    unreadable = [row for row in unreadable if row not in marks]
    return Split({task: sorted(indices) for task, indices in rows.items()}, *map(len, images), unreadable)


def _choose(groups: Sequence[Sequence[Row]], goals: Mapping[str, int]) -> list[Row]:
    """The rows of the first groups that stay within the goals. Groups of several tasks come first, up to
    their part of one of their tasks' rows: else a task whose rows are all tied to another's might get
    none."""
    sizes = [Counter(task for task, _ in group) for group in groups]
    totals = sum(sizes, Counter())
    kinds: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, size in enumerate(sizes):
        kinds[tuple(sorted(size))].append(number)
    counts: Counter[str] = Counter()
    selected: dict[int, None] = {}

    def take(numbers: Sequence[int], parts: Mapping[str, float]) -> None:
        taken: Counter[str] = Counter()
        for number in (number for number in numbers if number not in selected):
            size = sizes[number]
            fits = all(counts[task] + rows <= goals[task] for task, rows in size.items())
            if fits and any(taken[task] < parts[task] for task in size):
                selected[number] = None
                counts.update(size)
                taken.update(size)

    for tasks in sorted(kinds, key=lambda tasks: (-len(tasks), tasks)):
        rows = sum((sizes[number] for number in kinds[tasks]), Counter())
        take(kinds[tasks], {task: goals[task] * rows[task] / totals[task] for task in tasks})
    take(range(len(groups)), goals)
    return [row for number in selected for row in groups[number]]


def _sides(
    rows: Mapping[str, Sequence[int]], marks: Mapping[Row, Sequence[Mark]]
) -> tuple[set[Row], set[Row]]:
    """The rows that are held out and the others."""
    first = {(task, index) for task, indices in rows.items() for index in indices}
    return first, marks.keys() - first


def _goal(task: str, count: int, size: float) -> int:
    """Rows of a task to hold out. Raises ValueError where one side would have none."""
    goal = int(size) if size >= 1 else round(size * count)
    if not 0 < goal < count:
        remedy = f"use a number from 1 to {count - 1}" if count > 1 else "give held-out rows as eval.data"
        raise ValueError(
            f"data.holdout ({size}) must leave rows on both sides; of {task}'s {count} it would hold out "
            f"{min(goal, count)}; {remedy}"
        )
    return goal


def _marks(tasks: Mapping[str, ExampleSet], progress: Callable[[int], None] | None) -> dict[Row, list[Mark]]:
    """By row what ties it to others: its images, or its problem where it has none. Reads every image."""
    rows = [(task, index) for task, examples in tasks.items() for index in range(len(examples))]
    marks: dict[Row, list[Mark]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(rows), ROWS_PER_CHUNK):
            chunk = rows[start : start + ROWS_PER_CHUNK]
            read = pool.map(lambda row: _marks_of(tasks[row[0]], row[1]), chunk)
            marks |= {row: own for row, own in zip(chunk, read, strict=True) if own}
            if progress is not None:
                progress(start + len(chunk))
    return marks


def _marks_of(examples: ExampleSet, index: int) -> list[Mark]:
    """A row's images, or its problem. An image of one colour, which rows without images have in some sets, is
    none. Empty for a row that can't be read."""
    try:
        example = examples[index]
    except RowError:  # it is an error when the row is trained on
        return []
    images = [image.convert("RGB") for image in example.images]
    digests = [("image", pixel_digest(image)) for image in images if not is_blank(image)]
    text = " ".join(example.problem.split())
    return digests or [("problem", hashlib.sha1(text.encode()).hexdigest())]


def _read_first(examples: ExampleSet) -> None:
    """Raises RowError if the first row can't be read."""
    _ = examples[0]


def _groups(marks: Mapping[Row, list[Mark]]) -> list[list[Row]]:
    """Rows that are tied to each other, directly or by others, in the order of a hash of all their marks."""
    by_mark: dict[Mark, list[Row]] = defaultdict(list)
    for row, own in marks.items():
        for mark in own:
            by_mark[mark].append(row)
    groups: dict[str, list[Row]] = {}
    seen: set[Mark] = set()
    for start in (mark for mark in by_mark if mark not in seen):
        seen.add(start)
        group: dict[Row, None] = {}
        tied, waiting = [start], [start]
        while waiting:
            for row in by_mark[waiting.pop()]:
                group[row] = None
                fresh = [mark for mark in dict.fromkeys(marks[row]) if mark not in seen]
                seen.update(fresh)
                tied += fresh
                waiting += fresh
        key = "".join(digest for _, digest in sorted(tied))
        groups[hashlib.sha1(key.encode()).hexdigest()] = list(group)
    return [groups[key] for key in sorted(groups)]
