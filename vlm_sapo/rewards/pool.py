"""Runs a reward in worker processes that can be killed, with a time limit for each response."""

from __future__ import annotations

import atexit
import ctypes
import math
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from pickle import PicklingError
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, Literal, NamedTuple

import cloudpickle
from PIL import Image

from vlm_sapo.plugins import PYTHON, passing
from vlm_sapo.rewards.parts import (
    MAX_CONCURRENT_CALLS,
    Item,
    Part,
    RewardError,
    Verdict,
    build_part,
    combine,
    pickled,
    portable,
)
from vlm_sapo.rewards.verifiers.judge import check_endpoint, judge
from vlm_sapo.rewards.workers import BrokenWorkersError, Job, Workers
from vlm_sapo.search_path import library_path
from vlm_sapo.types import Prompt, Response, ResponseText, Reward

CHUNK_SIZE = 16
"""Responses that a worker grades with built-in verifiers in one task."""
UNPICKLABLE = (PicklingError, TypeError, AttributeError)
"""What pickling raises for a value that can't go to another process."""
CACHE_SIZE = 10_000
"""Verdicts that are cached."""
CACHED_OUTCOMES = ("graded", "no_answer", "outside", "bad_gold", "not_applicable")
"""Outcomes that another try would not change."""
Key = tuple
"""What a verdict depends on."""
_PARTS: list[Part] = []
"""The parts of the reward, in a worker process."""
_SETUP_ERRORS: list[str] = []
"""Why the parts could not be built there."""


def _do_nothing() -> None:
    pass


def _start_worker(
    specs: Sequence[Mapping[str, Any]],
    functions: bytes,
    isolated: bool,
    path: Sequence[str],
    variables: Mapping[str, str],
) -> None:
    sys.path[:] = path
    os.environ.update(variables)
    if isolated:
        leave_network()  # first: no process with threads can
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        with passing(cloudpickle.loads(functions)):
            _PARTS[:] = [build_part(spec, number) for number, spec in enumerate(specs)]
    except BaseException:
        _SETUP_ERRORS[:] = [traceback.format_exc()]


def _end_with_parent() -> None:
    """Ends this process with its parent, so that a killed run leaves no process that computes for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _parts() -> list[Part]:
    if _SETUP_ERRORS:
        raise RewardError(f"the reward cannot be set up in a process of its own:\n{_SETUP_ERRORS[0]}")
    return _PARTS


def _grade_each(sent: Sequence[Item] | bytes) -> list[list[Verdict]]:
    items = [load_images(item) for item in _unpacked(sent)]
    return [[part.grade([item])[0] for part in _parts() if part.kind == "each"] for item in items]


def _grade_part(sent: Sequence[Item] | bytes, number: int, timeout: float) -> list[Verdict]:
    return _parts()[number].grade([load_images(item) for item in _unpacked(sent)], timeout)


def _unpacked(sent: Sequence[Item] | bytes) -> Sequence[Item]:
    return cloudpickle.loads(sent) if isinstance(sent, bytes) else sent


def _unsendable(items: Sequence[Item], error: Exception) -> RewardError:
    """The error for items of which one can't be pickled; it names row and column if they are known."""
    columns = [
        f"{example.label}: column {name} ({type(value).__name__})"
        for _, example in items
        for name, value in example.columns.items()
        if not _can_be_pickled(value)
    ]
    return RewardError(
        f"{(columns or ['a row'])[0]} cannot be sent to the reward's processes ({error}); columns must be "
        "plain values: leave it out of the rows, or create it in the reward function"
    )


