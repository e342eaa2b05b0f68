"""How branches of prompts go on, token by token: from keys and values that they share, or each from a copy of
its prompt's whole state.

[B] prompts, [G] branches of each, [A] branches in the batch, [P] tokens of the longest prompt, [S] tokens of
a branch so far, [V] vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from vlm_sapo.models.attention import PackedGroup, Prefix, Segments
from vlm_sapo.models.experts import ExpertRecorder, NullRecorder
from vlm_sapo.models.vlm import VLM
from vlm_sapo.types import Prompt


class DecodeState(Protocol):
    """The branches of prompts, in order, G for each, until they leave."""

    def compact(self, running: torch.Tensor) -> torch.Tensor:
        """Lets those leave that no longer run, [A] bool, or some of them. Returns the places that stay, in
        their new order."""

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The next logits [A, V], given each branch's latest token [A] and its rotary position [A]."""


def prefill(
    vlm: VLM, prompts: list[Prompt], group: int, recorder: ExpertRecorder | NullRecorder
) -> tuple[torch.Tensor, DecodeState]:
    """Reads each prompt once. The first logits [B, V], and `group` branches of each prompt. `recorder` takes
    down the experts."""
    kind = SharedDecodeState if vlm.attends_fully else ForkedDecodeState
    return kind.prefill(vlm, prompts, group, recorder)


def new_cache(vlm: VLM) -> DynamicCache:
    return DynamicCache(config=vlm.model.config.get_text_config())


class SharedDecodeState:
    """Branches that read their prompt's keys and values where they lie. For full attention alone."""

    def __init__(self, vlm: VLM, prefix: Prefix):
        self.vlm, self.prefix, self.cache = vlm, prefix, new_cache(vlm)

    @staticmethod
    def prefill(
        vlm: VLM, prompts: list[Prompt], group: int, recorder
    ) -> tuple[torch.Tensor, SharedDecodeState]:
        """All prompts in one packed row."""
        lengths = [len(prompt.ids) for prompt in prompts]
        ends = torch.tensor(lengths).cumsum(0)
        starts = (ends - torch.tensor(lengths)).tolist()
        cache = new_cache(vlm)
        with recorder.prefill(lengths):
            hidden = vlm.hidden(
                ids=torch.cat([prompt.ids for prompt in prompts])[None].to(vlm.device),
                positions=torch.cat([prompt.positions for prompt in prompts], dim=1)[:, None].to(vlm.device),
                features=vlm.vision(prompts),
                cache=cache,
                segments=Segments(
                    tuple(PackedGroup(*place, ()) for place in zip(starts, lengths, strict=True))
                ),
            )
        keys, values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
        return vlm.logits(hidden[0, ends - 1]), SharedDecodeState(vlm, Prefix.from_row(keys, values, lengths))

    def compact(self, running: torch.Tensor) -> torch.Tensor:
        """Ended branches stay where others of their prompts leave fewer."""
        kept, rows = compact_grid(running.view(len(self.prefix.padding), -1))
        if len(kept) == len(running):
            return torch.arange(len(running), device=running.device)
        self.cache.batch_select_indices(kept)
        if len(rows) < len(self.prefix.padding):
            self.prefix = self.prefix.select(rows)
        return kept

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self.vlm.hidden(
            ids=tokens[:, None],
            positions=positions.expand(3, -1)[:, :, None],
            cache=self.cache,
            prefix=self.prefix,
        )
        return self.vlm.logits(hidden[:, -1])


class ForkedDecodeState:
    """Branches that each go on from a copy of their prompt's state: what linear attention has read, and the
    other layers' keys and values. `mask` [A, 1, 1, P + S] is true where a branch has a token."""

    def __init__(self, vlm: VLM, cache: DynamicCache, mask: torch.Tensor):
        self.vlm, self.cache, self.mask = vlm, cache, mask

    @staticmethod
    def prefill(
        vlm: VLM, prompts: list[Prompt], group: int, recorder
    ) -> tuple[torch.Tensor, ForkedDecodeState]:
        """Padded on the left, where the state of linear attention is still zero and stays so."""

        def padded(rows: list[torch.Tensor]) -> torch.Tensor:
            return pad_sequence(rows, batch_first=True, padding_side="left").to(vlm.device)

        mask = padded([torch.ones_like(prompt.ids) for prompt in prompts])
        cache = new_cache(vlm)
        with recorder.prefill([len(prompt.ids) for prompt in prompts], mask.flatten().nonzero()[:, 0]):
            hidden = vlm.hidden(
                ids=padded([prompt.ids for prompt in prompts]),
                positions=padded([prompt.positions.T for prompt in prompts]).permute(2, 0, 1),
                mask=mask,
                features=vlm.vision(prompts),
                cache=cache,
            )
        fork = torch.arange(len(prompts), device=vlm.device).repeat_interleave(group)
        cache.reorder_cache(fork)
        return vlm.logits(hidden[:, -1]), ForkedDecodeState(vlm, cache, mask[fork, None, None].bool())

    def compact(self, running: torch.Tensor) -> torch.Tensor:
        kept = running.nonzero()[:, 0]
        if len(kept) < len(running):
            self.cache.reorder_cache(kept)
            self.mask = self.mask[kept]
        return kept

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
    """The smallest grid that holds what is running in a [B, G] grid of branches.

    Returns the places that stay (flat, in the new grid's order) and the rows they lie in. Prompts with fewer
    running branches than others keep ended ones as filling.
    """
    rows = running.any(1).nonzero()[:, 0]
    order = running[rows].int().argsort(dim=1, descending=True, stable=True)
    columns = order[:, : int(running.sum(1).max())]
    return (rows[:, None] * running.shape[1] + columns).flatten(), rows
