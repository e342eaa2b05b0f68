"""Shuffled, endless, resumable orders of prompts, alone and mixed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_sapo.types import Example, Prompt, RowError


class PromptStream:
    """Draws prompts epoch after epoch, each epoch in an order of its own that depends on the seed alone.

    `position` counts the rows drawn so far: setting it resumes the order. With `skip` a bad row is counted in
    `skipped` and left out; otherwise its error is raised.
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

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        prompts: list[Prompt] = []
        failed = 0
        while len(prompts) < count:
            index = self._index(self.position)
            self.position += 1
            try:
                prompts.append(self.encode(self.examples[index]))
                failed = 0
            except RowError:
                if not self.skip:
                    raise
                self.skipped += 1
                failed += 1
                if failed >= len(self.examples):
                    raise
        return prompts

    def prompt(self, row: int) -> Prompt:
        """The prompt of a row, out of turn."""
        return self.encode(self.examples[row])

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.examples))
        if self._order[0] != epoch:
            order = list(range(len(self.examples)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][offset]


class Mixture:
    """Draws from the streams of several tasks so that each mini-batch holds every task's share.

    A task's count in a mini-batch is its share of it rounded up or down; what rounding leaves over is
    settled in the next ones, so the shares of a run are exact. `shares` sum to 1.
    """

    def __init__(self, streams: Mapping[str, PromptStream], shares: Mapping[str, float], *, minibatch: int):
        self.streams, self.shares, self.minibatch = dict(streams), dict(shares), minibatch
        self.drawn = dict.fromkeys(streams, 0)

    def __len__(self) -> int:
        return sum(len(stream.examples) for stream in self.streams.values())

    @property
    def skipped(self) -> int:
        """Rows that were left out so far."""
        return sum(stream.skipped for stream in self.streams.values())

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts, one mini-batch after the other."""
        prompts: list[Prompt] = []
        for start in range(0, count, self.minibatch):
            for task, quota in self._quotas(min(self.minibatch, count - start)).items():
                prompts += self.streams[task].take(quota)
        return prompts

    def replace(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """A further prompt of the same task for each of the prompts."""
        return [self.streams[prompt.example.task].take(1)[0] for prompt in prompts]

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
