"""What the passes of a model take: the real code, run without memory and counted. Bytes, unless said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from vlm_sapo.models.decoding import BranchGrid, prefill
from vlm_sapo.models.experts import NullRecorder
from vlm_sapo.models.forward import CHUNK_LOGITS, Pass
from vlm_sapo.models.packing import GroupSlice, Inputs, choose
from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.engine import as_contexts
from vlm_sapo.rollout.hf import sample
from vlm_sapo.tools.plan import simulate
from vlm_sapo.tools.plan.memory import FOUR_BITS, Held
from vlm_sapo.tools.plan.simulate import Memory, Simulation
from vlm_sapo.types import Prompt


@dataclass(frozen=True)
class Load:
    """How a model is loaded. With `rank` adapters are trained on the linear layers of `parts`."""

    path: str
    dtype: str
    autocast: bool
    gradient_checkpointing: bool
    freeze: tuple[str, ...] = ()
    rank: int | None = None
    parts: tuple[str, ...] = ()
    bits: int | None = None
    layout: str = "shared"


@dataclass(frozen=True)
class Rows:
    """What goes through it, in tokens: a prompt, its picture's part of it, a response, `budget` of a
    micro-batch; `group` responses."""

    prompt: int
    image: int
    response: int
    group: int
    budget: int


@dataclass(frozen=True)
class Training:
    activations: int
    logits: int
    features: int
    """Of one prompt's picture, where they are kept."""
    room: int
    """For kept features on the device."""


@dataclass(frozen=True)
class Generating:
    activations: int
    cache: int
    """Keys and values of prompts and responses."""


@lru_cache(maxsize=2)
def opened(load: Load) -> tuple[Simulation, VLM]:
    """The model without values, with the mode that it lives in."""
    return simulate.outline(
        load.path,
        dtype=load.dtype,
        gradient_checkpointing=load.gradient_checkpointing,
        freeze=load.freeze,
        rank=load.rank,
        parts=load.parts,
    )


@lru_cache(maxsize=64)
def held(load: Load) -> tuple[Held, ...]:
    """The parameters."""
    _, vlm = opened(load)
    found = []
    for name, parameter in vlm.model.named_parameters():
        adapted = name.endswith(".base_layer.weight")
        size = FOUR_BITS if adapted and load.bits else parameter.element_size()
        layer = next((place for place in (".layers.", ".blocks.") if place in name), None)
        unit = "root" if layer is None else layer + name.split(layer)[1].split(".")[0]
        unit = "whole" if vlm.vision.frozen and "visual." in name else unit
        found.append(Held(unit, parameter.numel(), size, parameter.requires_grad, adapted))
    return tuple(found)


@lru_cache(maxsize=64)
def training(load: Load, rows: Rows) -> Training:
    """A micro-batch's forward and backward pass, beside weights, gradients and kept features."""
    mode, vlm = opened(load)
    with mode:
        groups = micro_batch(vlm, rows, load.layout)
        inputs = choose(load.layout, attends_fully=vlm.attends_fully).inputs(groups)
        for parameter in vlm.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        look = Look(0, 0, 0, 0) if vlm.vision.frozen else _learn_to_look(vlm, inputs.prompts, load)
        with _looked(vlm, inputs.prompts) as features:
            forward, backward = simulate.at_full_depth(vlm, lambda: _update(vlm, inputs, load))
        peak = max(look.forward, look.inside + forward, look.saved + backward, look.backward)
        logits = _scoring(vlm, load, len(inputs.targets))
    kept = features // len(groups) if vlm.vision.frozen else 0
    return Training(peak - logits, logits, kept, vlm.vision.budget)


@dataclass(frozen=True)
class Look:
    """A trained tower's pass: its highest memory in each direction, and what it leaves for the way back, in
    the forward pass of the language model and afterwards."""

    forward: int
    backward: int
    inside: int
    saved: int


def _learn_to_look(vlm: VLM, prompts: list[Prompt], load: Load) -> Look:
    with Memory() as memory:
        with _precision(load):
            features = vlm.vision(prompts)
            forward, inside = memory.peak, memory.live
        saved = memory.peak = memory.live
        if features is not None:
            sum(tensor.sum() for tensor in (features.tokens, *features.deep)).backward()
    return Look(forward, memory.peak, inside, saved)


