"""How long a step takes, by the roofline of a card: operations over its peak, bytes over its bandwidth, and
launches over what a host starts in a second. An estimate: nothing here was measured on the card.

Seconds and bytes, unless said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlm_sapo.tools.plan.cards import Card
from vlm_sapo.tools.plan.operations import (
    GroupTokens,
    ModelWork,
    attention_operations,
    head_operations,
    layer_operations,
    vision_operations,
)

PRODUCT_SHARE = 0.66
"""Of a card's peak, what large products reach: 650 of an H100's 989 TFLOP/s."""
ATTENTION_SHARE = 0.4
"""The same of attention with 128 dimensions a head, forward: 400 of 989."""
BANDWIDTH_SHARE = 0.87
"""Of a memory's bandwidth, what kernels reach that only move data: 2.9 of 3.35 TB/s."""
BACKWARD_ATTENTION = 2.5
"""Operations of attention's backward pass over those of its forward pass: five products instead of two."""
BACKWARD_ELEMENTWISE = 1.5
"""Bytes that elementwise operations move in the backward pass, over those of the forward pass."""
FUSED_LAYER, FUSED_HEAD = 3.0, 4.0
"""By what fused norms, rotary embedding and SwiGLU, and a fused head, divide the bytes that they move."""
HEAD_FORWARD, HEAD_BACKWARD = 13, 9
"""Float32 passes over the logits of the unfused head."""
HF_LAUNCHES = {"bfloat16": 72, "autocast": 75, "lora": 114}
"""Kernels that a decoder layer launches for one generated token, counted on Qwen3-VL."""
HF_OTHER_LAUNCHES = 25
"""The same outside the layers."""
LAUNCH_SECONDS = 9e-6
"""What the host takes to launch a kernel from Python."""
VLLM_STEP_SECONDS = 3e-3
"""What vLLM's scheduler and sampler take for one token of all its sequences, beside the model."""
VLLM_PREFILL_SHARE = 0.5
"""Of a card's peak, in vLLM's prefill."""
PCIE = 25e9
"""Bytes per second between a card and pinned memory of its host (PCIe 4.0 x16 or better)."""
NETWORK = 50e9
"""Bytes per second and GPU between machines: 400 Gb/s each."""
LINK_SHARE = 0.7
"""Of a link's rate, what collectives reach."""
DISK = 2e9
"""Bytes per second of a shared folder, in each direction."""
IMAGE_SECONDS = 0.1
"""To decode, resize and cut a megapixel, in one thread."""
REWARD_SECONDS = 5e-3
"""To grade a response, with a machine's reward processes working side by side."""
REST_SECONDS = 1.0
"""Metrics and files of a step."""


@dataclass(frozen=True)
class Training:
    """How the policy is trained."""

    autocast: bool
    """Float32 weights that are cast in each pass, with a float32 residual stream."""
    adapters: bool
    """Only adapters are trained: no gradients of the base weights."""
    checkpointing: bool
    vision: bool
    """The vision tower is trained."""
    fused_layers: bool = False
    """Norms, rotary embedding and SwiGLU are fused."""
    fused_head: bool = True
    """The head's backward pass is written by hand, and computes no entropy again."""


@dataclass(frozen=True)
class Shards:
    """How the weights are spread over `count` GPUs, `link` bytes per second apart."""

    count: int
    link: float
    reduce_bytes: int = 4
    """Of an element while gradients are reduced."""


def product_seconds(operations: float, card: Card) -> float:
    return operations / (PRODUCT_SHARE * card.operations)


def moving_seconds(size: float, card: Card) -> float:
    """To read or write so many bytes of the card's memory."""
    return size / (BANDWIDTH_SHARE * card.bandwidth)


def elementwise_bytes(work: ModelWork, tokens: float, *, autocast: bool) -> float:
    """What norms, rotary embedding, activations, residuals and casts move in the forward pass of all layers.
    Norms are six float32 kernels, rotary embedding eight, SwiGLU two; autocast casts activations five
    times."""
    residual = 4 if autocast else 2
    heads = work.query_width + work.key_width
    norms = 2 * work.hidden * (4 * 6 + residual + 2)
    rotary = heads * (2 + 4 + 4 * 7 + 2)
    casts = 5 * work.hidden * (4 + 2) if autocast else 0
    activation = work.feed_forward * (2 * 2 + 3 * 2)
    residuals = 2 * work.hidden * (2 * residual + 2)
    return work.layers * tokens * (norms + rotary + casts + activation + residuals)


def layers_seconds(work: ModelWork, group: GroupTokens, training: Training, card: Card) -> float:
    """Forward and backward pass of all decoder layers for one group."""
    products = product_seconds(layer_operations(work, group.row), card)
    attention = attention_operations(work, group.pairs) / (ATTENTION_SHARE * card.operations)
    moved = moving_seconds(elementwise_bytes(work, group.row, autocast=training.autocast), card)
    moved /= FUSED_LAYER if training.fused_layers else 1
    forward = (products + attention + moved) * (2 if training.checkpointing else 1)
    backward = products * (1.1 if training.adapters else 2)
    return forward + backward + BACKWARD_ATTENTION * attention + BACKWARD_ELEMENTWISE * moved