def _can_be_pickled(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except UNPICKLABLE:
        return False
    return True


def items_of(prompt: Prompt, responses: Sequence[Response]) -> list[Item]:
    """What rewards read of a prompt's responses."""
    return [(ResponseText.of(prompt, response), prompt.example) for response in responses]


class RewardPool:
    """Scores responses by the weighted sum of its parts.

    Every response has `timeout` seconds for the parts that are called per response; one that takes longer, or
    crashes its process, scores 0 with outcome `timeout` or `crash`, and the others go on. An exception in a
    reward raises RewardError with `on_error` `stop`, since a bug must not train as "always wrong", and scores
    0 with `zero`. Verdicts are cached by row and response.
    """

    def __init__(
        self,
        specs: Sequence[Mapping[str, Any]],
        *,
        on_error: Literal["stop", "zero"] = "stop",
        timeout: float = 10.0,
        workers: int | None = None,
    ):
        self.parts = [build_part(spec, number) for number, spec in enumerate(specs)]
        for number, part in enumerate(self.parts):
            if part.function is judge:
                check_endpoint(part.args, field=f"reward.parts.{number}")
        self.on_error, self.timeout = on_error, timeout
        self.compares = any(part.compares for part in self.parts)
        self.passed = any(spec["name"].startswith(PYTHON) for spec in specs)
        """Whether a Python program passed functions: what they read may be of its own classes, which only
        cloudpickle takes to another process."""
        self.isolated = all(part.builtin and part.kind != "async" for part in self.parts)
        """Whether the workers, which parse what a model wrote, run without the network."""
        self.cache: dict[Key, list[Verdict]] = {}
        """Verdicts of every part, by response."""
        path = library_path()
        setup = ([portable(spec) for spec in specs], pickled(specs), self.isolated, path, dict(os.environ))
        self._workers = Workers(_start_worker, setup, path, workers)
        atexit.register(self.close)  # before the interpreter takes the workers' locks away
        self._workers.call(_do_nothing)  # starts the workers, which takes seconds, in the background

    def __call__(self, items: Sequence[Item]) -> list[Reward]:
        """Scores of (response, example) pairs, in order."""
        with self.scoring() as scoring:
            return scoring.results(items)

    @contextmanager
    def scoring(self) -> Iterator[Scoring]:
        """Scores responses while others are still being sampled. The end of the block ends what is not
        graded yet."""
        with TemporaryDirectory() as folder:
            scoring = Scoring(self, Path(folder))
            try:
                yield scoring
            finally:
                scoring.cancel()

    def schedule(
        self, function: Callable[..., list], items: Sequence[Item], *args: Any, limit: float | None = None
    ) -> Job:
        """Runs a function on items in a worker, for at most `limit` seconds."""
        try:
            sent = cloudpickle.dumps(items) if self.passed else items
        except UNPICKLABLE as error:
            raise _unsendable(items, error) from error
        return self._workers.call(function, sent, *args, timeout=limit or self.timeout)

    def remember(self, verdicts: Mapping[Key, list[Verdict]]) -> None:
        """Caches the verdicts that another try would not change."""
        if self.compares:
            return
        if len(self.cache) + len(verdicts) > CACHE_SIZE:
            self.cache.clear()
        self.cache |= {
            key: row
            for key, row in verdicts.items()
            if all(verdict.outcome in CACHED_OUTCOMES for verdict in row)
        }

    def close(self) -> None:
        """Ends the workers."""
        atexit.unregister(self.close)
        self._workers.close()


@dataclass(eq=False)
class Task:
    """Responses that a worker grades together."""

    keys: list[Key]
    sent: list[Item]
    """The responses as they go to the worker."""
    job: Job


class Scoring:
    """The responses of one call of the engine, and what grades them.

    Parts that are called per response grade those that `add` names right away. An async part gets those that
    came while it was busy, so that no more calls run at once than with all responses in one task. A batched
    part gets all responses at the end, in their order. Scores don't depend on what was added, or when.
    """

    def __init__(self, pool: RewardPool, folder: Path):
        self.pool, self.folder = pool, folder
        self.each = [number for number, part in enumerate(pool.parts) if part.kind == "each"]
        self._cached: dict[Key, list[Verdict]] = {}
        self._sent: dict[Key, Item] = {}
        self._graded_in: dict[Key, Task] = {}
        """The task of the parts that are called per response."""
        self._rows: dict[Task, list[list[Verdict]]] = {}
        self._async: dict[int, list[Task]] = {
            number: [] for number, part in enumerate(pool.parts) if part.kind == "async"
        }
        self._tasks: list[Task] = []

    def add(self, items: Sequence[Item]) -> None:
        """Starts to grade responses; those that were added before are left out."""
        new: dict[Key, Item] = {}
        for item in items:
            key = _cache_key(item)
            if key in self.pool.cache:
                self._cached[key] = self.pool.cache[key]
            elif key not in self._sent:
                new[key] = item
        with _naming_broken_workers():
            self._start(new)

    def results(self, items: Sequence[Item]) -> list[Reward]:
        """Waits for the scores of all responses, which need not have been added; in order."""
        self.add(items)
        keys = list(map(_cache_key, items))
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in self._cached}
        with _naming_broken_workers():
            graded = self._collect(new, keys)
        self.pool.remember(graded)
        verdicts = self._cached | graded
        return [combine(self.pool.parts, verdicts[key]) for key in keys]

    def cancel(self) -> None:
        """Ends the tasks that run."""
        for task in self._tasks:
            task.job.cancel()

    def _start(self, new: Mapping[Key, Item]) -> None:
        builtin = all(part.builtin for part in self.pool.parts)
        sent = list(map(without_pixels, new.values())) if builtin else self._share_images(list(new.values()))
        self._sent |= zip(new, sent, strict=True)
        size = CHUNK_SIZE if builtin else 1
        for start in range(0, len(new), size) if self.each else ():
            task = self._schedule_each(list(new)[start : start + size])
            self._graded_in |= dict.fromkeys(task.keys, task)
        for number, tasks in self._async.items():
            if not tasks or tasks[-1].job.done():
                self._start_async(number)

    def _share_images(self, items: Sequence[Item]) -> list[Item]:
        folder = self.folder / str(len(self._sent))
        folder.mkdir(exist_ok=True)
        return share_images(items, str(folder))

    def _start_async(self, number: int) -> None:
        """Starts an async part on all responses that it doesn't have yet."""
        has = {key for task in self._async[number] for key in task.keys}
        if keys := [key for key in self._sent if key not in has]:
            self._async[number].append(self._schedule_part(number, keys))

    def _schedule_each(self, keys: list[Key]) -> Task:
        """The responses are graded one by one."""
        sent = [self._sent[key] for key in keys]
        return self._noted(keys, sent, self.pool.schedule(_grade_each, sent))

    def _schedule_part(self, number: int, keys: list[Key]) -> Task:
        """All of the responses go to one call of the part."""
        sent = [self._sent[key] for key in keys]
        limit = self._time_limit(self.pool.parts[number], len(sent))
        job = self.pool.schedule(_grade_part, sent, number, self.pool.timeout, limit=limit)
        return self._noted(keys, sent, job)

    def _noted(self, keys: list[Key], sent: list[Item], job: Job) -> Task:
        self._tasks.append(Task(keys, sent, job))
        return self._tasks[-1]

    def _collect(self, items: Mapping[Key, Item], order: list[Key]) -> dict[Key, list[Verdict]]:
        """Verdicts of every part for every response. `order` has the keys of all, equal ones included."""
        parts, keys = self.pool.parts, list(items)
        batched = {
            number: [self._schedule_part(number, order if part.compares else keys)]
            for number, part in enumerate(parts)
            if part.kind == "batched" and keys
        }
        table: dict[Key, dict[int, Verdict]] = {key: {} for key in items}
        for key, item in items.items() if self.each else ():
            for number, verdict in zip(self.each, self._row(key), strict=True):
                table[key][number] = self._stop_on_error(verdict, parts[number], item)
        for number in self._async:
            if self._async[number]:
                self._async[number][-1].job.wait()
            self._start_async(number)
        for number, tasks in sorted((self._async | batched).items()):
            verdicts = {key: verdict for task in tasks for key, verdict in self._part_verdicts(number, task)}
            for key, item in items.items():
                table[key][number] = self._stop_on_error(verdicts[key], parts[number], item)
        return {key: [row[number] for number in range(len(parts))] for key, row in table.items()}

    def _row(self, key: Key) -> list[Verdict]:
        """Verdicts of the parts that are called per response."""
        task = self._graded_in[key]
        if task not in self._rows:
            self._rows[task] = self._chunk_verdicts(task)
        return self._rows[task][task.keys.index(key)]

    def _part_verdicts(self, number: int, task: Task) -> Iterator[tuple[Key, Verdict]]:
        verdicts = self._result(task) or self._grade_singly(number, task.sent)
        return zip(task.keys, verdicts, strict=True)

    def _chunk_verdicts(self, task: Task) -> list[list[Verdict]]:
        """Verdicts of a chunk. If it timed out or crashed, every part gets the whole time for each response:
        only the verdict of the part that hangs is lost."""
        items, rows = task.sent, self._result(task)
        if rows is not None:
            return rows
        if len(items) > 1:
            singles = [self._noted([], [item], self.pool.schedule(_grade_each, [item])) for item in items]
            return [self._chunk_verdicts(single)[0] for single in singles]
        if len(self.each) == 1:
            return [[self._lost_verdict(task)]]
        return [[self._grade_singly(number, items)[0] for number in self.each]]

    def _grade_singly(self, number: int, items: Sequence[Item]) -> list[Verdict]:
        """One part's verdicts, each response in a task of its own."""
        limit, timeout = self._time_limit(self.pool.parts[number], 1), self.pool.timeout
        tasks = [
            self._noted([], [item], self.pool.schedule(_grade_part, [item], number, timeout, limit=limit))
            for item in items
        ]
        return [(self._result(task) or [self._lost_verdict(task)])[0] for task in tasks]

    def _time_limit(self, part: Part, count: int) -> float:
        """Seconds for all responses together; longer for async functions, which have a limit per call."""
        rounds = math.ceil(count / MAX_CONCURRENT_CALLS) + 1 if part.kind == "async" else count
        return self.pool.timeout * rounds

    @staticmethod
    def _result(task: Task) -> list | None:
        """What a task returned, None if it was stopped or its process ended; never an empty list."""
        try:
            return task.job.result()
        except UNPICKLABLE as error:  # a function's own errors are verdicts
            raise _unsendable([], error) from error

    def _lost_verdict(self, task: Task) -> Verdict:
        code = task.job.exit_code()
        if code is None:
            return Verdict(0.0, "timeout", detail=f"over {self.pool.timeout} s")
        return Verdict(0.0, "crash", detail=f"the process ended with {code}")

    def _stop_on_error(self, verdict: Verdict, part: Part, item: Item) -> Verdict:
        if verdict.outcome == "error" and self.pool.on_error == "stop":
            response, example = item
            last_line = verdict.detail.strip().splitlines()[-1]
            raise RewardError(
                f"reward {part.label}, {example.label}, response {str(response)[:300]!r}: {last_line}; "
                f"fix the function, or set reward.on_error=zero to score such responses 0\n{verdict.detail}"
            )
        return verdict