@contextmanager
def _looked(vlm: VLM, prompts: list[Prompt]) -> Iterator[int]:
    """Inside, the features of prompts are kept; of a trained tower they take gradients. Yields their
    bytes."""
    visual = vlm.model.model.visual
    trained = [parameter for parameter in visual.parameters() if parameter.requires_grad]
    visual.requires_grad_(False)
    vlm.vision(prompts)
    kept = [vlm.vision.kept[prompt] for prompt in dict.fromkeys(prompts) if prompt in vlm.vision.kept]
    for tensor in (tensor for item in kept for tensor in (item.tokens, *item.deep)):
        tensor.requires_grad_(bool(trained))
    yield sum(item.num_bytes for item in kept)
    for parameter in trained:
        parameter.requires_grad_(True)


def picture(load: Load, rows: Rows) -> int:
    """The pixels of one prompt, in host memory."""
    mode, vlm = opened(load)
    with mode:
        pixels = simulate.draw_prompt(vlm, rows.prompt, rows.image).pixels
    return 0 if pixels is None else pixels.nbytes


def micro_batch(vlm: VLM, rows: Rows, layout: str = "shared") -> list[GroupSlice]:
    """Groups that fill the budget, the last one with fewer responses; at least one response."""
    shared = layout == "shared" and vlm.attends_fully
    return [
        GroupSlice(prompt, tuple(simulate.fake_response(prompt, length) for length in lengths))
        for lengths in (_branches(rows) if shared else _copies(rows))
        for prompt in [simulate.draw_prompt(vlm, rows.prompt, rows.image)]
    ]


def _branches(rows: Rows) -> Iterator[list[int]]:
    """The lengths of each group's responses, where a group has its prompt once."""
    left = max(rows.budget, rows.prompt + rows.response)
    while left > rows.prompt:
        lengths = []
        left -= rows.prompt
        while left > 0 and len(lengths) < rows.group:
            lengths.append(min(rows.response, left))
            left -= lengths[-1]
        yield lengths


def _copies(rows: Rows) -> Iterator[list[int]]:
    """The same where each response has its own prompt."""
    left = max(1, rows.budget // (rows.prompt + rows.response))
    while left:
        yield [rows.response] * min(left, rows.group)
        left -= min(left, rows.group)


def _update(vlm: VLM, inputs: Inputs, load: Load) -> tuple[int, int]:
    """The highest memory of the forward and of the backward pass."""
    with Memory() as memory:
        with _precision(load):
            scores = Pass(vlm)(inputs)
        loss, forward = scores.logprobs.sum(), memory.peak
        memory.peak = memory.live
        loss.backward()
    return forward, memory.peak


def _scoring(vlm: VLM, load: Load, tokens: int) -> int:
    """The log-probs of one chunk of response tokens, forwards and backwards."""
    tokens = min(tokens, max(1, CHUNK_LOGITS // vlm.vocabulary))
    width = vlm.model.lm_head.weight.shape[1]
    hidden = torch.empty((tokens, width), dtype=getattr(torch, load.dtype), requires_grad=True)
    with Memory() as memory:
        with _precision(load):
            logprobs, _ = Pass(vlm).score(hidden, torch.tensor([0] * tokens))
        logprobs.sum().backward()
    return memory.peak


@lru_cache(maxsize=64)
def generating(load: Load, rows: Rows, at_once: int) -> Generating:
    """The embedded engine with so many prompts at once: their pictures, their prefill, and the last token of
    responses that are all of full length."""
    mode, vlm = opened(load)
    with mode, torch.no_grad():
        vlm.eval()
        prompts = [simulate.draw_prompt(vlm, rows.prompt, rows.image) for _ in range(at_once)]
        with Memory() as memory, _precision(load):
            vlm.vision(prompts)
        looking = memory.peak - (memory.live if vlm.vision.frozen else 0)
        with _looked(vlm, prompts):
            reading, decode, cache = simulate.at_full_depth(vlm, lambda: _generate(vlm, prompts, rows, load))
        vlm.train()
    peak = max(looking, reading, decode)
    return Generating(peak - cache, cache)


def _generate(vlm: VLM, prompts: list[Prompt], rows: Rows, load: Load) -> tuple[int, ...]:
    """The highest memory of the prefill and of the last token, and that of all keys and values."""
    with Memory() as memory, _precision(load):
        before = memory.live
        branches = prefill(vlm, BranchGrid.of(as_contexts(prompts), rows.group), NullRecorder())[1]
        highest = memory.peak
        tokens = torch.tensor([0] * len(prompts) * rows.group)
        branches.step(tokens, tokens)
        simulate.lengthen(branches, max(0, rows.response - 2))
        kept, memory.peak = memory.live - before, memory.live
        sample(branches.step(tokens, tokens), torch.empty(tokens.shape, dtype=torch.float64))
        return highest, memory.peak, kept


def _precision(load: Load) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16, enabled=load.autocast)
