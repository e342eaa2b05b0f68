"""Runs a reward in worker processes that can be killed, with a time limit for each response."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from pickle import PicklingError
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, Literal, NamedTuple

from pebble import ProcessExpired, ProcessPool
from PIL import Image

from vlm_sapo.rewards.parts import (
    CONCURRENT,
    Item,
    Part,
    RewardError,
    Verdict,
    build_part,
    combine,
    portable,
)
from vlm_sapo.types import Prompt, Response, ResponseText, Reward

CHUNK = 16
"""Responses that built-in verifiers grade between two messages."""
CACHED = 10_000
"""Verdicts that are kept."""
KEPT = ("graded", "no_answer", "bad_gold")
"""Outcomes that another try would not change; their verdicts are kept."""
_PARTS: list[Part] = []
"""The parts of the reward, in a worker process."""
_BROKEN: list[str] = []
"""Why the parts could not be built there."""


def _ready() -> None:
    """Nothing to do."""


def _start(specs: Sequence[Mapping[str, Any]], isolated: bool) -> None:
    if isolated:
        leave_network()  # first: no process with threads can
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        _PARTS[:] = [build_part(spec, number) for number, spec in enumerate(specs)]
    except BaseException:
        _BROKEN[:] = [traceback.format_exc()]


def _end_with_parent() -> None:
    """A run that is killed leaves no process behind that computes for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _parts() -> list[Part]:
    if _BROKEN:
        raise RewardError(f"the reward cannot be set up in a process of its own:\n{_BROKEN[0]}")
    return _PARTS


def _grade_each(items: Sequence[Item]) -> list[list[Verdict]]:
    items = [with_pictures(item) for item in items]
    return [[part.grade([item])[0] for part in _parts() if part.kind == "each"] for item in items]


def _grade_part(number: int, items: Sequence[Item], timeout: float) -> list[Verdict]:
    return _parts()[number].grade([with_pictures(item) for item in items], timeout)


def score_groups(
    reward: RewardPool, prompts: Sequence[Prompt], responses: Sequence[Sequence[Response]]
) -> list[list[Reward]]:
    """Scores of each prompt's responses."""
    items = [
        (ResponseText.of(prompt, completion), prompt.example)
        for prompt, drawn in zip(prompts, responses, strict=True)
        for completion in drawn
    ]
    scores = iter(reward(items))
    return [[next(scores) for _ in drawn] for drawn in responses]


class RewardPool:
    """Scores responses by the weighted sum of its parts.

    Every response has `timeout` seconds for the parts that are called for each; one that takes longer, or
    brings its process down, scores 0 with outcome `timeout` or `crash`, and the others go on. An exception
    in a reward raises RewardError with `on_error` `stop`, since a bug must not train as "always wrong", and
    scores 0 with `zero`. Verdicts are kept by row and response.
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
        self.on_error, self.timeout = on_error, timeout
        self.isolated = all(part.builtin and part.kind != "async" for part in self.parts)
        """Whether the workers, which read what a model wrote, can do without the network."""
        self._cache: dict[tuple, list[Verdict]] = {}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["vlm_sapo.rewards.preload"])
        self._pool = ProcessPool(
            max_workers=workers or min(os.cpu_count() or 1, 8),
            initializer=_start,
            initargs=([portable(spec) for spec in specs], self.isolated),
            context=context,
        )
        self._pool.schedule(_ready)  # starts the workers, which takes seconds, in the background

    def __call__(self, items: Sequence[Item]) -> list[Reward]:
        """Scores of (response, example) pairs, in order."""
        keys = [_key(item) for item in items]
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in self._cache}
        try:
            graded = dict(zip(new, self._grade(list(new.values())), strict=True))
        except BrokenProcessPool as error:
            raise RewardError(
                "the reward's processes end as they start; they import the script that was started: what it "
                "runs must stand under `if __name__ == '__main__':`"
            ) from error
        verdicts = [graded.get(key) or self._cache[key] for key in keys]
        if len(self._cache) + len(graded) > CACHED:
            self._cache.clear()
        self._cache |= {
            key: row for key, row in graded.items() if all(verdict.outcome in KEPT for verdict in row)
        }
        return [combine(self.parts, row) for row in verdicts]

    def close(self) -> None:
        """Ends the workers."""
        self._pool.stop()
        self._pool.join()

    def _grade(self, items: list[Item]) -> list[list[Verdict]]:
        """Verdicts of every part for every item."""
        if not items:
            return []
        with TemporaryDirectory() as folder:
            if all(part.builtin for part in self.parts):
                return self._grade_sent(items, [without_pictures(item) for item in items], CHUNK)
            return self._grade_sent(items, share_pictures(items, folder), 1)

    def _grade_sent(self, items: list[Item], sent: list[Item], size: int) -> list[list[Verdict]]:
        table: list[list[Verdict]] = [[] for _ in self.parts]
        each = [number for number, part in enumerate(self.parts) if part.kind == "each"]
        starts = range(0, len(items), size) if each else ()
        chunks = [self._schedule(_grade_each, sent[start : start + size]) for start in starts]
        together = {
            number: self._schedule(
                _grade_part, number, sent, self.timeout, limit=self._limit(part, len(sent))
            )
            for number, part in enumerate(self.parts)
            if part.kind != "each"
        }
        try:
            for start, future in zip(starts, chunks, strict=True):
                rows = self._each(future, sent[start : start + size], each)
                for item, verdicts in zip(items[start:], rows, strict=False):
                    for number, verdict in zip(each, verdicts, strict=True):
                        table[number].append(self._accepted(verdict, self.parts[number], item))
            for number, future in together.items():
                verdicts = self._result(future) or self._alone(number, sent)
                table[number] = [
                    self._accepted(verdict, self.parts[number], item)
                    for item, verdict in zip(items, verdicts, strict=True)
                ]
        except BaseException:
            for future in (*chunks, *together.values()):
                future.cancel()
            raise
        return [list(verdicts) for verdicts in zip(*table, strict=True)]

    def _schedule(self, function, *args, limit: float | None = None) -> Future:
        return self._pool.schedule(function, args=args, timeout=limit or self.timeout)

    def _each(self, future: Future, items: Sequence[Item], parts: Sequence[int]) -> list[list[Verdict]]:
        """Verdicts of a chunk; where something held it up, every part gets the whole time for each response,
        so that only what hangs is lost."""
        rows = self._result(future)
        if rows is not None:
            return rows
        if len(items) > 1:
            singles = [self._schedule(_grade_each, [item]) for item in items]
            return [self._each(single, [item], parts)[0] for single, item in zip(singles, items, strict=True)]
        if len(parts) == 1:
            return [[self._lost(future)]]
        return [[self._alone(number, items)[0] for number in parts]]

    def _alone(self, number: int, items: Sequence[Item]) -> list[Verdict]:
        """One part's verdicts, each response by itself."""
        limit = self._limit(self.parts[number], 1)
        futures = [self._schedule(_grade_part, number, [item], self.timeout, limit=limit) for item in items]
        return [(self._result(future) or [self._lost(future)])[0] for future in futures]

    def _limit(self, part: Part, count: int) -> float:
        """Seconds for all responses together; an async function keeps its own limits, so this one is
        wider."""
        rounds = math.ceil(count / CONCURRENT) + 1 if part.kind == "async" else count
        return self.timeout * rounds

    @staticmethod
    def _result(future: Future) -> list | None:
        """What a task returned, None where it was stopped or its process ended; never an empty list."""
        try:
            return future.result()
        except (TimeoutError, ProcessExpired):
            return None
        except (PicklingError, TypeError, AttributeError) as error:  # functions' own errors are verdicts
            raise RewardError(
                f"a row cannot be sent to the reward's processes ({error}); its columns must be plain values"
            ) from error

    def _lost(self, future: Future) -> Verdict:
        error = future.exception()
        if isinstance(error, ProcessExpired):
            return Verdict(0.0, "crash", detail=f"the process ended with {error.exitcode}")
        return Verdict(0.0, "timeout", detail=f"over {self.timeout} s")

    def _accepted(self, verdict: Verdict, part: Part, item: Item) -> Verdict:
        if verdict.outcome == "error" and self.on_error == "stop":
            response, example = item
            shown = repr(str(response)[:300])
            last = verdict.detail.strip().splitlines()[-1]
            raise RewardError(
                f"reward {part.label}, {example.label}, response {shown}: {last}; mend the function, or set "
                f"reward.on_error=zero to score such responses 0\n{verdict.detail}"
            )
        return verdict


