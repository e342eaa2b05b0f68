"""What fits into a device: micro-batches that run out of memory are made smaller and run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from vlm_sapo.models.packing import Layout
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

    def fitting(
        self,
        micros: Sequence[MicroBatch],
        work: Callable[[MicroBatch], T],
        *,
        layout: Layout,
        undo: Callable[[], None] = lambda: None,
    ) -> list[tuple[MicroBatch, T]]:
        """The micro-batches, as small as they have to be, each with what `work` gives for it; `undo` takes
        back what was done for those before one that fails. Raises ValueError where one response alone is too
        much."""
        while True:
            micros = [part for micro in micros for part in micro.within(self.budget, layout)]
            done: list[tuple[MicroBatch, T]] = []
            try:
                for micro in micros:
                    done.append((micro, work(micro)))
                return done
            except torch.OutOfMemoryError as error:
                reason = str(error).partition(". ")[0]
            failed = micros[len(done)].groups
            del done
            undo()
            row, responses = failed[0][0].example.label, sum(len(given) for _, given in failed)
            self.shrink(layout.size(failed), reason, row=row if responses == 1 else None)

    def shrink(self, tokens: int, reason: str, *, row: str | None = None) -> None:
        """Less than `tokens`, which were too many, from now on. `row` is that of a single response, which
        can't be made smaller."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        remedy = "use model.gradient_checkpointing=true, model.lora, train.offload or smaller pictures"
        if not self.can_shrink:
            raise SystemExit(  # at once: the others wait for this process on their devices, not for a message
                f"error: a micro-batch of {tokens} tokens ran out of memory ({reason}), and a sharded model "
                f"can't run it in parts; set train.tokens_per_microbatch={tokens // 2}, or {remedy}"
            )
        if row is not None:
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
