"""A loaded vision-language model with what the rest must know about it: banned and stop tokens, named
parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from vlm_sapo.models import lora as adapters
from vlm_sapo.models.experts import Routers
from vlm_sapo.models.vision import Features, Vision
from vlm_sapo.models.weights import discarded, save_model, stored_weights, whole
from vlm_sapo.types import Prompt

PARTS = {
    "vision": ("visual.",),
    "merger": ("visual.merger.", "visual.deepstack_merger_list."),
    "language": ("language_model.", "lm_head."),
    "router": (".mlp.gate.",),
}
"""Parts that `model.freeze` can name, as substrings of parameter names; `vision` leaves the merger out, and
`language` the router."""
NARROW_FIRST = ("merger", "router", "vision", "language")
"""The parts in the order in which a parameter's is found."""


class VLM(nn.Module):
    """Model and processor of one checkpoint.

    `banned` are the ids of image, video and vision start/end tokens: no engine may sample them, and every
    log-softmax of the trainer leaves them out. `stops` are the ids that end a response. `version` counts the
    updates of the weights, so that an engine knows whether it has the present ones.
    """

    def __init__(self, model: nn.Module, processor, *, vision_cache: int = 2**32):
        super().__init__()
        self.model = model
        self.processor = processor
        config = model.config
        self.banned = [
            config.image_token_id,
            config.video_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        ]
        self.stops = stop_ids(model, processor)
        self.vision = Vision(model, budget=vision_cache)
        self.routers = Routers(model)
        self.version = 0

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def vocabulary(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def context(self) -> int:
        """Longest row that the language model was made for, in tokens."""
        return self.model.config.get_text_config().max_position_embeddings

    @cached_property
    def attends_fully(self) -> bool:
        """Whether every layer of the language model is full attention, so that branches can share a
        prefix."""
        kinds = self.model.config.get_text_config().to_dict().get("layer_types") or ["full_attention"]
        return set(kinds) == {"full_attention"}

    @property
    def device(self) -> torch.device:
        """Where passes run."""
        return self.vision.device

    def place(self, device: torch.device | str) -> None:
        """Moves everything to a device."""
        self.model.to(device)
        self.vision.device = torch.device(device)

    def hidden(
        self,
        *,
        ids,
        positions,
        mask=None,
        features: Features | None = None,
        cache=None,
        segments=None,
        prefix=None,
    ) -> torch.Tensor:
        """Last hidden states [B, L, H] of the language model.

        ids, mask [B, L]; positions [3, B, L] explicit rotary positions; features stand in for the rows' image
        tokens, in order; cache is a transformers Cache that is extended in place; segments tell the groups of
        a packed row, and prefix what its branches decode from (models/attention.py): both need no mask.
        """
        language = self.model.model.language_model
        embeds = language.get_input_embeddings()(ids)
        extra = {}
        if features is not None:
            where = ids == self.model.config.image_token_id
            embeds = embeds.masked_scatter(where[..., None], features.tokens.to(embeds.dtype))
            if features.deep:
                extra = {"visual_pos_masks": where, "deepstack_visual_embeds": list(features.deep)}
        if mask is None:
            assert self.attends_fully, "linear attention reads neither segments nor a prefix"
            mask = embeds.new_zeros(1, 1, 1, 1)  # taken for a ready mask, so that none is built
            extra |= {"segments": segments, "prefix": prefix}
        return language(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **extra,
        ).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [..., V] with the banned tokens at minus infinity."""
        logits = self.model.lm_head(hidden).float()
        logits[..., self.banned] = float("-inf")
        return logits

    @contextmanager
    def without_bans(self) -> Iterator[None]:
        """In the block the banned tokens are in the distribution."""
        banned, self.banned = self.banned, []
        try:
            yield
        finally:
            self.banned = banned

    @contextmanager
    def another_version(self, version: int) -> Iterator[None]:
        """In the block the weights count as others, so that an engine takes them over."""
        before, self.version = self.version, version
        try:
            yield
        finally:
            self.version = before

    def rope_positions(self, ids: torch.Tensor, token_types: torch.Tensor, grid: torch.Tensor | None):
        """Rotary positions [3, P] of one prompt; ids, token_types [P], grid [I, 3]."""
        positions, _ = self.model.model.get_rope_index(
            ids[None], mm_token_type_ids=token_types[None], image_grid_thw=grid
        )
        return positions[:, 0]

    def unexpanded(self, prompt: Prompt) -> list[int]:
        """A prompt's ids with one image token for each picture, as an engine with a processor wants them."""
        merge = self.model.config.vision_config.spatial_merge_size**2
        sizes = [] if prompt.grid is None else (prompt.grid.prod(-1) // merge).tolist()
        ids, kept, image = prompt.ids.tolist(), [], self.model.config.image_token_id
        place = 0
        while place < len(ids):
            kept.append(ids[place])
            place += sizes.pop(0) if ids[place] == image else 1
        return kept

    def freeze(self, parts: list[str]) -> None:
        """Switches gradients off for the named parts (keys of PARTS)."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(part_of(name) not in parts)

    def as_matrix_product(self) -> None:
        """Makes the patch embedding the matrix product that it is."""
        embedding = self.model.model.visual.patch_embed
        embedding.proj = PatchProjection(embedding.proj)

    def weights(self, *, keep: bool = True) -> dict[str, torch.Tensor]:
        """The weights as a published checkpoint has them; see `stored_weights`. Of a sharded model they are
        in host memory, all processes must call this, and those that don't `keep` them get empty tensors."""
        return stored_weights(self.model, whole if keep else discarded)

    def adapter_weights(self, *, keep: bool = True) -> dict[str, torch.Tensor]:
        """The adapter's weights as peft has them; see `weights`."""
        return adapters.weights(self.model, whole if keep else discarded)

    def save(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Writes weights (those that `weights` gives, unless given), configs, tokenizer and processor so that
        transformers' Auto classes load them."""
        save_model(self.model, folder, weights)
        self.processor.save_pretrained(folder)

    def save_adapter(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the adapter as peft does."""
        adapters.save(self.model, folder, self.adapter_weights() if weights is None else weights)


def part_of(name: str) -> str:
    """The part, a key of PARTS, that a parameter or module belongs to."""
    return next(part for part in NARROW_FIRST if any(mark in f"{name}." for mark in PARTS[part]))


class PatchProjection(nn.Module):
    """A convolution whose stride is its kernel, on single patches, with the convolution's own parameters.

    The same product in a fraction of the time: general convolutions are slow at it, above all backwards.
    """

    def __init__(self, convolution: nn.Conv3d):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[N, C, T, P, P] patches to [N, E]."""
        return nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def stop_ids(model: nn.Module, processor) -> list[int]:
    """Ids that end a response: those of the generation config and the tokenizer's own."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({*listed, processor.tokenizer.eos_token_id} - {None})
