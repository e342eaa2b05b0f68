"""Scored groups to mini-batches (one optimizer update each) and micro-batches (one pass through the model
each)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm_sapo.models.logprobs import Inputs, pack, pad_inputs
from vlm_sapo.types import Completion, Group, Prompt


@dataclass
class MicroBatch:
    """N responses that go through the model at once."""

    prompts: list[Prompt]
    responses: list[torch.Tensor]
    """The [R] ids of each response."""
    advantages: torch.Tensor
    """[N, 1] float32."""
    mask: torch.Tensor
    """[N, T] bool, on response tokens."""
    old: torch.Tensor | None = None
    """[N, T] float32, log-probs before the update; filled in by the policy."""
    reference: torch.Tensor | None = None
    """[N, T] float32, log-probs of the reference model, where there is one."""

    def inputs(self) -> Inputs:
        """Laid out anew for each pass: kept, every response would hold a copy of its pictures."""
        return pad_inputs(self.prompts, self.responses)

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """What the step's metrics are computed from, beside the new log-probs."""
        return {
            "old": self.old,
            "reference": self.reference,
            "advantages": self.advantages,
            "mask": self.mask,
        }


@dataclass
class MiniBatch:
    """The micro-batches of one optimizer update and the denominators of its loss."""

    micros: list[MicroBatch]
    num_sequences: int
    num_tokens: int
    index: int = 0

    @property
    def denominators(self) -> dict[str, int]:
        return {"num_sequences": self.num_sequences, "num_tokens": self.num_tokens}


def minibatches(
    groups: list[Group],
    advantages: list[torch.Tensor],
    *,
    count: int,
    budget: int,
    mask_truncated: bool = False,
) -> list[MiniBatch]:
    """Splits groups (with their [G] advantages) into `count` mini-batches of whole groups.

    Groups without variance stay in the denominators and never reach the model. With `mask_truncated`,
    responses that hit the length limit leave both the loss and the denominators. `budget` is in padded
    tokens.
    """
    size = len(groups) // count
    batches = []
    for index in range(count):
        chosen = slice(index * size, (index + 1) * size)
        batches.append(_minibatch(groups[chosen], advantages[chosen], budget, mask_truncated, index))
    return batches


def _minibatch(
    groups: list[Group], advantages: list[torch.Tensor], budget: int, mask_truncated: bool, index: int
) -> MiniBatch:
    counted: list[Completion] = []
    rows: list[tuple[Prompt, Completion]] = []
    weights: list[float] = []
    for group, values in zip(groups, advantages, strict=True):
        for completion, value in zip(group.completions, values.tolist(), strict=True):
            if mask_truncated and completion.finish == "length":
                continue
            counted.append(completion)
            if values.any():
                rows.append((group.prompt, completion))
                weights.append(value)
    return MiniBatch(
        micros=[_microbatch(rows, weights, chosen) for chosen in pack(rows, budget)],
        num_sequences=max(len(counted), 1),
        num_tokens=max(sum(len(completion.ids) for completion in counted), 1),
        index=index,
    )


def _microbatch(rows: list[tuple[Prompt, Completion]], weights: list[float], chosen: list[int]) -> MicroBatch:
    prompts, completions = zip(*(rows[index] for index in chosen), strict=True)
    lengths = torch.tensor([[len(completion.ids)] for completion in completions])
    return MicroBatch(
        prompts=list(prompts),
        responses=[completion.ids for completion in completions],
        advantages=torch.tensor([[weights[index]] for index in chosen]),
        mask=torch.arange(int(lengths.max())) < lengths,
    )
