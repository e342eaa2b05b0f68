"""Shuffled, endless, resumable orders of prompts, mixed, and spread over processes."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from vlm_sapo.distributed import World
from vlm_sapo.types import Example, Prompt, RowError


class PromptStream:
    """Gives out rows epoch after epoch, each epoch in an order of its own that depends on the seed alone.

    `position` counts the rows given out so far: setting it resumes the order. With `skip` bad rows are
    counted in `skipped` and left out.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encode: Callable[[Example], Prompt],
        *,
        seed: Any,
        skip: bool = False,
    ):
        self.examples, self.encode, self.seed, self.skip = examples, encode, seed, skip
        self.position = 0
        self.skipped = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def next(self) -> int:
        """The next row."""
        epoch, offset = divmod(self.position, len(self.examples))
        if self._order[0] != epoch:
            order = list(range(len(self.examples)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        self.position += 1
        return self._order[1][offset]

    def prompt(self, row: int) -> Prompt:
        """The prompt of a row, out of turn."""
        return self.encode(self.examples[row])


class TaskMixture:
    """Draws from the streams of several tasks so that each mini-batch holds every task's share.

    A task's count in a mini-batch is its share of it rounded up or down; what rounding leaves over is
    settled in the next ones, so the shares of a run are exact. `shares` sum to 1. Every process of `world`
    goes through the same rows, and encodes those at its own places alone.
    """

    def __init__(
        self,
        streams: Mapping[str, PromptStream],
        shares: Mapping[str, float],
        *,
        minibatch: int,
        world: World | None = None,
    ):
        self.streams, self.shares, self.minibatch = dict(streams), dict(shares), minibatch
        self.world = world or World()
        self.drawn = dict.fromkeys(streams, 0)

    def __len__(self) -> int:
        return sum(len(stream.examples) for stream in self.streams.values())

    @property
    def skipped(self) -> int:
        """Rows that were left out so far."""
        return sum(stream.skipped for stream in self.streams.values())

    def tasks(self, count: int) -> list[str]:
        """The tasks of the next `count` places, one mini-batch after the other."""
        tasks: list[str] = []
        for start in range(0, count, self.minibatch):
            for task, quota in self._quotas(min(self.minibatch, count - start)).items():
                tasks += [task] * quota
        return tasks

    def next_prompts(self, tasks: Mapping[int, str]) -> dict[int, Prompt]:
        """A further prompt of the task at each place; those of this process's places. A bad row's place gets
        the next row of its task."""
        prompts: dict[int, Prompt] = {}
        failures: Counter[str] = Counter()
        while tasks:
            rows = {place: self.streams[task].next() for place, task in tasks.items()}
            bad: dict[int, str] = {}
            for place, row in rows.items():
                if self.world.is_local(place):
                    try:
                        prompts[place] = self.streams[tasks[place]].prompt(row)
                    except RowError as error:
                        if not self.streams[tasks[place]].skip:
                            raise
                        bad[place] = str(error)
            bad = {place: reason for told in self.world.all_gather(bad) for place, reason in told.items()}
            tasks = {place: task for place, task in tasks.items() if place in bad}
            for place, task in tasks.items():
                self.streams[task].skipped += 1
                failures[task] += 1
                if failures[task] >= len(self.streams[task].examples):
                    raise RowError(f"no row of {task} is left that can be used; the last one: {bad[place]}")
        return {place: prompts[place] for place in sorted(prompts)}

    def take(self, count: int) -> list[Prompt]:
        """This process's prompts of the next `count`."""
        return list(self.next_prompts(dict(enumerate(self.tasks(count)))).values())

    def state(self) -> dict[str, dict[str, int]]:
        """What `restore` needs to go on from here."""
        return {
            task: {"position": stream.position, "skipped": stream.skipped, "drawn": self.drawn[task]}
            for task, stream in self.streams.items()
        }

    def restore(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Goes on from where `state` was taken."""
        for task, saved in state.items():
            self.streams[task].position, self.streams[task].skipped = saved["position"], saved["skipped"]
            self.drawn[task] = saved["drawn"]

    @contextmanager
    def rollback_on_error(self) -> Iterator[dict[str, dict[str, int]]]:
        """Goes back to where it is now if the block fails, in this process or another. Yields that state."""
        before = self.state()
        try:
            yield before
            self.world.barrier()  # so that all processes know of a failure here, and none goes on
        except BaseException as error:
            self.restore(before)
            self.world.fail_everywhere(error)
            raise

    def _quotas(self, count: int) -> dict[str, int]:
        """How many prompts of each task come next."""
        quotas = dict.fromkeys(self.streams, 0)
        total = sum(self.drawn.values()) + count
        for _ in range(count):
            open_ = [task for task, share in self.shares.items() if quotas[task] < math.ceil(share * count)]
            task = max(open_, key=lambda task: self.shares[task] * total - self.drawn[task])
            quotas[task] += 1
            self.drawn[task] += 1
        return quotas
