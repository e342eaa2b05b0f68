"""Decoding states: branches that share their prompt's keys and values, or that each copy its whole state.

[B] contexts, [G] branches of each, [A] branches in the batch, [P] tokens of the longest prompt, [S] tokens of
a branch so far, [V] vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vlm_sapo.models.attention import PackedGroup, Prefix, Segments
from vlm_sapo.models.experts import ExpertRecorder, NullRecorder
from vlm_sapo.models.linear import store, stored
from vlm_sapo.models.packing import Sizes, with_images
from vlm_sapo.models.vlm import VLM
from vlm_sapo.types import Context, Response

Recorder = ExpertRecorder | NullRecorder
CACHE_BLOCK = 64
"""Tokens by which a cache grows: its keys and values are copied when it does."""
PREFILL_TOKENS = 2**14
"""Tokens of prompts and responses so far in one pass, unless a single prompt has more: its activations must
not grow with the number of prompts."""


@dataclass(frozen=True)
class Branch:
    """A response that is being generated."""

    context: int
    """Index of its context in the batch."""
    number: int
    """Its index in its group."""
    so_far: Response | None
    """The response that it continues; None at the start."""
    filler: bool = False
    """Whether it only fills the grid, because other contexts have more branches."""


@dataclass(frozen=True)
class BranchGrid:
    """The branches of a batch of contexts, in order, the same number for each."""

    contexts: Sequence[Context]
    branches: Sequence[Branch]

    @classmethod
    def of(cls, contexts: Sequence[Context], group: int) -> BranchGrid:
        """`group` new branches for each context without responses, otherwise one per response."""
        rows: list[list[Branch]] = []
        for index, context in enumerate(contexts):
            numbered = zip(context.branches, context.responses, strict=True)
            own = [Branch(index, number, response) for number, response in numbered]
            rows.append(own or [Branch(index, number, None) for number in range(group)])
        width = max(map(len, rows))
        for row in rows:
            last = row[-1]
            row += [Branch(last.context, last.number, last.so_far, filler=True)] * (width - len(row))
        return cls(contexts, [branch for row in rows for branch in row])

    @cached_property
    def sizes(self) -> list[Sizes]:
        """The lengths of each context's prompt and responses so far."""
        return [
            (len(item.prompt.ids), [len(response.ids) for response in item.responses])
            for item in self.contexts
        ]

    def split(self, tokens: int) -> Iterator[BranchGrid]:
        """Its contexts in order, in parts of at most so many tokens, or of a single context; without the
        branches."""
        part: list[Context] = []
        total = 0
        for context, (prompt, lengths) in zip(self.contexts, self.sizes, strict=True):
            total += prompt + sum(lengths)
            if part and total > tokens:
                yield BranchGrid(part, ())
                part, total = [], prompt + sum(lengths)
            part.append(context)
        yield BranchGrid(part, ())

    @cached_property
    def rows(self) -> list[tuple[int, int | None]]:
        """What is prefilled: indices of a context and one of its responses, None for the prompt alone."""
        return [
            (index, row)
            for index, context in enumerate(self.contexts)
            for row in (range(len(context.responses)) or (None,))
        ]

    @cached_property
    def sources(self) -> torch.Tensor:
        """[A] index in `rows` of what each branch continues."""
        first = list(accumulate((max(len(item.responses), 1) for item in self.contexts), initial=0))
        sources, width = [], len(self.branches) // len(self.contexts)
        for index, branch in enumerate(self.branches):
            count = len(self.contexts[branch.context].responses)
            sources.append(first[branch.context] + (min(index % width, count - 1) if count else 0))
        return torch.tensor(sources)


class DecodeState(Protocol):
    """The running branches of a grid, in order."""

    def compact(self, running: torch.Tensor) -> torch.Tensor:
        """Drops finished branches; `running` is [A] bool. Returns the indices that remain, in their new
        order; finished ones may be among them."""

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The next logits [A, V], given each branch's latest token [A] and its rotary position [A]."""


def prefill(vlm: VLM, grid: BranchGrid, recorder: Recorder) -> tuple[torch.Tensor, DecodeState]:
    """Prefills each prompt and each response so far once. Returns the logits [rows, V] of the token that
    follows each of the grid's rows, and the decoding state of its branches."""
    kind = SharedDecodeState if vlm.shares_prefix else ForkedDecodeState
    return kind.prefill(vlm, grid, recorder)