@contextmanager
def _naming_broken_workers() -> Iterator[None]:
    try:
        yield
    except BrokenWorkersError as error:
        raise RewardError(
            "the reward's processes end as they start; they import the script that was started, so "
            "what it runs must be under `if __name__ == '__main__':`"
        ) from error


def _cache_key(item: Item) -> Key:
    """What a verdict depends on; rows of several splits may share source and id."""
    response, example = item
    row = (example.source, example.task, example.id, example.problem, example.answer)
    return *row, str(response), response.known_tokens, response.resized, response.coordinates


NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
"""CLONE_NEWUSER and CLONE_NEWNET of Linux."""


def leave_network() -> bool:
    """Cuts this process off the network if Linux allows it; returns whether it did. Only in a process without
    threads."""
    with suppress(OSError, AttributeError):
        return ctypes.CDLL(None, use_errno=True).unshare(NEW_USER | NEW_NETWORK) == 0
    return False


class ImageSize(NamedTuple):
    """Stands for an image where a verifier needs only its size."""

    size: tuple[int, int]


class ImageFile(NamedTuple):
    """Stands for an image whose raw pixels are in a file."""

    path: str
    mode: str
    size: tuple[int, int]
    palette: bytes | None


def without_pixels(item: Item) -> Item:
    """The item with image sizes instead of images."""
    response, example = item
    return response, replace(example, images=tuple(ImageSize(image.size) for image in example.images))