def head_seconds(work: ModelWork, tokens: float, training: Training, card: Card) -> float:
    """Log-probs of so many tokens, forward, again, and backward."""
    products = product_seconds(head_operations(work, tokens), card)
    float32 = moving_seconds(4 * work.vocabulary * tokens, card) / (FUSED_HEAD if training.fused_head else 1)
    backward = products * (1 if training.adapters else 2)
    return 2 * products + backward + (2 * HEAD_FORWARD + HEAD_BACKWARD) * float32


def vision_seconds(work: ModelWork, group: GroupTokens, training: Training, card: Card) -> float:
    """The trained vision tower for one group's image; a frozen one's features are cached."""
    forward = product_seconds(vision_operations(work, group.image), card)
    return forward * (4 if training.checkpointing else 3) if training.vision else 0.0


def update_seconds(work: ModelWork, group: GroupTokens, training: Training, card: Card) -> float:
    """An update's passes for one group."""
    return (
        layers_seconds(work, group, training, card)
        + head_seconds(work, group.sampled, training, card)
        + vision_seconds(work, group, training, card)
    )


def scoring_seconds(work: ModelWork, group: GroupTokens, training: Training, card: Card) -> float:
    """One forward pass, for old log-probs or the reference."""
    moved = elementwise_bytes(work, group.row, autocast=training.autocast)
    moved += HEAD_FORWARD * 4 * work.vocabulary * group.sampled
    products = layer_operations(work, group.row) + head_operations(work, group.sampled)
    attention = attention_operations(work, group.pairs) / (ATTENTION_SHARE * card.operations)
    return product_seconds(products, card) + attention + moving_seconds(moved, card)


def collective_seconds(work: ModelWork, shards: Shards, *, trained: bool = True) -> float:
    """What FSDP moves for one micro-batch: the weights in bfloat16 forwards and backwards, and the gradients
    once."""
    if shards.count == 1:
        return 0.0
    moved = work.total * (2 * 2 + (shards.reduce_bytes if trained else 0))
    return moved * (shards.count - 1) / shards.count / (LINK_SHARE * shards.link)


def key_bytes(work: ModelWork) -> int:
    """Bytes of one token's keys and values in bfloat16."""
    return 2 * 2 * work.attention_layers * work.key_width


def hf_seconds(
    work: ModelWork, group: GroupTokens, card: Card, *, groups: int, per_batch: int, longest: float, kind: str
) -> float:
    """The embedded engine, for `groups` prompts with `per_batch` at a time: every batch takes as long as its
    longest response, and a token as long as its launches or the bytes that it reads. `kind` is a key of
    HF_LAUNCHES."""
    batches = math.ceil(groups / per_batch)
    launching = LAUNCH_SECONDS * (HF_LAUNCHES[kind] * work.layers + HF_OTHER_LAUNCHES)
    cached = min(per_batch, groups) * (group.prompt + group.group * longest / 2)
    reading = moving_seconds(2 * work.total + 2 * cached * key_bytes(work), card)
    prefill = product_seconds(
        layer_operations(work, group.prompt) + vision_operations(work, group.image), card
    )
    return batches * longest * max(launching, reading) + groups * prefill


def vllm_seconds(work: ModelWork, group: GroupTokens, card: Card, *, groups: float, longest: float) -> float:
    """vLLM on one GPU, for `groups` prompts: as many steps as the longest response has tokens, each of which
    reads the weights; keys and products of all tokens; the prompts' prefill."""
    steps = longest * (moving_seconds(2 * work.total, card) + VLLM_STEP_SECONDS)
    tokens = groups * group.sampled
    keys = moving_seconds(tokens * key_bytes(work) * (group.prompt + group.response / 2), card)
    products = product_seconds(layer_operations(work, tokens) + head_operations(work, tokens), card)
    prefill = layer_operations(work, group.prompt) + vision_operations(work, group.image)
    return steps + keys + products + groups * prefill / (VLLM_PREFILL_SHARE * card.operations)


def gather_seconds(elements: float, shards: Shards, *, element_size: int = 2) -> float:
    """To gather so many weights once, tensor by tensor."""
    moved = element_size * elements * (shards.count - 1) / shards.count
    return moved / (LINK_SHARE * shards.link)


def wake_seconds(work: ModelWork, *, element_size: int = 2) -> float:
    """An engine in the same process falls asleep and wakes: its weights cross PCIe twice."""
    return 2 * element_size * work.total / PCIE


def send_seconds(elements: float, rate: float, *, element_size: int = 2) -> float:
    """To send so many weights at so many bytes per second."""
    return element_size * elements / rate


def optimizer_seconds(trained: float, card: Card, *, element_size: int = 4) -> float:
    """AdamW's step over so many elements: reads weight, gradient and two moments, writes all but the
    gradient."""
    return moving_seconds(7 * element_size * trained, card)
