"""The training pass: log-probs and entropies of response tokens, and of nothing else.

[N] responses, [L] tokens of the longest prompt with its response, [T] tokens of the longest response, [V]
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlm_sapo.models.vlm import VLM
from vlm_sapo.types import Completion, Prompt

CHUNK = 2048
"""Response tokens per chunk of the output layer; bounds the logits in memory at CHUNK x V."""


@dataclass(frozen=True)
class Inputs:
    """Prompts with one response each, padded on the right."""

    ids: torch.Tensor
    """[N, L] int64."""
    mask: torch.Tensor
    """[N, L] int64, 1 on tokens and 0 on padding."""
    positions: torch.Tensor
    """[3, N, L] int64."""
    pixels: torch.Tensor | None
    """[patches, D] of all rows' pictures in order."""
    grid: torch.Tensor | None
    """[pictures, 3] int64."""
    targets: torch.Tensor
    """[N, T] int64, the response's ids, 0 on padding."""
    response_mask: torch.Tensor
    """[N, T] bool."""
    starts: torch.Tensor
    """[N] int64, the prompts' lengths: where each response starts."""

    def to(self, device: torch.device) -> Inputs:
        moved = {name: None if value is None else value.to(device) for name, value in vars(self).items()}
        return Inputs(**moved)


def pad_inputs(prompts: list[Prompt], responses: list[torch.Tensor]) -> Inputs:
    """Lays out prompts and their responses (each [R] int64) for a plain pass."""
    starts = torch.tensor([len(prompt.ids) for prompt in prompts])
    lengths = torch.tensor([len(response) for response in responses])
    rows, total, longest = len(prompts), int((starts + lengths).max()), int(lengths.max())
    ids = torch.zeros(rows, total, dtype=torch.long)
    positions = torch.zeros(3, rows, total, dtype=torch.long)
    targets = torch.zeros(rows, longest, dtype=torch.long)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = len(prompt.ids), len(prompt.ids) + len(response)
        ids[row, :start], ids[row, start:end] = prompt.ids, response
        positions[:, row, :start] = prompt.positions
        positions[:, row, start:end] = prompt.positions.max() + 1 + torch.arange(len(response))
        targets[row, : len(response)] = response
    pictured = [prompt for prompt in prompts if prompt.pixels is not None]
    return Inputs(
        ids=ids,
        mask=(torch.arange(total) < (starts + lengths)[:, None]).long(),
        positions=positions,
        pixels=torch.cat([prompt.pixels for prompt in pictured]) if pictured else None,
        grid=torch.cat([prompt.grid for prompt in pictured]) if pictured else None,
        targets=targets,
        response_mask=torch.arange(longest) < lengths[:, None],
        starts=starts,
    )


class PlainPass(nn.Module):
    """Every response with its own copy of prompt and pictures through the whole model."""

    def __init__(self, vlm: VLM, temperature: float = 1.0):
        super().__init__()
        self.vlm, self.temperature = vlm, temperature

    def forward(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [N, T] float32 of the response tokens, 0 where the mask is off."""
        hidden = self.vlm.hidden(
            ids=inputs.ids,
            positions=inputs.positions,
            mask=inputs.mask,
            pixels=inputs.pixels,
            grid=inputs.grid,
        )
        rows, columns = inputs.response_mask.nonzero(as_tuple=True)
        predicting = hidden[rows, inputs.starts[rows] + columns - 1]
        logprobs, entropies = self._score(predicting, inputs.targets[rows, columns])
        empty = logprobs.new_zeros(inputs.response_mask.shape)
        return empty.index_put((rows, columns), logprobs), empty.index_put((rows, columns), entropies)

    def _score(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        if torch.is_grad_enabled() and len(hidden) > CHUNK:
            scored = [checkpoint(self._score_chunk, *chunk, use_reentrant=False) for chunk in chunks]
        else:
            scored = [self._score_chunk(*chunk) for chunk in chunks]
        logprobs, entropies = zip(*scored, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _score_chunk(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = (self.vlm.logits(hidden) / self.temperature).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy.detach()


def pack(completions: list[tuple[Prompt, Completion]], budget: int) -> list[list[int]]:
    """Indices of the responses in micro-batches whose padded size stays within `budget` tokens.

    Longest first, so that rows of a micro-batch are alike; a response over the budget goes alone.
    """
    sizes = [len(prompt.ids) + len(completion.ids) for prompt, completion in completions]
    bins: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        if bins and sizes[bins[-1][0]] * (len(bins[-1]) + 1) <= budget:
            bins[-1].append(index)
        else:
            bins.append([index])
    return bins