class BufferedLayer(DynamicLayer):
    """Keys and values [A, K, S, D] of a layer as the beginning of buffers with room for further tokens, which
    grow by CACHE_BLOCK tokens; transformers' own layer copies all of them for each token.

    Keys get the values' dtype: under autocast the rotary embedding makes them float32, and attention, which
    computes in that dtype, would convert all of them for each token."""

    buffers: tuple[torch.Tensor, torch.Tensor]
    """Of keys and values; set with the first token."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new = (key_states.to(value_states.dtype), value_states)
        length = self.keys.shape[2] if self.is_initialized else 0
        total = length + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = tuple(_buffer(states, total) for states in new)
        elif total > self.buffers[0].shape[2]:
            old, self.buffers = (self.keys, self.values), tuple(_buffer(states, total) for states in new)
            for buffer, states in zip(self.buffers, old, strict=True):
                buffer[:, :, :length] = states
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[:, :, length:total] = states
        self.keys, self.values = (buffer[:, :, :total] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if not self.is_initialized:
            return
        length = self.keys.shape[2]
        self.buffers = tuple(buffer[beam_idx] for buffer in self.buffers)
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


def _buffer(states: torch.Tensor, tokens: int) -> torch.Tensor:
    """Room for at least so many tokens of keys or values [A, K, ..., D]."""
    rows, heads, _, size = states.shape
    return states.new_empty(rows, heads, -(-tokens // CACHE_BLOCK) * CACHE_BLOCK, size)


def new_cache(vlm: VLM) -> Cache:
    """Of the layers with keys or a state of their own; those that take another's come last."""
    layers = DynamicCache(config=vlm.model.config.get_text_config()).layers
    layers = layers[: min([len(vlm.language.layers), *vlm.key_sources])]
    attention = (DynamicLayer, DynamicSlidingWindowLayer)  # of the latter attention masks what is outside
    return Cache(layers=[BufferedLayer() if type(layer) in attention else layer for layer in layers])


class SharedDecodeState:
    """Branches that share their prompt's keys and values. In layers with linear attention each has its own
    state, at first a copy of its prompt's."""

    def __init__(self, vlm: VLM, prefix: Prefix, cache: Cache):
        self.vlm, self.prefix, self.cache = vlm, prefix, cache

    @staticmethod
    def prefill(vlm: VLM, grid: BranchGrid, recorder: Recorder) -> tuple[torch.Tensor, SharedDecodeState]:
        """Prompts in packed rows, each followed by its responses so far, as in training."""
        with recorder.prefill(grid.sizes, grid.sources.tolist()):
            passes = [_prefill_row(vlm, part) for part in grid.split(PREFILL_TOKENS)]
        logits = torch.cat([logits for logits, _ in passes])
        caches = [cache for _, cache in passes]
        del passes
        keys, values, own, sources = {}, {}, new_cache(vlm), grid.sources.to(vlm.device)
        for number, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
            if isinstance(layers[0], DynamicLayer):
                keys[number] = torch.cat([layer.keys for layer in layers], dim=2)
                values[number] = torch.cat([layer.values for layer in layers], dim=2)
            else:
                states = zip(*(stored(cache, number) for cache in caches), strict=True)
                store(own, number, tuple(torch.cat(parts)[sources] for parts in states))
        del caches
        prefix = Prefix.from_row(keys, values, _segments(grid))
        if any(lengths for _, lengths in grid.sizes):
            prefix = replace(prefix, branch_padding=_fill(own, keys, values, grid, sources))
        prefix = replace(prefix, sources=vlm.key_sources)
        return logits, SharedDecodeState(vlm, prefix, own)

    def compact(self, running: torch.Tensor) -> torch.Tensor:
        """Some finished branches stay as fillers, since all prompts need the same number of branches."""
        remaining, rows = compact_grid(running.view(len(self.prefix.padding), -1))
        if len(remaining) == len(running):
            return torch.arange(len(running), device=running.device)
        self.cache.reorder_cache(remaining)
        self.prefix = self.prefix.select(rows, remaining)
        return remaining

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self.vlm.hidden(
            ids=tokens[:, None],
            positions=positions.expand(3, -1)[:, :, None],
            cache=self.cache,
            prefix=self.prefix,
        )
        return self.vlm.logits(hidden[:, -1])


def _prefill_row(vlm: VLM, grid: BranchGrid) -> tuple[torch.Tensor, Cache]:
    """Runs a grid's prompts and responses so far in one packed row. Returns the logits [rows, V] that follow
    each of the grid's rows, and the row's keys and values."""
    pieces = [piece for context in grid.contexts for piece in (context.prompt, *context.responses)]
    cache = new_cache(vlm)
    hidden = vlm.hidden(
        ids=torch.cat([piece.ids for piece in pieces])[None].to(vlm.device),
        positions=torch.cat([piece.positions for piece in pieces], dim=1)[:, None].to(vlm.device),
        features=vlm.vision(
            [source for item in grid.contexts for source in with_images(item.prompt, item.responses)]
        ),
        cache=cache,
        segments=_segments(grid).to(vlm.device),
    )
    return vlm.logits(hidden[0, _ends(grid)]), cache


def _segments(grid: BranchGrid) -> Segments:
    """The groups of a grid's packed row."""
    starts = accumulate((prompt + sum(lengths) for prompt, lengths in grid.sizes), initial=0)
    return Segments(
        tuple(
            PackedGroup(start, prompt, tuple(lengths))
            for start, (prompt, lengths) in zip(starts, grid.sizes, strict=False)
        )
    )


