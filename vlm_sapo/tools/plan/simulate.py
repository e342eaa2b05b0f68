"""Runs a model's own code without its memory: on tensors that have shape and dtype but no values, and counts
the bytes that they would take.

What decides shapes (token ids, positions, image grids) keeps its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import finalize

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from vlm_sapo.models import attention
from vlm_sapo.models import lora as adapters
from vlm_sapo.models.decoding import DecodeState, ForkedDecodeState
from vlm_sapo.models.families import check_family
from vlm_sapo.models.linear import FULL
from vlm_sapo.models.loading import silence_dropout
from vlm_sapo.models.vlm import VLM, part_of
from vlm_sapo.tools.plan.shapes import published_shape
from vlm_sapo.types import Example, Prompt, Response, one_line

MAX_ELEMENTS_WITH_VALUES = 2**22
"""Larger tensors lose their values."""
INTEGER_DTYPES = (torch.int64, torch.bool)
"""Dtypes of ids, positions and masks."""
INDEX_OPS = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)
NO_TOKENIZER = SimpleNamespace(
    eos_token_id=None, convert_tokens_to_ids=lambda tokens: [], get_added_vocab=dict
)
"""A plan needs no tokens."""
MEASURED_LAYERS = 2
"""Decoder layers that are run, or one period where kinds of layers alternate: memory is linear in their
number."""


class Simulation(FakeTensorMode):
    """Makes new tensors without values, except integers and what is computed from values alone: ranges, lists
    of numbers and what follows from them."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        has_values = all(_has_values(tensor) for tensor in inputs)
        sized = any(isinstance(argument, list | tuple) for argument in args)
        if has_values and (inputs or not sized or kwargs.get("dtype") in INTEGER_DTYPES):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in INDEX_OPS:  # the shape depends on a mask's values
            indices = [item for index in args[1] for item in _mask_to_indices(index)]
            args = (args[0], indices, *args[2:])
        return super().__torch_dispatch__(func, types, args, kwargs)


def _has_values(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and tensor.numel() <= MAX_ELEMENTS_WITH_VALUES


def _mask_to_indices(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A mask as the indices where it is true, along each of its dimensions; everywhere if it has no
    values."""
    if index is None or index.dtype != torch.bool:
        return [index]
    with unset_fake_temporarily():
        mask = index if _has_values(index) else torch.ones(tuple(index.shape), dtype=torch.bool)
        return list(mask.nonzero(as_tuple=True))


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of the tensors that are created inside: those alive now, and the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        inputs = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(outputs):
            if id(storage) not in inputs and storage not in self.seen:
                self._add(storage)
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.seen[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.live -= size


def _storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@dataclass(frozen=True)
class ModelSpec:
    """How a model is loaded and computes. With `lora_rank`, adapters are trained on the linear layers of
    `lora_parts`."""

    path: str
    dtype: str
    autocast: bool
    gradient_checkpointing: bool
    freeze: tuple[str, ...] = ()
    lora_rank: int | None = None
    lora_parts: tuple[str, ...] = ()
    lora_bits: int | None = None
    layout: str = "shared"


def outline(spec: ModelSpec) -> tuple[Simulation, VLM]:
    """A model of a checkpoint's shape, from its config.json alone, and the mode in which it runs.

    Raises ValueError where there is no config of a vision-language model that is supported.
    """
    config, mode = read_config(spec.path), Simulation()
    check_family(config.model_type, f"the model type of model.path {spec.path}").check(config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, spec.dtype))
        if spec.lora_rank is not None:
            targets = adapters.targets(model, part_of, spec.lora_parts)
            adapters.add(model, targets, rank=spec.lora_rank, alpha=spec.lora_rank, base="")
    with mode:
        _leave_meta(model)
        model.set_attn_implementation({"text_config": attention.NAME, "vision_config": attention.VISION_NAME})
        model.train()
        silence_dropout(model)
        if spec.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        vlm = VLM(model, SimpleNamespace(tokenizer=NO_TOKENIZER))
        vlm.patch_embed_as_linear()
        if spec.lora_rank is None:
            vlm.freeze(list(spec.freeze))
    return mode, vlm


def _leave_meta(model: nn.Module) -> None:
    """Gives every parameter and buffer a tensor of the simulation; tied ones stay tied."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if old not in replaced:
                new = torch.empty(tuple(old.shape), dtype=old.dtype)
                replaced[old] = nn.Parameter(new, requires_grad=old.requires_grad)
            module.register_parameter(name, replaced[old])
        for name, old in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(tuple(old.shape), dtype=old.dtype), persistent=False)


def read_config(path: str) -> PretrainedConfig:
    """The config of a folder or hub id; that of a published model is known without a network. Raises
    ValueError where it is not a vision-language model."""
    if not Path(path).exists() and (shape := published_shape(path)) is not None:
        return AutoConfig.for_model(**shape)
    requirement = f"model.path ({path}) must be a folder with a config.json or a hub id"
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"{requirement}; there is no config.json in that folder")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{requirement}; {one_line(error, 300)}") from error
    if "vision_config" not in config.to_dict():
        raise ValueError(
            f"model.path ({path}) is a {config.model_type}; use a vision-language model (docs/families.md)"
        )
    return config