def _key(item: Item) -> tuple:
    """What a verdict depends on. Rows of several splits may share source and id."""
    response, example = item
    row = (example.source, example.task, example.id, example.problem, example.answer)
    return *row, str(response), response.tokens, response.resized


NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
"""CLONE_NEWUSER and CLONE_NEWNET of Linux."""


def leave_network() -> bool:
    """Takes the network from this process, where Linux lets it; returns whether it did. Only in a process
    without threads."""
    with suppress(OSError, AttributeError):
        return ctypes.CDLL(None, use_errno=True).unshare(NEW_USER | NEW_NETWORK) == 0
    return False


class PictureSize(NamedTuple):
    """Stands in for a picture where a verifier needs its size alone."""

    size: tuple[int, int]


class PictureFile(NamedTuple):
    """Stands in for a picture whose pixels lie in a file, as they are in memory."""

    path: str
    mode: str
    size: tuple[int, int]
    palette: bytes | None


def without_pictures(item: Item) -> Item:
    """The same with picture sizes in place of pictures."""
    response, example = item
    return response, replace(example, images=tuple(PictureSize(image.size) for image in example.images))


def share_pictures(items: Sequence[Item], folder: str) -> list[Item]:
    """The same with files in `folder` in place of pictures, one set for all responses to a row."""
    made: dict[int, tuple[PictureFile, ...]] = {}
    shared = []
    for response, example in items:
        if id(example) not in made:
            stem = Path(folder) / str(len(made))
            made[id(example)] = tuple(
                _write(image, f"{stem}_{number}.pixels") for number, image in enumerate(example.images)
            )
        shared.append((response, replace(example, images=made[id(example)])))
    return shared


def with_pictures(item: Item) -> Item:
    """What `share_pictures` sent, with its pictures again."""
    response, example = item
    if example.images and isinstance(example.images[0], PictureFile):
        return response, replace(example, images=_read(example.images))
    return item


def _write(image: Image.Image, path: str) -> PictureFile:
    Path(path).write_bytes(image.tobytes())
    palette = bytes(image.getpalette("RGB")) if image.mode == "P" else None
    return PictureFile(path, image.mode, image.size, palette)


@lru_cache(maxsize=4)
def _read(files: tuple[PictureFile, ...]) -> tuple[Image.Image, ...]:
    return tuple(map(_read_one, files))


def _read_one(file: PictureFile) -> Image.Image:
    image = Image.frombytes(file.mode, file.size, Path(file.path).read_bytes())
    if file.palette is not None:
        image.putpalette(file.palette)
    return image
