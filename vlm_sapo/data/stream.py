"""A shuffled, endless, resumable order of prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

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
        seed: int,
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

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.examples))
        if self._order[0] != epoch:
            order = list(range(len(self.examples)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][offset]