def synthetic_prompt(vlm: VLM, tokens: int, image_tokens: int) -> Prompt:
    """A prompt of `tokens` tokens, of which at most `image_tokens` are one square image's. Call it inside a
    Simulation."""
    config, family = vlm.model.config, vlm.family
    pixels, grid = family.blank_image(config, image_tokens)
    smallest_fits = image_tokens and sum(family.image_tokens(config, grid)) < tokens
    image_tokens = sum(family.image_tokens(config, grid)) if smallest_fits else 0
    ids = [0, *[vlm.model.config.image_token_id] * image_tokens, *[0] * (tokens - image_tokens - 1)]
    return Prompt(
        example=Example("", "", ""),
        text="",
        opening="",
        ids=torch.tensor(ids),
        positions=torch.arange(tokens).expand(3, -1),
        images=(),
        pixels=pixels if image_tokens else None,
        grid=grid if image_tokens else None,
    )


def synthetic_response(prompt: Prompt, tokens: int) -> Response:
    """A response of so many tokens; call it inside a Simulation."""
    ids = torch.tensor([0] * tokens)
    return Response.sampled(prompt.positions, ids, torch.zeros(tokens), text="", finish="stop")


@contextmanager
def _first_layers(vlm: VLM, depth: int) -> Iterator[None]:
    """Runs only the first `depth` decoder layers inside."""
    language = vlm.language
    layers = language.layers
    language.layers = layers[:depth]
    try:
        yield
    finally:
        language.layers = layers


def at_full_depth(measure: Callable[..., tuple[int, ...]], vlm: VLM, *args: Any) -> tuple[int, ...]:
    """What `measure(vlm, *args)` returns for the whole model, extrapolated from two runs with a few decoder
    layers."""
    layers = len(vlm.language.layers)
    hybrid = vlm.layer_kinds != {FULL}
    depth = _period(vlm.model.config.get_text_config().layer_types) if hybrid else MEASURED_LAYERS
    if layers <= 2 * depth:
        return measure(vlm, *args)
    with _first_layers(vlm, depth):
        few = measure(vlm, *args)
    with _first_layers(vlm, 2 * depth):
        twice = measure(vlm, *args)
    return extrapolate(few, twice, depth, layers)


def extrapolate(few: tuple[int, ...], twice: tuple[int, ...], count: int, total: int) -> tuple[int, ...]:
    """What `total` layers or prompts take, where `count` take `few` and twice as many take `twice`."""
    return tuple(a + (b - a) * (total - count) // count for a, b in zip(few, twice, strict=True))


def _period(kinds: list[str]) -> int:
    """Layers from one with full attention to the next."""
    full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    return full[1] - full[0] if len(full) > 1 else len(kinds)


def extend_cache(state: DecodeState, tokens: int) -> None:
    """Makes every response of a decode state `tokens` tokens longer."""
    for number, layer in enumerate(state.cache.layers):
        if isinstance(layer, DynamicLayer):
            shape = (*layer.keys.shape[:2], tokens, layer.keys.shape[3])
            keys, values = (torch.empty(shape, dtype=old.dtype) for old in (layer.keys, layer.values))
            state.cache.update(keys, values, number)
    if isinstance(state, ForkedDecodeState):
        state.mask = pad(state.mask, (0, tokens), value=True)
