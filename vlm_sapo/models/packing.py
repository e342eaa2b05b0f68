"""Layouts of responses for a forward pass: with a shared prompt, or each with its own copy.

[B] rows, [L] tokens of a row, [N] responses, [T] tokens of the longest response, [K] response tokens in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from vlm_sapo.models.attention import PackedGroup, Segments
from vlm_sapo.types import ImageInputs, Prompt, Response

Sizes = tuple[int, list[int]]
"""Length of a prompt, and lengths of its responses."""
Part = tuple[int, list[int]]
"""A group's index and the indices of some of its responses."""


@dataclass(frozen=True)
class GroupSlice:
    """A prompt with some of its responses."""

    prompt: Prompt
    responses: tuple[Response, ...]

    @property
    def sizes(self) -> Sizes:
        return len(self.prompt.ids), [len(response.ids) for response in self.responses]


@dataclass(frozen=True)
class Inputs:
    """Inputs of one forward pass, with the indices of the positions that predict response tokens.

    [K] tokens of all responses, [S] of them sampled by the policy.
    """

    prompts: list[Prompt]
    """The prompts in the rows, in order."""
    images: list[Prompt | ImageInputs]
    """What has the images in the rows, in order."""
    ids: torch.Tensor
    """[B, L] int64."""
    mask: torch.Tensor | None
    """[B, L] int64, 1 on tokens and 0 on padding; None for a packed row."""
    positions: torch.Tensor
    """[3, B, L] int64, rotary positions."""
    segments: Segments | None
    """The groups of a packed row."""
    predicting: torch.Tensor
    """[K] int64, the index in the flattened rows of the token before each response token."""
    prompting: torch.Tensor
    """[P of all `prompts`] int64, the indices of their tokens in the flattened rows."""
    response_mask: torch.Tensor
    """[N, T] bool, with K true entries."""
    scoring: torch.Tensor
    """[S] int64, the entries of `predicting` that are before a sampled token."""
    targets: torch.Tensor
    """[S] int64, the sampled tokens, response after response."""
    sampled_mask: torch.Tensor
    """[N, T] bool, with S true entries."""

    def to(self, device: torch.device) -> Inputs:
        moved = {
            name: value.to(device) if isinstance(value, torch.Tensor | Segments) else value
            for name, value in vars(self).items()
        }
        return Inputs(**moved)


class Layout(Protocol):
    """A way to lay out responses."""

    name: str

    def pack(self, groups: Sequence[Sizes], budget: int) -> list[list[Part]]:
        """Micro-batches of at most `budget` tokens each, padding included; a longer row gets its own."""

    def size(self, groups: Sequence[GroupSlice]) -> int:
        """Tokens of a micro-batch, padding included."""

    def costs(self, sizes: Sizes) -> Sizes:
        """Tokens that go through the model for a group: once for each process that has some of its responses,
        and for each response."""

    def inputs(self, groups: Sequence[GroupSlice]) -> Inputs:
        """The responses of a micro-batch, in the order of the groups."""


class SharedPrefix:
    """One packed row: each prompt once, followed by its branches. No padding."""

    name = "shared prefix"

    def pack(self, groups: Sequence[Sizes], budget: int) -> list[list[Part]]:
        """Splits groups over the budget, repeating their prompt; then first fit, largest part first."""
        parts: list[tuple[int, Part]] = []
        for index, (prompt, responses) in enumerate(groups):
            order = sorted(range(len(responses)), key=lambda row: -responses[row])
            for rows, used in _first_fit([(responses[row], row) for row in order], budget - prompt):
                parts.append((prompt + used, (index, sorted(rows))))
        parts.sort(key=lambda part: -part[0])
        return [bin_ for bin_, _ in _first_fit(parts, budget)]

    def size(self, groups: Sequence[GroupSlice]) -> int:
        return sum(prompt + sum(responses) for prompt, responses in (group.sizes for group in groups))

    def costs(self, sizes: Sizes) -> Sizes:
        return sizes

    def inputs(self, groups: Sequence[GroupSlice]) -> Inputs:
        start, segments = 0, []
        ids, positions, predicting, prompting = [], [], [], []
        for group in groups:
            length, lengths = group.sizes
            prompting.append(torch.arange(start, start + length))
            segments.append(PackedGroup(start, length, tuple(lengths)))
            ids += [group.prompt.ids, *(response.ids for response in group.responses)]
            positions += [group.prompt.positions, *(response.positions for response in group.responses)]
            branch = start + length
            for count in lengths:
                before = torch.arange(branch - 1, branch + count - 1)
                before[0] = start + length - 1
                predicting.append(before)
                branch += count
            start = branch
        return Inputs(
            prompts=[group.prompt for group in groups],
            images=[source for group in groups for source in with_images(group.prompt, group.responses)],
            ids=torch.cat(ids)[None],
            mask=None,
            positions=torch.cat(positions, dim=1)[:, None],
            segments=Segments(tuple(segments)),
            predicting=torch.cat(predicting),
            prompting=torch.cat(prompting),
            **_scored(groups, torch.cat(predicting)),
        )


