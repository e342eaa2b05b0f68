"""What fits into a device: micro-batches that run out of memory are made smaller and run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from vlm_sapo.reporting.console import Console
from vlm_sapo.training.batch import MicroBatch

T = TypeVar("T")


class Memory:
    """The most tokens of a micro-batch, for the rest of the run.

    Where a pass runs out of memory its work is undone and done again with half of them: the result is the
    same, since no gradient depends on how a mini-batch is split. `can_shrink` is False where processes must
    run the same passes.
    """

    def __init__(self, budget: int, console: Console, *, can_shrink: bool = True):
        self.budget, self.console, self.can_shrink = budget, console, can_shrink
        self.shortages = 0

    def fitting(self, micros: Sequence[MicroBatch], work: Callable[[MicroBatch], T], undo=lambda: None):
        """The micro-batches, as small as they have to be, each with what `work` gives for it; `undo` takes
        back what was done for those before one that fails. Raises ValueError where one response alone is too
        much."""
        micros = list(micros)
        while micros:
            micros = [part for micro in micros for part in micro.within(self.budget)]
            try:
                return [(micro, work(micro)) for micro in micros]
            except torch.OutOfMemoryError as error:
                reason = str(error).partition(". ")[0]
            undo()
            self._shrink(max(micros, key=lambda micro: micro.num_tokens), reason)
        return []

    def _shrink(self, largest: MicroBatch, reason: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tokens, row = largest.num_tokens, largest.groups[0][0].example.label
        remedy = "use model.gradient_checkpointing=true, model.lora, train.offload or smaller pictures"
        if not self.can_shrink:
            raise ValueError(
                f"a micro-batch of {tokens} tokens ran out of memory ({reason}), and a sharded model can't "
                f"run it in parts; set train.tokens_per_microbatch={tokens // 2}, or {remedy}"
            )
        if len(largest.mask) == 1:
            raise ValueError(
                f"one response to {row}, {tokens} tokens with its prompt, does not fit into memory "
                f"({reason}); lower rollout.max_tokens, or {remedy}"
            )
        self.shortages += 1
        self.budget = min(self.budget, tokens) // 2
        self.console.warn(
            f"out of memory with {tokens} tokens ({reason}); goes on with micro-batches of {self.budget}: "
            f"set train.tokens_per_microbatch={self.budget} to save the attempts"
        )
