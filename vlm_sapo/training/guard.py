"""Updates whose numbers are none are left out, kept for inspection, and end the run where they go on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from vlm_sapo.distributed import World
from vlm_sapo.reporting.console import Console
from vlm_sapo.training.batch import MicroBatch


class NumbersError(ValueError):
    """Several updates in a row would have spoilt the weights."""


class Guard:
    """Looks at every micro-batch's loss and importance ratios and at each update's gradient.

    `limit` updates in a row may be left out; one more raises NumbersError. The micro-batch at fault goes to
    `folder`, as tensors and plain values.
    """

    def __init__(self, folder: Path | None, console: Console, *, limit: int, world: World):
        self.folder, self.console, self.limit, self.world = folder, console, limit, world
        self.in_a_row = 0
        self.step = 0
        self._found: tuple[str, MicroBatch, torch.Tensor] | None = None

    def inspect(self, micro: MicroBatch, logprobs: torch.Tensor, loss: float) -> None:
        """At a micro-batch after its backward pass; log-probs [N, T]."""
        if self._found is None and (wrong := _wrong(micro, logprobs, loss)):
            self._found = wrong, micro, logprobs

    def should_skip(self, norm: float) -> bool:
        """Whether the update that these micro-batches make must be left out; `norm` is its gradient's. All
        processes call it."""
        found, self._found = self._found, None
        told = [wrong for wrong in self.world.all_gather(found and found[0]) if wrong]
        if not told and math.isfinite(norm):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        wrong = told[0] if told else f"the gradient's norm is {norm}"
        where = self._keep(*found) if found else None
        where = next((place for place in self.world.all_gather(where) if place), "")
        text = f"step {self.step}: an update is left out, since {wrong}" + (f"; see {where}" if where else "")
        if self.in_a_row > self.limit:
            raise NumbersError(
                f"{text}. It is number {self.in_a_row} in a row (train.bad_updates is {self.limit}); lower "
                "train.lr, use model.dtype=float32, or look at the rows that it names"
            )
        self.console.warn(text)
        return True

    def _keep(self, wrong: str, micro: MicroBatch, logprobs: torch.Tensor) -> str:
        """Writes a micro-batch; returns where, or nothing without a folder or room."""
        if self.folder is None:
            return ""
        path = self.folder / f"step_{self.step:06d}_process_{self.world.rank}.pt"
        held: dict[str, Any] = {
            "wrong": wrong,
            "rows": [prompt.example.label for prompt, _ in micro.groups],
            "prompts": [prompt.ids for prompt, _ in micro.groups],
            "responses": [list(responses) for _, responses in micro.groups],
            "logprobs": logprobs.cpu(),
            "old": micro.old.cpu(),
            "advantages": micro.advantages.cpu(),
            "mask": micro.mask.cpu(),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(held, path)
        except (OSError, RuntimeError) as error:
            self.console.warn(f"{path} could not be written ({error})")
            return ""
        return str(path)


def _wrong(micro: MicroBatch, logprobs: torch.Tensor, loss: float) -> str:
    """What is no finite number of a micro-batch, and in which row; or nothing."""
    mask = micro.mask.to(logprobs.device)
    ratios = torch.where(mask, (logprobs - micro.old.to(logprobs.device)).exp(), 1.0)
    if not bool((bad := ~ratios.isfinite()).any()):
        return "" if math.isfinite(loss) else f"the loss is {loss}"
    number, token = (int(place) for place in bad.nonzero()[0])
    rows = [prompt.example.label for prompt, responses in micro.groups for _ in responses]
    value = float(ratios[number, token])
    return f"the importance ratio of token {token} of a response to {rows[number]} is {value}"
