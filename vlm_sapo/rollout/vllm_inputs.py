"""Prompts for vLLM in this process, with the pixels that the trainer has prepared: its own processor does
nothing.

vLLM takes finished inputs beside raw prompts (its servers build them as below from what a client has
processed), and `LLMEngine.add_request` accepts them.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from PIL.Image import Image

from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.vllm_requests import Request

FLAT = ("pixel_values", "pixel_attention_mask")
"""Tensors that hold all images' rows one after another."""


def engine_input(vlm: VLM, request: Request, dtype: torch.dtype) -> Any:
    """The request's tokens, with image tokens expanded, and its images' patches in the engine's dtype."""
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

    prompt = request.prompt
    if prompt.pixels is None:
        return tokens_input(request.ids)
    tensors, rows = vlm.family.engine_tensors(vlm.model.config, prompt.pixels.to(dtype), prompt.grid)
    fields = {
        name: MultiModalFieldConfig.flat_from_sizes("image", rows)
        if name in FLAT and rows is not None
        else MultiModalFieldConfig.batched("image", keep_on_cpu=rows is not None)
        for name in tensors
    }
    placeholders = []
    for start, length in vlm.image_ranges(prompt):
        own = prompt.ids[start : start + length] == vlm.model.config.image_token_id
        placeholders.append(
            PlaceholderRange(offset=start, length=length, is_embed=None if own.all() else own)
        )
    return mm_input(
        request.ids,
        MultiModalKwargsItems.from_hf_inputs(tensors, fields),
        {"image": list(map(fingerprint, prompt.images))},
        {"image": placeholders},
    )


def fingerprint(image: Image) -> str:
    """By which vLLM knows an image in its caches."""
    digest = hashlib.blake2b(image.tobytes(), digest_size=16)
    digest.update(f"{image.mode} {image.size}".encode())
    return digest.hexdigest()
