"""Shuffled, endless, resumable orders of prompts, mixed over tasks and distributed over processes."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from vlm_sapo.distributed import World
from vlm_sapo.types import Example, Prompt, RowError

if TYPE_CHECKING:
    from vlm_sapo.models.encode import Encoder

Key = tuple[str, int]
"""A task and a position in its order."""


class Job(NamedTuple):
    """A prompt that is not prepared yet."""

    key: Key
    prepare: Callable[[], Prompt]
    """Reads the row, decodes its images and encodes them. Always gives the same; may run in any thread."""


class Preparation(Protocol):
    """Decides when and where prompts are prepared. What they are doesn't depend on it."""

    def prefetch(self, jobs: Sequence[Job]) -> None:
        """Says that these will be taken next, and no others that were announced before."""

    def take(self, job: Job) -> Prompt:
        """The job's prompt; raises what the job raised."""

    def close(self) -> None:
        """Ends its threads."""


class InlinePreparation:
    """Prepares a prompt when it is taken."""

    def prefetch(self, jobs: Sequence[Job]) -> None:
        pass

    def take(self, job: Job) -> Prompt:
        return job.prepare()

    def close(self) -> None:
        pass


class ThreadedPreparation:
    """Prepares announced prompts in threads, several at a time, while the caller does something else."""

    def __init__(self, threads: int):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prompts")
        self._announced: dict[Key, Future[Prompt]] = {}

    def prefetch(self, jobs: Sequence[Job]) -> None:
        before, self._announced = self._announced, {}
        for job in jobs:
            self._announced[job.key] = before.pop(job.key, None) or self._pool.submit(job.prepare)
        for future in before.values():
            future.cancel()

    def take(self, job: Job) -> Prompt:
        future = self._announced.pop(job.key, None)
        return job.prepare() if future is None else future.result()

    def close(self) -> None:
        """Waits for the prompts that are in the middle of it, a fraction of a second."""
        self._pool.shutdown(cancel_futures=True)


