"""The memory of a model's passes: the real code runs on tensors without values. Bytes, unless said."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch

from vlm_sapo.models.decoding import PREFILL_TOKENS, BranchGrid, prefill
from vlm_sapo.models.experts import NullRecorder
from vlm_sapo.models.forward import CHUNK_LOGITS, Pass
from vlm_sapo.models.packing import GroupSlice, Inputs, choose
from vlm_sapo.models.vlm import VLM, part_of
from vlm_sapo.rollout.engine import as_contexts
from vlm_sapo.rollout.hf import sample
from vlm_sapo.tools.plan import simulate
from vlm_sapo.tools.plan.kernels import gpu_kernels
from vlm_sapo.tools.plan.memory import NF4_BYTES, UNSHARDED, ParameterSpec
from vlm_sapo.tools.plan.simulate import MemoryCounter, ModelSpec, Simulation
from vlm_sapo.types import Prompt


@dataclass(frozen=True)
class BatchSpec:
    """The sizes of a batch in tokens: a prompt, its image's part of it, a response, and `budget`, a
    micro-batch. `group` counts the responses to a prompt."""

    prompt: int
    image: int
    response: int
    group: int
    budget: int


@dataclass(frozen=True)
class TrainingMemory:
    activations: int
    logits: int
    features: int
    """Of one prompt's image, where features are cached."""
    feature_budget: int
    """For cached features on the device."""


@dataclass(frozen=True)
class GenerationMemory:
    activations: int
    kv_cache: int
    """Keys and values of prompts and responses."""


LAYER = re.compile(r".*?\.(?:layers|blocks|layer)\.\d+")
"""The name of a decoder layer or vision block, at the beginning of a parameter's."""


@lru_cache(maxsize=8)
def simulated_model(spec: ModelSpec) -> tuple[Simulation, VLM]:
    """The model without values, with the mode in which it runs."""
    return simulate.outline(spec)


@lru_cache(maxsize=64)
def parameters(spec: ModelSpec) -> tuple[ParameterSpec, ...]:
    """The model's parameters."""
    _, vlm = simulated_model(spec)
    specs = []
    for name, parameter in vlm.model.named_parameters():
        adapted = name.endswith(".base_layer.weight")
        size = NF4_BYTES if adapted and spec.lora_bits else parameter.element_size()
        layer = LAYER.match(name)
        unit = "root" if layer is None else layer[0]
        unit = UNSHARDED if vlm.vision.frozen and part_of(name) in ("vision", "merger") else unit
        specs.append(ParameterSpec(unit, parameter.numel(), size, parameter.requires_grad, adapted))
    return tuple(specs)


@lru_cache(maxsize=64)
def training_memory(spec: ModelSpec, batch: BatchSpec) -> TrainingMemory:
    """A micro-batch's forward and backward pass, beside weights, gradients and cached features."""
    mode, vlm = simulated_model(spec)
    with mode, _kernels(vlm, spec):
        groups = micro_batch(vlm, batch, spec.layout)
        inputs = choose(spec.layout, shares_prefix=vlm.shares_prefix).inputs(groups)
        for parameter in vlm.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        vision = VisionPeak(0, 0, 0, 0) if vlm.vision.frozen else _vision_peak(vlm, inputs.prompts, spec)
        with _cached_features(vlm, inputs.prompts) as feature_bytes:
            forward, backward = simulate.at_full_depth(_update_peaks, vlm, inputs, spec)
        peak = max(vision.forward, vision.during + forward, vision.saved + backward, vision.backward)
        logits = _logits_peak(vlm, spec, len(inputs.targets))
    features = feature_bytes // len(groups) if vlm.vision.frozen else 0
    return TrainingMemory(peak - logits, logits, features, vlm.vision.budget)


@dataclass(frozen=True)
class VisionPeak:
    """The pass of a trained vision tower: its peak in each direction, and what it leaves for its backward
    pass, during the language model's forward pass and afterwards."""

    forward: int
    backward: int
    during: int
    saved: int


def _vision_peak(vlm: VLM, prompts: list[Prompt], spec: ModelSpec) -> VisionPeak:
    with MemoryCounter() as counter:
        with _autocast(spec):
            features = vlm.vision(prompts)
            forward, during = counter.peak, counter.live
        saved = counter.peak = counter.live
        if features is not None:
            sum(tensor.sum() for tensor in (features.tokens, *features.deep)).backward()
    return VisionPeak(forward, counter.peak, during, saved)