def _ends(grid: BranchGrid) -> torch.Tensor:
    """[rows] index in the packed row of the last token of each row of the grid."""
    ends, start = [], 0
    for prompt, lengths in grid.sizes:
        start += prompt
        ends += [] if lengths else [start - 1]
        for length in lengths:
            start += length
            ends.append(start - 1)
    return torch.tensor(ends)


def _fill(
    cache: Cache,
    keys: dict[int, torch.Tensor],
    values: dict[int, torch.Tensor],
    grid: BranchGrid,
    sources: torch.Tensor,
) -> torch.Tensor:
    """Copies the keys and values of the responses so far from the packed row, [1, K, L, D] by layer, to the
    branches' cache, padded on the left. Returns the padding [A, 1, 1, S]."""
    sizes = [length for prompt, lengths in grid.sizes for length in (prompt, *(lengths or (0,)))]
    is_response = [flag for _, lengths in grid.sizes for flag in (False, *[True] * max(len(lengths), 1))]

    def branches(row: torch.Tensor) -> torch.Tensor:
        pieces = zip(row[0].split(sizes, dim=1), is_response, strict=True)
        own = [piece.transpose(0, 1) for piece, response in pieces if response]
        return pad_sequence(own, batch_first=True, padding_side="left").transpose(1, 2)[sources]

    for layer, value in values.items():
        cache.update(branches(keys[layer].to(value.dtype)), branches(value), layer)
    lengths = torch.tensor([length for length, response in zip(sizes, is_response, strict=True) if response])
    padding = torch.arange(int(lengths.max())) < (lengths.max() - lengths)[:, None]
    return padding.to(sources.device)[sources][:, None, None]


class ForkedDecodeState:
    """Branches that each start from a copy of their prompt's whole state, for models that can't share it.
    `mask` [A, 1, 1, P + S] is true where a branch has a token."""

    def __init__(self, vlm: VLM, cache: Cache, mask: torch.Tensor):
        self.vlm, self.cache, self.mask = vlm, cache, mask

    @staticmethod
    def prefill(vlm: VLM, grid: BranchGrid, recorder: Recorder) -> tuple[torch.Tensor, ForkedDecodeState]:
        """One row per prompt, or per response so far after its prompt. Padded on the left, where the state of
        linear attention is zero and remains so."""

        def padded(rows: list[torch.Tensor]) -> torch.Tensor:
            return pad_sequence(rows, batch_first=True, padding_side="left").to(vlm.device)

        prompts = [grid.contexts[context].prompt for context, _ in grid.rows]
        pieces = [
            (prompt,) if row is None else (prompt, grid.contexts[context].responses[row])
            for prompt, (context, row) in zip(prompts, grid.rows, strict=True)
        ]
        ids = [torch.cat([piece.ids for piece in row]) for row in pieces]
        positions = [torch.cat([piece.positions for piece in row], dim=1) for row in pieces]
        sizes = [(len(row[0].ids), [len(piece.ids) for piece in row[1:]]) for row in pieces]
        mask = padded([torch.ones_like(row) for row in ids])
        cache = new_cache(vlm)
        with recorder.prefill(sizes, grid.sources.tolist(), mask.flatten().nonzero()[:, 0]):
            hidden = vlm.hidden(
                ids=padded(ids),
                positions=padded([row.T for row in positions]).permute(2, 0, 1),
                mask=mask,
                features=vlm.vision([source for row in pieces for source in with_images(row[0], row[1:])]),
                cache=cache,
            )
        fork = grid.sources.to(vlm.device)
        cache.reorder_cache(fork)
        return vlm.logits(hidden[:, -1]), ForkedDecodeState(vlm, cache, mask[fork, None, None].bool())

    def compact(self, running: torch.Tensor) -> torch.Tensor:
        remaining = running.nonzero()[:, 0]
        if len(remaining) < len(running):
            self.cache.reorder_cache(remaining)
            self.mask = self.mask[remaining]
        return remaining

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.mask = pad(self.mask, (0, 1), value=True)
        hidden = self.vlm.hidden(
            ids=tokens[:, None],
            positions=positions.expand(3, -1)[:, :, None],
            mask=self.mask,
            cache=self.cache,
        )
        return self.vlm.logits(hidden[:, -1])


def compact_grid(running: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest grid with all running branches of a [B, G] grid.

    Returns the remaining branches' indices (flat, in the new grid's order) and the indices of their rows.
    Contexts with fewer running branches than others keep finished ones as fillers.
    """
    rows = running.any(1).nonzero()[:, 0]
    order = running[rows].int().argsort(dim=1, descending=True, stable=True)
    columns = order[:, : int(running.sum(1).max())]
    return (rows[:, None] * running.shape[1] + columns).flatten(), rows
