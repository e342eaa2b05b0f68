"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and their mixtures of experts."""

from __future__ import annotations

from transformers import (
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vlm_sapo.models.families.family import Family, Shape, rotary, tower


def qwen2_text(shape: Shape) -> dict:
    """All heads together are as wide as the model, so the head size sets their number."""
    heads = shape.hidden // shape.head_dim
    return rotary(shape.head_dim) | {"num_attention_heads": heads, "num_key_value_heads": heads // 2 or 1}


def qwen3_text(shape: Shape) -> dict:
    return rotary(shape.head_dim, mrope_interleaved=True)


def qwen3_moe_text(shape: Shape) -> dict:
    """`norm_topk_prob` as in real checkpoints; transformers assumes it."""
    return qwen3_text(shape) | experts(shape) | {"norm_topk_prob": True}


def qwen3_5_text(shape: Shape) -> dict:
    """Every fourth layer and the last have full attention, others linear; a quarter of a head is rotated."""
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


def qwen2_vision(shape: Shape) -> dict:
    return tower(shape) | {
        "embed_dim": shape.tower,
        "hidden_size": shape.hidden,
        "mlp_ratio": shape.vision_ratio,
    }


def qwen2_5_vision(shape: Shape) -> dict:
    return wide_tower(shape) | {
        "window_size": 8 * shape.patch,
        "fullatt_block_indexes": [shape.vision_layers - 1],
    }


def qwen3_vision(shape: Shape) -> dict:
    """With up to three layers whose features are added in the language model's first layers (deepstack)."""
    layers = shape.vision_layers
    deep = [0] if layers < 8 else [layers // 4 - 1, layers // 2 - 1, 3 * layers // 4 - 1]
    return wide_tower(shape) | {"num_position_embeddings": 64, "deepstack_visual_indexes": deep}


def qwen3_5_vision(shape: Shape) -> dict:
    return wide_tower(shape) | {"num_position_embeddings": 64}


def wide_tower(shape: Shape) -> dict:
    return tower(shape) | {
        "hidden_size": shape.tower,
        "intermediate_size": shape.vision_ratio * shape.tower,
        "out_hidden_size": shape.hidden,
    }


QWEN3 = (Qwen3VLProcessor, Qwen3VLVideoProcessor, "thousand")
QWEN3_VL = {"thinks": True, "tool_calls": "json"}
QWEN3_5 = {"thinks": True, "tool_calls": "xml"}
QWEN = {
    "qwen2_vl": Family(
        "Qwen2-VL", Qwen2VLProcessor, Qwen2VLVideoProcessor, "thousand", qwen2_text, qwen2_vision
    ),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL",
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
        "resized",
        qwen2_text,
        qwen2_5_vision,
        hermes=True,
    ),
    "qwen3_vl": Family("Qwen3-VL", *QWEN3, qwen3_text, qwen3_vision, **QWEN3_VL),
    "qwen3_vl_moe": Family(
        "Qwen3-VL-MoE", *QWEN3, qwen3_moe_text, qwen3_vision, **QWEN3_VL, experts_transposed=True
    ),
    "qwen3_5": Family("Qwen3.5", *QWEN3, qwen3_5_text, qwen3_5_vision, **QWEN3_5),
    "qwen3_5_moe": Family("Qwen3.5-MoE", *QWEN3, qwen3_5_moe_text, qwen3_5_vision, **QWEN3_5),
}
