"""Builds a real model of a family with random weights, tokenizer and processor: tiny ones for tests and the
quick start, one of the usual size for measurements."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from vlm_sapo.models.families import FAMILIES, check_family
from vlm_sapo.models.families.family import Chat, Shape
from vlm_sapo.models.weights import save_model

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

    The tokenizer is a byte-level BPE trained on `corpus` that holds the family's special tokens.
    Raises ValueError for an unknown family.
    """
    chat = check_family(family, "--family").chat
    tokenizer = train_tokenizer(corpus, vocab, chat)
    save_processor(folder, family, tokenizer, shape)
    config = model_config(family, shape, tokenizer)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).to(getattr(torch, shape.dtype))
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(chat.ends))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    save_model(model, folder)
    return model.num_parameters()


def train_tokenizer(corpus: Iterable[str], vocab: int, chat: Chat) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab` tokens with the special tokens of a chat layout."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[*dict.fromkeys([*chat.others, *chat.tokens.values()])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ["system user assistant You are a helpful assistant. <think> </think> <answer> </answer>"] * 20
    inner.train_from_iterator([*corpus, *words], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=chat.ends[0],
        pad_token="<|endoftext|>",
        extra_special_tokens=dict(chat.tokens),
        padding_side="left",
    )


def save_processor(folder: Path, family: str, tokenizer: PreTrainedTokenizerFast, shape: Shape) -> None:
    """Writes the family's processor around the tokenizer, with the family's chat layout."""
    FAMILIES[family].small_processor(shape, tokenizer).save_pretrained(folder)


def model_config(family: str, shape: Shape, tokenizer: PreTrainedTokenizerFast) -> AutoConfig:
    """The family's config with the sizes of `shape` and the tokenizer's vocabulary and special ids."""
    spec = FAMILIES[family]
    text = {
        **dict.fromkeys(spec.vocabularies, max(shape.embedding_rows, len(tokenizer))),
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
        **spec.text(shape),
    }
    return AutoConfig.for_model(
        family,
        text_config=text,
        initializer_range=shape.init_std,
        vision_config={
            "patch_size": shape.patch,
            "initializer_range": shape.init_std,
            **spec.vision(shape),
        },
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in spec.chat.ids.items()},
        tie_word_embeddings=True,
        **spec.whole,
    )
