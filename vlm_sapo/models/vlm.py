"""A loaded vision-language model and its properties: banned and stop tokens, named parts, image features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vlm_sapo.models import lora as adapters
from vlm_sapo.models.experts import Routers
from vlm_sapo.models.families import FAMILIES, Family
from vlm_sapo.models.fused import fuse
from vlm_sapo.models.head import ban, is_plain, operand_dtype, product, soft_cap
from vlm_sapo.models.linear import ATTENTION, FULL, group_linear_attention
from vlm_sapo.models.unread import UnreadWeights
from vlm_sapo.models.vision import Features, Vision
from vlm_sapo.models.weights import (
    StoredWeight,
    full_tensor,
    gather_and_drop,
    hf_state_dict,
    save_config,
    save_model,
    stored_weights,
    stream_weights,
)
from vlm_sapo.types import Prompt

PARTS = {
    "vision": ("visual.", "vision_tower.", "vision_model."),
    "merger": (
        "visual.merger.",
        "visual.deepstack_merger_list.",
        "visual.downsample.",
        "multi_modal_projector.",
        "embed_vision.",
        "connector.",
    ),
    "language": ("language_model.", "text_model.", "lm_head."),
    "router": (".mlp.gate.",),
}
"""The parts that `model.freeze` can name, with substrings of their parameters' names. `vision` excludes the
merger, `language` the router."""
AUDIO = "audio"
"""What some models read sound with, as no row has any: a part that is never trained."""
MARKS = {
    AUDIO: ("audio_tower.", "embed_audio."),
    **{part: PARTS[part] for part in ("merger", "router", "vision", "language")},
}
"""All parts in the order in which they are tried for a parameter."""


class VLM(nn.Module):
    """Model and processor of one checkpoint.

    `banned` are the ids of image, video and vision start/end tokens: no engine may sample them, and every
    log-softmax of the trainer excludes them. `stops` are the ids that end a response. `version` counts the
    updates of the weights, so that an engine knows whether its weights are current.
    """

    def __init__(self, model: nn.Module, processor, *, vision_cache: int = 2**32):
        super().__init__()
        self.model = model
        self.processor = processor
        self.banned = self.family.vision_tokens(model.config, processor.tokenizer)
        self.stops = stop_ids(model, processor)
        self.vision = Vision(model, self.family, budget=vision_cache)
        self.routers = Routers(model)
        self.version = 0
        self.fused_modules = 0
        self.head_casts: dict[torch.dtype, torch.Tensor] | None = None
        self.unread: UnreadWeights | None = None
        """The weights, until they are read from their files (Parallelism.distribute)."""
        kinds = model.config.get_text_config().to_dict().get("layer_types") or [FULL]
        self.shares_prefix = {*kinds} <= {*ATTENTION} or group_linear_attention(self.language.layers, kinds)
        """Whether the responses to a prompt can share it in a packed row."""
        if model.config.vision_config.to_dict().get("deepstack_visual_indexes"):
            self.language._deepstack_process = add_features

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def family(self) -> Family:
        return FAMILIES[self.model.config.model_type]

    @property
    def language(self) -> nn.Module:
        """The language model, without its head."""
        return self.family.language_model(self.model)

    @property
    def vocabulary(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def context(self) -> int:
        """The language model's maximum context length in tokens."""
        return self.model.config.get_text_config().max_position_embeddings

    @property
    def logit_cap(self) -> float | None:
        """The bound that the logits of Gemma's models approach; see `soft_cap`."""
        return self.model.config.get_text_config().to_dict().get("final_logit_softcapping")

    @property
    def layer_kinds(self) -> set[str]:
        """The kinds of language layers, as transformers names them."""
        return set(self.model.config.get_text_config().to_dict().get("layer_types") or [FULL])

    @cached_property
    def key_sources(self) -> dict[int, int]:
        """The last layers of some models of Gemma, which compute no keys and values, and the layer of the
        same kind whose they take."""
        config = self.model.config.get_text_config()
        shared = config.to_dict().get("num_kv_shared_layers")
        if not shared:
            return {}
        kinds, own = config.layer_types, len(config.layer_types) - shared
        last = {kind: layer for layer, kind in enumerate(kinds[:own])}
        return {layer: last[kinds[layer]] for layer in range(own, len(kinds))}

    @cached_property
    def cache_argument(self) -> str:
        """What this version of transformers calls the language model's cache. The old name is deprecated
        from 5.24 on, and the only one before."""
        forward = type(self.language).forward
        return "cache" if "cache" in signature(forward).parameters else "past_key_values"

    @property
    def device(self) -> torch.device:
        """The device that passes run on."""
        return self.vision.device

    @property
    def sharded(self) -> bool:
        """Whether processes hold parts of the weights, so that all of them must gather them together."""
        return any(isinstance(parameter, DTensor) for parameter in self.model.parameters())

    def to_device(self, device: torch.device | str) -> None:
        """Moves the weights to a device, on which passes run from then on."""
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

        ids, mask [B, L]; positions [3, B, L] explicit rotary positions; features replace the embeddings of
        the image tokens, in order; cache is a transformers Cache that is extended in place; segments are the
        groups of a packed row, prefix the prompts that branches are decoded from (models/attention.py): with
        either, mask is None.
        """
        language = self.language
        embeds = language.get_input_embeddings()(ids)
        extra = {self.cache_argument: cache}
        if features is not None:
            where = ids == self.model.config.image_token_id
            embeds = embeds.masked_scatter(where[..., None], features.tokens.to(embeds.dtype))
            if features.deep:
                indices = where.flatten().nonzero_static(size=len(features.tokens))[:, 0]
                extra |= {"visual_pos_masks": indices, "deepstack_visual_embeds": list(features.deep)}
        if mask is None:
            assert self.shares_prefix, "this model supports neither segments nor a prefix"
            mask = embeds.new_zeros(1, 1, 1, 1)  # transformers takes it for a finished mask and builds none
            extra |= {"segments": segments, "prefix": prefix}
            inputs = {"attention_mask": mask} | self.family.packed_inputs(self.model, ids)
        else:
            inputs = {"attention_mask": mask} | self.family.padded_inputs(self.model, ids, mask)
        return language(
            inputs_embeds=embeds,
            position_ids=self.family.language_positions(positions),
            use_cache=cache is not None,
            **inputs,
            **extra,
        ).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [..., V] with the banned tokens at minus infinity. For the gradients of a plain head
        in half precision see models/head.py."""
        head = self.model.lm_head
        if not is_plain(head):
            return ban(soft_cap(head(hidden).float(), self.logit_cap), self.banned)
        weight = self._head_operand(head.weight)
        logits = soft_cap(product(hidden.flatten(0, -2).to(weight.dtype), weight), self.logit_cap)
        return ban(logits.unflatten(0, hidden.shape[:-1]), self.banned)

    def _head_operand(self, weight: torch.Tensor) -> torch.Tensor:
        """The head's weight in the dtype that it is multiplied in."""
        dtype = operand_dtype(weight)
        if self.head_casts is None or dtype == weight.dtype:
            return weight.to(dtype)
        if dtype not in self.head_casts:
            self.head_casts[dtype] = weight.detach().to(dtype)
        return self.head_casts[dtype]

    @contextmanager
    def weights_fixed(self) -> Iterator[None]:
        """Within the block the weights do not change, so that autocast needs the head's only once."""
        self.head_casts = {}
        try:
            yield
        finally:
            self.head_casts = None

    @contextmanager
    def without_bans(self) -> Iterator[None]:
        """Within the block the banned tokens may be sampled and have a probability."""
        banned, self.banned = self.banned, []
        try:
            yield
        finally:
            self.banned = banned

    @contextmanager
    def another_version(self, version: int) -> Iterator[None]:
        """Within the block the weights have another version number, so that an engine syncs them."""
        before, self.version = self.version, version
        try:
            yield
        finally:
            self.version = before

    def rope_positions(self, ids: torch.Tensor, grid: torch.Tensor | None) -> torch.Tensor:
        """Rotary positions [3, P] of one prompt; ids [P], grid [I, 3]."""
        return self.family.positions(self.model, ids, grid)

    def image_ranges(self, prompt: Prompt) -> list[tuple[int, int]]:
        """The first of each image's tokens, and how many it is from there to behind the last; there may
        be others between them."""
        tokens = (prompt.ids == self.model.config.image_token_id).nonzero()[:, 0]
        own = [part.tolist() for part in tokens.split(self.image_sizes(prompt))]
        return [(part[0], part[-1] + 1 - part[0]) for part in own]

    def image_sizes(self, prompt: Prompt) -> list[int]:
        """How many image tokens each of a prompt's images has."""
        return [] if prompt.grid is None else self.family.image_tokens(self.model.config, prompt.grid)

    def unexpanded(self, prompt: Prompt) -> list[int]:
        """A prompt's ids with one image token per image, as engines with a processor of their own expect."""
        ids, (before, after) = prompt.ids.tolist(), self.family.enclosed_by
        for start, size in reversed(self.image_ranges(prompt)):
            ids[start - before : start + size + after] = ids[start : start + 1]
        return ids

    def freeze(self, parts: list[str]) -> None:
        """Turns gradients off for the named parts (keys of PARTS), and on for all others."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(part_of(name) not in (*parts, AUDIO))

    def fuse(self) -> None:
        """Replaces norms and SwiGLU by fused kernels; see models/fused.py."""
        self.fused_modules = fuse(self.model)

    def patch_embed_as_linear(self) -> None:
        """Computes the embedding of single patches, a convolution, as the linear layer that it is equal
        to."""
        embedding = self.family.patch_embedding(self.model)
        if embedding is not None:
            embedding.proj = PatchProjection(embedding.proj)

    def weights(self, *, keep: bool = True) -> dict[str, torch.Tensor]:
        """The weights in the format of published checkpoints; see `hf_state_dict`. For a sharded model they
        are in host memory and all processes must call this; without `keep` the tensors are empty."""
        return hf_state_dict(self.model, keep=keep)

    def stored_weights(self) -> list[StoredWeight]:
        """Names, shapes and where to get the weights of published checkpoints; see `stored_weights`."""
        return stored_weights(self.model)

    def stream_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights for an engine of this dtype, one after the other; see `stream_weights`."""
        return stream_weights(self.model, dtype)

    def adapter_weights(self, *, keep: bool = True) -> dict[str, torch.Tensor]:
        """The adapter's weights in peft's format; see `weights`."""
        return adapters.weights(self.model, full_tensor if keep else gather_and_drop)

    def save(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Writes weights (by default the present ones), configs, tokenizer and processor so that
        transformers' Auto classes load them."""
        save_model(self.model, folder, weights)
        self.processor.save_pretrained(folder)

    def save_config(self, folder: Path) -> None:
        """Writes what `save` writes, without weights."""
        save_config(self.model, folder)
        self.processor.save_pretrained(folder)

    def save_adapter(self, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the adapter in peft's format."""
        adapters.save(self.model, folder, self.adapter_weights() if weights is None else weights)


def part_of(name: str) -> str:
    """The part, a key of MARKS, that a parameter or module belongs to."""
    return next(part for part, marks in MARKS.items() if any(mark in f"{name}." for mark in marks))


def add_features(hidden: torch.Tensor, indices: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Adds features [M, H] to the hidden states [B, L, H] at indices [M] of the flattened tokens, or where a
    mask [B, L] is true.

    It takes the place of a language model's `_deepstack_process`, which selects the tokens by a mask: to know
    how many there are, the host would wait for the GPU six times in a pass. A test says when this changes.
    """
    if indices.dtype == torch.bool:  # from the whole model's own forward
        indices = indices.flatten().nonzero()[:, 0]
    return hidden.flatten(0, 1).index_add(0, indices, features.to(hidden.dtype)).view_as(hidden)


class PatchProjection(nn.Module):
    """A convolution whose stride is its kernel size, on single patches, as a linear layer.

    It shares the convolution's parameters and is much faster, especially in the backward pass.
    """

    def __init__(self, convolution: nn.Conv3d):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[N, C, T, P, P] patches to [N, E]."""
        return nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def stop_ids(model: nn.Module, processor) -> list[int]:
    """Ids that end a response: those of the generation config and the tokenizer's end of sequence."""
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({*listed, processor.tokenizer.eos_token_id} - {None})
