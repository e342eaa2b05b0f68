"""The model families: all that differs between them and that transformers doesn't know. docs/families.md says
what works for which, and how to add one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import (
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. The defaults make the quick start's: about a million parameters."""

    hidden: int = 96
    layers: int = 3
    vision_layers: int = 2
    heads: int = 4
    head_dim: int = 32
    patch: int = 8
    max_pixels: int = 64 * 64
    init_std: float = 0.08
    """Standard deviation of the initial weights: 1 / sqrt(hidden) or so; .02 is for wide models."""
    vision_hidden: int | None = None
    """Width of the vision tower; the language model's unless given."""
    vision_ratio: int = 2
    """Width of the vision tower's feed-forward layers over its own."""
    rows: int = 0
    """Rows of the embedding; at least the tokenizer's."""
    experts: int = 4
    """Of a mixture, of which two act on a token."""
    expert_ratio: float = 2.0
    """Width of an expert over the language model's."""
    dtype: str = "float32"


def qwen2_text(shape: Shape) -> dict:
    """All heads together are as wide as the model, so the head's size decides their number."""
    heads = shape.hidden // shape.head_dim
    return rotary(shape.head_dim) | {"num_attention_heads": heads, "num_key_value_heads": heads // 2 or 1}


def qwen3_text(shape: Shape) -> dict:
    return rotary(shape.head_dim, mrope_interleaved=True)


def qwen3_moe_text(shape: Shape) -> dict:
    """`norm_topk_prob` as in real checkpoints; transformers takes it for granted."""
    return qwen3_text(shape) | experts(shape) | {"norm_topk_prob": True}


def qwen3_5_text(shape: Shape) -> dict:
    """Every fourth layer and the last attend fully, the others linearly; a quarter of a head is rotated."""
    dims = max(8, shape.head_dim // 4)
    full = [(shape.layers - layer) % 4 == 1 for layer in range(shape.layers)]
    return rotary(dims, mrope_interleaved=True, partial_rotary_factor=dims / shape.head_dim) | {
        "layer_types": ["full_attention" if attends else "linear_attention" for attends in full],
        "linear_num_key_heads": shape.heads // 2,
        "linear_num_value_heads": shape.heads,
        "linear_key_head_dim": shape.head_dim,
        "linear_value_head_dim": shape.head_dim,
    }


def qwen3_5_moe_text(shape: Shape) -> dict:
    return qwen3_5_text(shape) | experts(shape) | {"shared_expert_intermediate_size": shape.hidden}


def experts(shape: Shape) -> dict:
    width = int(shape.expert_ratio * shape.hidden)
    return {"num_experts": shape.experts, "num_experts_per_tok": 2, "moe_intermediate_size": width}


def rotary(dims: int, **more: object) -> dict:
    """Rotary positions on `dims` of a head's dimensions: half for time, a quarter each for height and
    width."""
    eighth = dims // 8
    sections = [2 * eighth, eighth, eighth]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections} | more
    return {"rope_parameters": rope}


def qwen2_vision(shape: Shape) -> dict:
    width = shape.vision_hidden or shape.hidden
    return {"embed_dim": width, "hidden_size": shape.hidden, "mlp_ratio": shape.vision_ratio}


def qwen2_5_vision(shape: Shape) -> dict:
    return tower(shape) | {
        "window_size": 8 * shape.patch,
        "fullatt_block_indexes": [shape.vision_layers - 1],
    }


def qwen3_vision(shape: Shape) -> dict:
    """With three layers whose features go to the language model's first layers where there are many."""
    layers = shape.vision_layers
    deep = [0] if layers < 8 else [layers // 4 - 1, layers // 2 - 1, 3 * layers // 4 - 1]
    return tower(shape) | {"num_position_embeddings": 64, "deepstack_visual_indexes": deep}


def qwen3_5_vision(shape: Shape) -> dict:
    return tower(shape) | {"num_position_embeddings": 64}


def tower(shape: Shape) -> dict:
    width = shape.vision_hidden or shape.hidden
    return {
        "hidden_size": width,
        "intermediate_size": shape.vision_ratio * width,
        "out_hidden_size": shape.hidden,
    }


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers."""

    title: str
    processor: type
    video_processor: type
    text: Callable[[Shape], dict]
    """Fields of a new model's `text_config` beside the common ones."""
    vision: Callable[[Shape], dict]
    """Fields of a new model's `vision_config` beside the common ones."""
    experts_turned: bool = False
    """Whether checkpoints hold experts' matrices as [E, in, out], and not as [E, out, in] like
    transformers."""


QWEN3 = (Qwen3VLProcessor, Qwen3VLVideoProcessor)
FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL", Qwen2VLProcessor, Qwen2VLVideoProcessor, qwen2_text, qwen2_vision),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL", Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, qwen2_text, qwen2_5_vision
    ),
    "qwen3_vl": Family("Qwen3-VL", *QWEN3, qwen3_text, qwen3_vision),
    "qwen3_vl_moe": Family("Qwen3-VL-MoE", *QWEN3, qwen3_moe_text, qwen3_vision, experts_turned=True),
    "qwen3_5": Family("Qwen3.5", *QWEN3, qwen3_5_text, qwen3_5_vision),
    "qwen3_5_moe": Family("Qwen3.5-MoE", *QWEN3, qwen3_5_moe_text, qwen3_5_vision),
}


def check_family(name: str, where: str) -> Family:
    """The family of a `model_type`. Raises ValueError, beginning with `where`, for one that is not listed."""
    if name not in FAMILIES:
        listed = ", ".join(f"{key} ({family.title})" for key, family in FAMILIES.items())
        raise ValueError(f"{where} ({name}) must be one of {listed}")
    return FAMILIES[name]
