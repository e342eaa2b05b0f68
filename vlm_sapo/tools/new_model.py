"""Builds a real Qwen-VL model with random weights, tokenizer and processor: tiny ones for tests and the quick
start, one of the usual size for measurements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
)

from vlm_sapo.models.families import FAMILIES, check_family
from vlm_sapo.models.weights import save_model

VISION_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS.values()]
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


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
    """Width of the vision tower; by default the language model's."""
    vision_ratio: int = 2
    """Width of the vision tower's feed-forward layers over its own."""
    embedding_rows: int = 0
    """At least; the tokenizer may need more."""
    experts: int = 4
    """Experts of an MoE layer, of which two are active per token."""
    expert_ratio: float = 2.0
    """Width of an expert over that of the language model."""
    dtype: str = "float32"


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


def rotary(dims: int, **fields: object) -> dict:
    """Rotary positions on `dims` of a head's dimensions: half for time, a quarter each for height and
    width."""
    eighth = dims // 8
    sections = [2 * eighth, eighth, eighth]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections} | fields
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
    """With up to three layers whose features are added in the language model's first layers (deepstack)."""
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


MODEL_FIELDS = {
    "qwen2_vl": (qwen2_text, qwen2_vision),
    "qwen2_5_vl": (qwen2_text, qwen2_5_vision),
    "qwen3_vl": (qwen3_text, qwen3_vision),
    "qwen3_vl_moe": (qwen3_moe_text, qwen3_vision),
    "qwen3_5": (qwen3_5_text, qwen3_5_vision),
    "qwen3_5_moe": (qwen3_5_moe_text, qwen3_5_vision),
}
"""By family, the fields of its `text_config` and `vision_config` beside the common ones."""


SHAPES = {
    "tiny": Shape(),
    "twin": Shape(experts=8, expert_ratio=1.5),
    "bench": Shape(hidden=128, layers=2, heads=4, head_dim=32, patch=16, max_pixels=2**20, init_std=0.02),
    "2b": Shape(
        hidden=2048,
        layers=28,
        heads=16,
        head_dim=128,
        patch=16,
        max_pixels=2**20,
        init_std=0.02,
        vision_layers=24,
        vision_hidden=1024,
        vision_ratio=4,
        embedding_rows=151_936,
        dtype="bfloat16",
    ),
}
"""By name: the quick start's, an MoE whose active experts are as wide as the feed-forward layers of `tiny`,
the one that eval/bench.py times on a CPU, and Qwen3-VL-2B's."""


def new_model(
    folder: Path,
    *,
    family: str,
    corpus: Iterable[str],
    shape: Shape = SHAPES["tiny"],
    vocab: int = 512,
    seed: int = 0,
) -> int:
    """Writes model, tokenizer and processor into `folder`; returns the number of parameters.

    The tokenizer is a byte-level BPE trained on `corpus` that holds Qwen's special tokens.
    Raises ValueError for an unknown family.
    """
    check_family(family, "--family")
    tokenizer = train_tokenizer(corpus, vocab)
    save_processor(folder, family, tokenizer, shape)
    config = model_config(family, shape, tokenizer)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).to(getattr(torch, shape.dtype))
    stop = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config.eos_token_id = stop
    model.generation_config.pad_token_id = stop[1]
    save_model(model, folder)
    return model.num_parameters()


def train_tokenizer(corpus: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab` tokens with Qwen's special tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    chat = ["system user assistant You are a helpful assistant. <think> </think> <answer> </answer>"] * 20
    inner.train_from_iterator([*corpus, *chat], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=VISION_TOKENS,
        padding_side="left",
    )


def save_processor(folder: Path, family: str, tokenizer: PreTrainedTokenizerFast, shape: Shape) -> None:
    """Writes the family's processor around the tokenizer, with Qwen's chat layout."""
    spec = FAMILIES[family]
    image_processor = Qwen2VLImageProcessor(
        patch_size=shape.patch, merge_size=2, min_pixels=(4 * shape.patch) ** 2, max_pixels=shape.max_pixels
    )
    video = spec.video_processor(patch_size=shape.patch, merge_size=2)
    spec.processor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=video,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def model_config(family: str, shape: Shape, tokenizer: PreTrainedTokenizerFast) -> AutoConfig:
    """The family's config with the sizes of `shape` and the tokenizer's vocabulary and special ids."""
    text_fields, vision_fields = MODEL_FIELDS[family]
    text = {
        "vocab_size": max(shape.embedding_rows, len(tokenizer)),
        "hidden_size": shape.hidden,
        "intermediate_size": 3 * shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads // 2,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 4096,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
        "initializer_range": shape.init_std,
        **text_fields(shape),
    }
    ids = dict(zip(VISION_TOKENS, tokenizer.convert_tokens_to_ids(list(VISION_TOKENS.values())), strict=True))
    return AutoConfig.for_model(
        family,
        text_config=text,
        initializer_range=shape.init_std,
        vision_config={
            "patch_size": shape.patch,
            "initializer_range": shape.init_std,
            "depth": shape.vision_layers,
            "num_heads": shape.heads,
            **vision_fields(shape),
        },
        image_token_id=ids["image_token"],
        video_token_id=ids["video_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        tie_word_embeddings=True,
    )