class PromptStream:
    """The rows of a task, epoch after epoch, each epoch in an order that depends on the seed alone.

    `position` counts the rows that were taken so far: setting it resumes the order. With `skip`, bad rows are
    counted in `skipped` and left out.
    """

    def __init__(self, examples: Sequence[Example], encode: Encoder, *, seed: Any, skip: bool = False):
        self.examples, self.encode, self.seed, self.skip = examples, encode, seed, skip
        self.position = 0
        self.skipped = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def next(self) -> int:
        """The next row's index."""
        epoch, offset = divmod(self.position, len(self.examples))
        if self._order[0] != epoch:
            order = list(range(len(self.examples)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        self.position += 1
        return self._order[1][offset]

    def prompt(self, row: int) -> Prompt:
        """The prompt of a row; does not change the position."""
        return self.encode(self.examples[row])


class TaskMixture:
    """Takes prompts from the streams of several tasks so that each mini-batch holds every task's share.

    A task's count in a mini-batch is its share rounded up or down; later mini-batches even out the rounding,
    so the shares of a run are exact. `shares` sum to 1. Every process of `world` goes through the same rows,
    and encodes only those of its own slots, as `preparation` says: a slot is a prompt's index in a step.
    """

    def __init__(
        self,
        streams: Mapping[str, PromptStream],
        shares: Mapping[str, float],
        *,
        minibatch: int,
        world: World | None = None,
        preparation: Preparation | None = None,
    ):
        self.streams, self.shares, self.minibatch = dict(streams), dict(shares), minibatch
        self.world, self.preparation = world or World(), preparation or InlinePreparation()
        self.taken = dict.fromkeys(streams, 0)
        """Prompts taken so far, by task."""

    def __len__(self) -> int:
        return sum(len(stream.examples) for stream in self.streams.values())

    @property
    def skipped(self) -> int:
        """Rows that were left out so far."""
        return sum(stream.skipped for stream in self.streams.values())

    def tasks(self, count: int) -> list[str]:
        """The tasks of the next `count` slots, one mini-batch after the other."""
        tasks: list[str] = []
        for start in range(0, count, self.minibatch):
            for task, quota in self._quotas(min(self.minibatch, count - start)).items():
                tasks += [task] * quota
        return tasks

    def next_prompts(self, tasks: Mapping[int, str]) -> dict[int, Prompt]:
        """The next prompt of each slot's task, for the slots of this process. A bad row is replaced by the
        next row of its task."""
        prompts: dict[int, Prompt] = {}
        failures: Counter[str] = Counter()
        while tasks:
            jobs = self._next_jobs(tasks)
            self.preparation.prefetch(list(jobs.values()))
            errors: dict[int, str] = {}
            for slot, job in jobs.items():
                try:
                    prompts[slot] = self.preparation.take(job)
                except RowError as error:
                    if not self.streams[tasks[slot]].skip:
                        raise
                    errors[slot] = str(error)
            errors = {slot: text for part in self.world.all_gather(errors) for slot, text in part.items()}
            tasks = {slot: task for slot, task in tasks.items() if slot in errors}
            for slot, task in tasks.items():
                self.streams[task].skipped += 1
                failures[task] += 1
                if failures[task] >= len(self.streams[task].examples):
                    raise RowError(
                        f"no row of {task} is left that can be used; the last error: {errors[slot]}"
                    )
        return {slot: prompts[slot] for slot in sorted(prompts)}

    def take(self, count: int) -> list[Prompt]:
        """This process's prompts of the next `count`."""
        return list(self.next_prompts(dict(enumerate(self.tasks(count)))).values())

    def prefetch(self, count: int) -> None:
        """Announces this process's prompts of the next `count`; takes none. If rows are skipped or replaced
        before, those that are taken differ, and are prepared when they are."""
        ahead = copy(self)
        ahead.streams = {task: copy(stream) for task, stream in self.streams.items()}
        ahead.taken = dict(self.taken)
        self.preparation.prefetch(list(ahead._next_jobs(dict(enumerate(ahead.tasks(count)))).values()))

    def close(self) -> None:
        """Ends what prepares prompts."""
        self.preparation.close()

    def state(self) -> dict[str, dict[str, int]]:
        """What `restore` needs to go on from here; checkpoints store it under these keys."""
        return {
            task: {"position": stream.position, "skipped": stream.skipped, "drawn": self.taken[task]}
            for task, stream in self.streams.items()
        }

    def epochs(self, state: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
        """Metrics at `state`: how often the rows were gone through, all of them and those of each task."""
        positions = {task: saved["position"] for task, saved in state.items()}
        metrics = {"epoch": sum(positions.values()) / len(self)}
        if len(positions) > 1:
            metrics |= {
                f"task/{task}/epoch": position / len(self.streams[task].examples)
                for task, position in positions.items()
            }
        return metrics

    def restore(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Goes on from where `state` was taken."""
        self.preparation.prefetch([])
        for task, saved in state.items():
            self.streams[task].position, self.streams[task].skipped = saved["position"], saved["skipped"]
            self.taken[task] = saved["drawn"]

    @contextmanager
    def rollback_on_error(self) -> Iterator[dict[str, dict[str, int]]]:
        """Restores the state if the block fails, in this process or another. Yields the state before it."""
        before = self.state()
        try:
            yield before
            self.world.barrier()  # so that all processes know of a failure here, and none goes on
        except BaseException as error:
            self.restore(before)
            self.world.fail_everywhere(error)
            raise

    def _next_jobs(self, tasks: Mapping[int, str]) -> dict[int, Job]:
        """Takes the next row of each slot's task. Returns the jobs of this process's slots."""
        jobs = {}
        for slot, task in tasks.items():
            stream = self.streams[task]
            key = task, stream.position
            row = stream.next()
            if self.world.is_local(slot):
                jobs[slot] = Job(key, partial(stream.prompt, row))
        return jobs

    def _quotas(self, count: int) -> dict[str, int]:
        """How many prompts of each task come next."""
        quotas = dict.fromkeys(self.streams, 0)
        total = sum(self.taken.values()) + count
        for _ in range(count):
            open_ = [task for task, share in self.shares.items() if quotas[task] < math.ceil(share * count)]
            task = max(open_, key=lambda task: self.shares[task] * total - self.taken[task])
            quotas[task] += 1
            self.taken[task] += 1
        return quotas
