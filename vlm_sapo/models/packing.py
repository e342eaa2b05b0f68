"""How responses are laid out for a pass through the model: with a shared prompt, or each with its own.

[B] rows, [L] tokens of a row, [N] responses, [T] tokens of the longest response, [K] response tokens in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vlm_sapo.models.attention import PackedGroup, Segments
from vlm_sapo.types import Prompt

GroupSlice = tuple[Prompt, list[torch.Tensor]]
"""A prompt with some of its responses, each [R] int64."""
Sizes = tuple[int, list[int]]
"""The lengths of a prompt and of its responses."""
Part = tuple[int, list[int]]
"""A group's index and the indices of some of its responses."""


@dataclass(frozen=True)
class Inputs:
    """What one pass reads, and where it finds the predictions of the response tokens."""

    prompts: list[Prompt]
    """The prompts whose pictures the rows hold, in order."""
    ids: torch.Tensor
    """[B, L] int64."""
    mask: torch.Tensor | None
    """[B, L] int64, 1 on tokens and 0 on padding; None for a packed row."""
    positions: torch.Tensor
    """[3, B, L] int64, rotary positions."""
    segments: Segments | None
    """The groups of a packed row."""
    predicting: torch.Tensor
    """[K] int64, the place in the flattened rows of the token before each response token."""
    prompting: torch.Tensor
    """[P of all `prompts`] int64, the places of their tokens in the flattened rows."""
    targets: torch.Tensor
    """[K] int64, the response tokens, response after response."""
    response_mask: torch.Tensor
    """[N, T] bool, with K true entries."""

    def to(self, device: torch.device) -> Inputs:
        moved = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }
        return Inputs(**moved)


class Layout(Protocol):
    """One way to lay out responses."""

    name: str

    def pack(self, groups: Sequence[Sizes], budget: int) -> list[list[Part]]:
        """Micro-batches of at most `budget` tokens each, padding included; what is longer goes alone."""

    def size(self, groups: Sequence[GroupSlice]) -> int:
        """Tokens of a micro-batch, padding included."""

    def inputs(self, groups: Sequence[GroupSlice]) -> Inputs:
        """The responses of a micro-batch, in the order of the groups."""


class SharedPrefix:
    """One packed row: each prompt once, its branches behind it. No padding."""

    name = "shared prefix"

    def pack(self, groups: Sequence[Sizes], budget: int) -> list[list[Part]]:
        """Groups over the budget are split and share their prompt as often as need be; then largest first,
        each part into the first micro-batch with room."""
        parts: list[tuple[int, Part]] = []
        for index, (prompt, responses) in enumerate(groups):
            order = sorted(range(len(responses)), key=lambda place: -responses[place])
            for chosen, used in _first_fit([(responses[place], place) for place in order], budget - prompt):
                parts.append((prompt + used, (index, sorted(chosen))))
        parts.sort(key=lambda part: -part[0])
        return [chosen for chosen, _ in _first_fit(parts, budget)]

    def size(self, groups: Sequence[GroupSlice]) -> int:
        return sum(len(prompt.ids) + sum(map(len, responses)) for prompt, responses in groups)

    def inputs(self, groups: Sequence[GroupSlice]) -> Inputs:
        start, segments = 0, []
        ids, positions, predicting, prompting = [], [], [], []
        for prompt, responses in groups:
            length, lengths = len(prompt.ids), [len(response) for response in responses]
            prompting.append(torch.arange(start, start + length))
            segments.append(PackedGroup(start, length, tuple(lengths)))
            ids += [prompt.ids, *responses]
            positions += [prompt.positions, *(_following(prompt, count) for count in lengths)]
            branch = start + length
            for count in lengths:
                places = torch.arange(branch - 1, branch + count - 1)
                places[0] = start + length - 1
                predicting.append(places)
                branch += count
            start = branch
        responses = [response for _, branches in groups for response in branches]
        return Inputs(
            prompts=[prompt for prompt, _ in groups],
            ids=torch.cat(ids)[None],
            mask=None,
            positions=torch.cat(positions, dim=1)[:, None],
            segments=Segments(tuple(segments)),
            predicting=torch.cat(predicting),
            prompting=torch.cat(prompting),
            targets=torch.cat(responses),
            response_mask=_response_mask(responses),
        )


class Plain:
    """One row a response, each with its own copy of prompt and pictures, padded on the right."""

    name = "plain"

    def pack(self, groups: Sequence[Sizes], budget: int) -> list[list[Part]]:
        """Longest rows first, so that rows of a micro-batch are alike."""
        rows = [
            (prompt + length, group, place)
            for group, (prompt, responses) in enumerate(groups)
            for place, length in enumerate(responses)
        ]
        bins: list[list[tuple[int, int, int]]] = []
        for row in sorted(rows, key=lambda row: (-row[0], row[1:])):
            if bins and bins[-1][0][0] * (len(bins[-1]) + 1) <= budget:
                bins[-1].append(row)
            else:
                bins.append([row])
        return [[(group, [place]) for _, group, place in chosen] for chosen in bins]

    def size(self, groups: Sequence[GroupSlice]) -> int:
        rows = [len(prompt.ids) + len(response) for prompt, branches in groups for response in branches]
        return len(rows) * max(rows)

    def inputs(self, groups: Sequence[GroupSlice]) -> Inputs:
        rows = [(prompt, response) for prompt, branches in groups for response in branches]
        starts = torch.tensor([len(prompt.ids) for prompt, _ in rows])
        lengths = torch.tensor([len(response) for _, response in rows])
        total = int((starts + lengths).max())
        ids = torch.zeros(len(rows), total, dtype=torch.long)
        positions = torch.zeros(3, len(rows), total, dtype=torch.long)
        predicting, prompting = [], []
        for row, (prompt, response) in enumerate(rows):
            start, end = len(prompt.ids), len(prompt.ids) + len(response)
            ids[row, :end] = torch.cat([prompt.ids, response])
            positions[:, row, :end] = torch.cat([prompt.positions, _following(prompt, len(response))], dim=1)
            predicting.append(row * total + torch.arange(start - 1, end - 1))
            prompting.append(row * total + torch.arange(start))
        responses = [response for _, response in rows]
        return Inputs(
            prompts=[prompt for prompt, _ in rows],
            ids=ids,
            mask=(torch.arange(total) < (starts + lengths)[:, None]).long(),
            positions=positions,
            segments=None,
            predicting=torch.cat(predicting),
            prompting=torch.cat(prompting),
            targets=torch.cat(responses),
            response_mask=_response_mask(responses),
        )


def choose(name: str, *, attends_fully: bool) -> Layout:
    """`plain`, or `shared` where every layer's attention can be shared."""
    return SharedPrefix() if name == "shared" and attends_fully else Plain()


def _following(prompt: Prompt, count: int) -> torch.Tensor:
    """[3, count] rotary positions of the tokens behind a prompt."""
    return (prompt.positions.max() + 1 + torch.arange(count)).expand(3, -1)


def _response_mask(responses: list[torch.Tensor]) -> torch.Tensor:
    lengths = torch.tensor([len(response) for response in responses])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def _first_fit(items: list[tuple[int, object]], budget: int) -> list[tuple[list, int]]:
    """Each item into the first bin with room; (items, size) of each bin. What is too large goes alone."""
    bins: list[tuple[list, int]] = []
    for size, item in items:
        for place, (held, used) in enumerate(bins):
            if used + size <= budget:
                bins[place] = ([*held, item], used + size)
                break
        else:
            bins.append(([item], size))
    return bins