@contextmanager
def _cached_features(vlm: VLM, prompts: list[Prompt]) -> Iterator[int]:
    """Caches the image features of prompts inside; those of a trained tower take gradients. Yields their
    bytes."""
    parameters = [parameter for module in vlm.vision.modules for parameter in module.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    vlm.vision(prompts)
    cache = [vlm.vision.cached[prompt] for prompt in dict.fromkeys(prompts) if prompt in vlm.vision.cached]
    for tensor in (tensor for item in cache for tensor in (item.tokens, *item.deep)):
        tensor.requires_grad_(bool(trained))
    yield sum(item.num_bytes for item in cache)
    for parameter in trained:
        parameter.requires_grad_(True)


def pixel_bytes(spec: ModelSpec, batch: BatchSpec) -> int:
    """The pixels of one prompt, in host memory."""
    mode, vlm = simulated_model(spec)
    with mode:
        pixels = simulate.synthetic_prompt(vlm, batch.prompt, batch.image).pixels
    return 0 if pixels is None else pixels.nbytes


def micro_batch(vlm: VLM, batch: BatchSpec, layout: str = "shared") -> list[GroupSlice]:
    """Groups that fill the budget, the last one with fewer responses; at least one response."""
    shared = layout == "shared" and vlm.shares_prefix
    return [
        GroupSlice(prompt, tuple(simulate.synthetic_response(prompt, length) for length in lengths))
        for lengths in (_shared_lengths(batch) if shared else _plain_lengths(batch))
        for prompt in [simulate.synthetic_prompt(vlm, batch.prompt, batch.image)]
    ]


def _shared_lengths(batch: BatchSpec) -> Iterator[list[int]]:
    """The lengths of each group's responses, where a group has its prompt once."""
    left = max(batch.budget, batch.prompt + batch.response)
    while left > batch.prompt:
        lengths = []
        left -= batch.prompt
        while left > 0 and len(lengths) < batch.group:
            lengths.append(min(batch.response, left))
            left -= lengths[-1]
        yield lengths


def _plain_lengths(batch: BatchSpec) -> Iterator[list[int]]:
    """The same where each response has its own prompt."""
    left = max(1, batch.budget // (batch.prompt + batch.response))
    while left:
        yield [batch.response] * min(left, batch.group)
        left -= min(left, batch.group)


def _update_peaks(vlm: VLM, inputs: Inputs, spec: ModelSpec) -> tuple[int, int]:
    """The peaks of the forward and of the backward pass."""
    with MemoryCounter() as counter:
        with _autocast(spec):
            scores = Pass(vlm)(inputs)
        loss, forward = scores.logprobs.sum(), counter.peak
        counter.peak = counter.live
        loss.backward()
    return forward, counter.peak


def _logits_peak(vlm: VLM, spec: ModelSpec, tokens: int) -> int:
    """The log-probs of one chunk of response tokens, forward and backward."""
    tokens = min(tokens, max(1, CHUNK_LOGITS // vlm.vocabulary))
    width = vlm.model.lm_head.weight.shape[1]
    hidden = torch.empty((tokens, width), dtype=getattr(torch, spec.dtype), requires_grad=True)
    with MemoryCounter() as counter:
        with _autocast(spec):
            logprobs, _ = Pass(vlm).score(hidden, torch.tensor([0] * tokens))
        logprobs.sum().backward()
    return counter.peak


@lru_cache(maxsize=64)
def generation_memory(spec: ModelSpec, batch: BatchSpec, prompts_per_batch: int) -> GenerationMemory:
    """The `hf` engine with so many prompts at a time: their images, their prefill, and the last token of
    responses that are all of full length."""
    mode, vlm = simulated_model(spec)
    row = max(1, PREFILL_TOKENS // batch.prompt)
    few, several = (row, 2 * row) if prompts_per_batch > 2 * row else (prompts_per_batch, prompts_per_batch)
    with mode, _kernels(vlm, spec), torch.no_grad():
        vlm.eval()
        prompts = [simulate.synthetic_prompt(vlm, batch.prompt, batch.image) for _ in range(several)]
        with MemoryCounter() as counter, _autocast(spec):
            first = next(BranchGrid.of(as_contexts(prompts[:few]), batch.group).split(PREFILL_TOKENS))
            vlm.vision([context.prompt for context in first.contexts])
        vision = counter.peak - (counter.live if vlm.vision.frozen else 0)
        with _cached_features(vlm, prompts):
            peaks = simulate.at_full_depth(_generation_peaks, vlm, prompts[:few], batch, spec)
            if few < prompts_per_batch:  # each further row takes as much as the second
                twice = simulate.at_full_depth(_generation_peaks, vlm, prompts, batch, spec)
                peaks = simulate.extrapolate(peaks, twice, few, prompts_per_batch)
        vlm.train()
    prefill_peak, decode_peak, cache = peaks
    peak = max(vision, prefill_peak, decode_peak)
    return GenerationMemory(peak - cache, cache)


def _generation_peaks(vlm: VLM, prompts: list[Prompt], batch: BatchSpec, spec: ModelSpec) -> tuple[int, ...]:
    """The peaks of the prefill and of the last token, and the bytes of all keys and values."""
    with MemoryCounter() as counter, _autocast(spec):
        before = counter.live
        state = prefill(vlm, BranchGrid.of(as_contexts(prompts), batch.group), NullRecorder())[1]
        prefill_peak = counter.peak
        tokens = torch.tensor([0] * len(prompts) * batch.group)
        state.step(tokens, tokens)
        simulate.extend_cache(state, max(0, batch.response - 2))
        cache, counter.peak = counter.live - before, counter.live
        sample(state.step(tokens, tokens), torch.empty(tokens.shape, dtype=torch.float64))
        return prefill_peak, counter.peak, cache


def _kernels(vlm: VLM, spec: ModelSpec) -> AbstractContextManager[None]:
    """Linear attention as a GPU computes it, in half precision; in float32 as transformers does."""
    half = spec.autocast or spec.dtype != "float32"
    return gpu_kernels(vlm.model) if half else nullcontext()


def _autocast(spec: ModelSpec) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=spec.autocast)