def share_images(items: Sequence[Item], folder: str) -> list[Item]:
    """The items with files in `folder` instead of images, one set for all responses to a row."""
    files: dict[int, tuple[ImageFile, ...]] = {}
    shared = []
    for response, example in items:
        if id(example) not in files:
            stem = Path(folder) / str(len(files))
            files[id(example)] = tuple(
                _write(image, f"{stem}_{number}.pixels") for number, image in enumerate(example.images)
            )
        shared.append((response, replace(example, images=files[id(example)])))
    return shared


def load_images(item: Item) -> Item:
    """The item from `share_images` with its images again."""
    response, example = item
    if example.images and isinstance(example.images[0], ImageFile):
        return response, replace(example, images=_read(example.images))
    return item


def _write(image: Image.Image, path: str) -> ImageFile:
    Path(path).write_bytes(image.tobytes())
    palette = bytes(image.getpalette("RGB")) if image.mode == "P" else None
    return ImageFile(path, image.mode, image.size, palette)


@lru_cache(maxsize=4)
def _read(files: tuple[ImageFile, ...]) -> tuple[Image.Image, ...]:
    return tuple(map(_read_one, files))


def _read_one(file: ImageFile) -> Image.Image:
    image = Image.frombytes(file.mode, file.size, Path(file.path).read_bytes())
    if file.palette is not None:
        image.putpalette(file.palette)
    return image