class Plain:
    """One row per response, each with its own copy of prompt and images, padded on the right."""

    name = "plain"

    def pack(self, groups: Sequence[Sizes], budget: int) -> list[list[Part]]:
        """Longest rows first, so that the rows of a micro-batch have similar lengths."""
        rows = [
            (prompt + length, group, row)
            for group, (prompt, responses) in enumerate(groups)
            for row, length in enumerate(responses)
        ]
        bins: list[list[tuple[int, int, int]]] = []
        for row in sorted(rows, key=lambda row: (-row[0], row[1:])):
            if bins and bins[-1][0][0] * (len(bins[-1]) + 1) <= budget:
                bins[-1].append(row)
            else:
                bins.append([row])
        return [[(group, [row]) for _, group, row in bin_] for bin_ in bins]

    def size(self, groups: Sequence[GroupSlice]) -> int:
        rows = [
            prompt + length for prompt, lengths in (group.sizes for group in groups) for length in lengths
        ]
        return len(rows) * max(rows)

    def costs(self, sizes: Sizes) -> Sizes:
        prompt, responses = sizes
        return 0, [prompt + length for length in responses]

    def inputs(self, groups: Sequence[GroupSlice]) -> Inputs:
        rows = [(group.prompt, response) for group in groups for response in group.responses]
        starts = torch.tensor([len(prompt.ids) for prompt, _ in rows])
        lengths = torch.tensor([len(response.ids) for _, response in rows])
        total = int((starts + lengths).max())
        ids = torch.zeros(len(rows), total, dtype=torch.long)
        positions = torch.zeros(3, len(rows), total, dtype=torch.long)
        predicting, prompting = [], []
        for row, (prompt, response) in enumerate(rows):
            start, end = len(prompt.ids), len(prompt.ids) + len(response.ids)
            ids[row, :end] = torch.cat([prompt.ids, response.ids])
            positions[:, row, :end] = torch.cat([prompt.positions, response.positions], dim=1)
            predicting.append(row * total + torch.arange(start - 1, end - 1))
            prompting.append(row * total + torch.arange(start))
        return Inputs(
            prompts=[prompt for prompt, _ in rows],
            images=[source for prompt, response in rows for source in with_images(prompt, [response])],
            ids=ids,
            mask=(torch.arange(total) < (starts + lengths)[:, None]).long(),
            positions=positions,
            segments=None,
            predicting=torch.cat(predicting),
            prompting=torch.cat(prompting),
            **_scored(groups, torch.cat(predicting)),
        )


def with_images(prompt: Prompt, responses: Sequence[Response]) -> list[Prompt | ImageInputs]:
    """What has the images of a prompt and the responses behind it, in order."""
    return [prompt, *(item for response in responses for item in response.images)]


def choose(name: str, *, shares_prefix: bool) -> Layout:
    """The layout `shared` if the model can share prompts, otherwise (or for `plain`) the plain one."""
    return SharedPrefix() if name == "shared" and shares_prefix else Plain()


def _scored(groups: Sequence[GroupSlice], predicting: torch.Tensor) -> dict[str, torch.Tensor]:
    """The fields of Inputs that say which tokens are scored."""
    responses = [response for group in groups for response in group.responses]
    lengths = torch.tensor([len(response.ids) for response in responses])
    sampled = torch.cat([response.mask for response in responses])
    return {
        "response_mask": torch.arange(int(lengths.max())) < lengths[:, None],
        "scoring": predicting[sampled],
        "targets": torch.cat([response.ids for response in responses])[sampled],
        "sampled_mask": pad_sequence([response.mask for response in responses], batch_first=True),
    }


def _first_fit(items: list[tuple[int, object]], budget: int) -> list[tuple[list, int]]:
    """Puts each item into the first bin with room; returns (items, size) of each bin. An item over the budget
    gets its own bin."""
    bins: list[tuple[list, int]] = []
    for size, item in items:
        for index, (contents, used) in enumerate(bins):
            if used + size <= budget:
                bins[index] = ([*contents, item], used + size)
                break
        else:
            bins.append(([item], size))
    return bins
