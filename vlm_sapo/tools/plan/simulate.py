"""A model's own code without its memory: tensors that have shape and type but no values, and a count of the
bytes that they would take.

What decides shapes (token ids, positions, picture grids) keeps its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from weakref import finalize

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.cache_utils import DynamicLayer

from vlm_sapo.models import attention
from vlm_sapo.models import lora as adapters
from vlm_sapo.models.decoding import DecodeState, ForkedDecodeState
from vlm_sapo.models.loading import silence_dropout
from vlm_sapo.models.vlm import VLM, part_of
from vlm_sapo.types import Example, Prompt, Response

LARGEST_KNOWN = 2**22
"""Elements of the largest tensor that keeps its values."""
WHOLE_NUMBERS = (torch.int64, torch.bool)
"""Types of ids, positions and masks."""
MASKED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
DEPTH = 2
"""Decoder layers that are run, or as many as there are kinds in turn; a model's memory is linear in their
number."""


class Simulation(FakeTensorMode):
    """Inside, new tensors have no values, except whole numbers and what is computed from values alone:
    ranges, lists of numbers and all that comes of them."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = all(_is_known(tensor) for tensor in given)
        sized = any(isinstance(argument, list | tuple) for argument in args)
        if known and (given or not sized or kwargs.get("dtype") in WHOLE_NUMBERS):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in MASKED:  # the shape depends on a mask's values
            places = [place for index in args[1] for place in _as_places(index)]
            args = (args[0], places, *args[2:])
        return super().__torch_dispatch__(func, types, args, kwargs)


def _is_known(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and tensor.numel() <= LARGEST_KNOWN


def _as_places(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A mask as the places where it is true, along each of its dimensions."""
    if index is None or not _is_known(index) or index.dtype != torch.bool:
        return [index]
    with unset_fake_temporarily():
        return list(index.nonzero(as_tuple=True))


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and live, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(made):
            if id(storage) not in given and storage not in self.seen:
                self._add(storage)
        return made

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


def outline(
    path: str,
    *,
    dtype: str,
    gradient_checkpointing: bool = False,
    freeze: Sequence[str] = (),
    rank: int | None = None,
    parts: Sequence[str] = (),
) -> tuple[Simulation, VLM]:
    """A model of a checkpoint's shape, from its config.json alone, and the mode that it lives in. With a
    `rank` the linear layers of `parts` have adapters.

    Raises ValueError where there is no config of a vision-language model.
    """
    config, mode = read_config(path), Simulation()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
        if rank is not None:
            adapters.add(model, adapters.targets(model, part_of, parts), rank=rank, alpha=rank, base="")
    with mode:
        _leave_meta(model)
        model.set_attn_implementation({"text_config": attention.NAME, "vision_config": attention.VISION_NAME})
        model.train()
        silence_dropout(model)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        vlm = VLM(model, SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=None)))
        vlm.as_matrix_product()
        if rank is None:
            vlm.freeze(list(freeze))
    return mode, vlm


def _leave_meta(model: nn.Module) -> None:
    """Gives every parameter and buffer a tensor of the simulation; tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if old not in made:
                new = torch.empty(tuple(old.shape), dtype=old.dtype)
                made[old] = nn.Parameter(new, requires_grad=old.requires_grad)
            module.register_parameter(name, made[old])
        for name, old in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(tuple(old.shape), dtype=old.dtype), persistent=False)


def read_config(path: str):
    """The config of a folder or hub id. Raises ValueError where it is none of a vision-language model."""
    wanted = f"model.path ({path}) must be a folder with a config.json or a hub id that can be reached"
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"{wanted}; there is no config.json in that folder")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"{wanted}; {error}") from error
    if "vision_config" not in config.to_dict():
        raise ValueError(
            f"model.path ({path}) is a {config.model_type}; use a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model"
        )
    return config


def draw_prompt(vlm: VLM, tokens: int, image_tokens: int) -> Prompt:
    """A prompt of so many tokens, some of them for one picture; call it inside a Simulation."""
    vision = vlm.model.config.vision_config
    side = vision.spatial_merge_size * int(image_tokens**0.5)  # patches
    taken = side**2 // vision.spatial_merge_size**2
    ids = [0, *[vlm.model.config.image_token_id] * taken, *[0] * (tokens - taken - 1)]
    pixels = torch.empty(side**2, vlm.model.model.visual.patch_embed.proj.weight[0].numel())
    return Prompt(
        example=Example("", "", ""),
        text="",
        opening="",
        ids=torch.tensor(ids),
        positions=torch.arange(tokens).expand(3, -1),
        images=(),
        pixels=pixels if taken else None,
        grid=torch.tensor([[1, side, side]]) if taken else None,
    )


def fake_response(prompt: Prompt, tokens: int) -> Response:
    """A response of so many tokens; call it inside a Simulation."""
    ids = torch.tensor([0] * tokens)
    return Response.sampled(prompt.positions, ids, torch.zeros(tokens), text="", finish="stop")


@contextmanager
def _shallow(vlm: VLM, depth: int) -> Iterator[None]:
    language, config = vlm.model.model.language_model, vlm.model.config.get_text_config()
    layers = language.layers
    language.layers, config.num_hidden_layers = layers[:depth], depth
    try:
        yield
    finally:
        language.layers, config.num_hidden_layers = layers, len(layers)


def at_full_depth(vlm: VLM, measure: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    """What `measure` would give for the whole model, from two runs with a few of its decoder layers."""
    layers = len(vlm.model.model.language_model.layers)
    depth = DEPTH if vlm.attends_fully else _period(vlm.model.config.get_text_config().layer_types)
    if layers <= 2 * depth:
        return measure()
    with _shallow(vlm, depth):
        few = measure()
    with _shallow(vlm, 2 * depth):
        twice = measure()
    return tuple(a + (b - a) * (layers - depth) // depth for a, b in zip(few, twice, strict=True))


def _period(kinds: list[str]) -> int:
    """Layers from one with full attention to the next."""
    full = [place for place, kind in enumerate(kinds) if kind == "full_attention"]
    return full[1] - full[0] if len(full) > 1 else len(kinds)


def lengthen(branches: DecodeState, tokens: int) -> None:
    """Lets branches that have begun be so many tokens longer."""
    for number, layer in enumerate(branches.cache.layers):
        if isinstance(layer, DynamicLayer):
            shape = (*layer.keys.shape[:2], tokens, layer.keys.shape[3])
            keys, values = (torch.empty(shape, dtype=old.dtype) for old in (layer.keys, layer.values))
            branches.cache.update(keys, values, number)
    if isinstance(branches, ForkedDecodeState):
        branches.mask = pad(branches.mask, (0, tokens), value=True)
