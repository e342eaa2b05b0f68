"""Weights that stay in their files until a model is sharded; then each process reads its own rows of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from vlm_sapo.models.weights import own_rows

COMPARED_BYTES = 2**26
"""How much of two tensors is compared at once."""


class Slice(Protocol):
    """A tensor in a file; what an index selects is read when it is used."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, index: slice) -> torch.Tensor: ...


class TensorFiles:
    """The tensors of the safetensors files in a model's folder."""

    def __init__(self, path: str):
        self.files: dict[str, Path] = {}
        for file in _files(path):
            with safe_open(file, framework="pt") as opened:
                self.files |= dict.fromkeys(opened.keys(), file)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    @contextmanager
    def slices(self, names: Collection[str]) -> Iterator[dict[str, Slice]]:
        """Tensors by name. Their files are mapped into memory, which holds what was read of them, within the
        block alone."""
        with ExitStack() as stack:
            paths = sorted({self.files[name] for name in names})
            opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
            yield {name: opened[self.files[name]].get_slice(name) for name in names}

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors are the same."""
        with self.slices([first, second]) as slices:
            shape = slices[first].get_shape()
            if shape != slices[second].get_shape():
                return False
        count = max(COMPARED_BYTES // (4 * (torch.Size(shape[1:]).numel() or 1)), 1)
        for start in range(0, shape[0], count):
            with self.slices([first, second]) as slices:
                rows = slice(start, start + count)
                if not torch.equal(slices[first][rows], slices[second][rows]):
                    return False
        return True


def _files(path: str) -> list[Path]:
    folder = Path(path)
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


@dataclass(frozen=True)
class Source:
    """What a parameter is made of: names of the checkpoint's tensors by the converter's patterns, and the
    converter; without one it is a single tensor as it is."""

    names: dict[str, list[str]]
    converter: WeightConverter | None = None

    @property
    def all_names(self) -> list[str]:
        return [name for names in self.names.values() for name in names]


class UnreadWeights:
    """The weights of a model on the meta device, which has the checkpoint's parameters but no memory."""

    def __init__(self, model: PreTrainedModel, path: str):
        self.path, self.files = path, TensorFiles(path)
        self.sources = _sources(model, self.files)
        self._tie(model)

    def _tie(self, model: PreTrainedModel) -> None:
        """Ties the parameters that the config ties and the checkpoint holds twice, if they are the same."""
        for target, source in list(model.all_tied_weights_keys.items()):
            if not {target, source} <= self.sources.keys():
                continue
            names = [self.sources[name].all_names for name in (target, source)]
            if all(len(listed) == 1 for listed in names) and self.files.equal(names[0][0], names[1][0]):
                module, _, name = target.rpartition(".")
                setattr(model.get_submodule(module), name, model.get_parameter(source))
            else:
                model.all_tied_weights_keys.pop(target)

    @torch.no_grad()
    def read(self, model: nn.Module, *, filled: Collection[torch.Tensor] = ()) -> None:
        """Reads the weights into the model's memory: of a sharded parameter this process's rows alone. The
        process holds one tensor at most beside them. `filled` tensors are left as they are.

        Raises ValueError if the checkpoint has no weights for a parameter.
        """
        done = set(filled)
        named = list(
            chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        )
        for name, tensor in named:
            source = self.sources.get(name.replace(".base_layer.", "."))
            if source is not None and tensor not in done:
                self._read(name.replace(".base_layer.", "."), source, tensor)
                done.add(tensor)
        if missing := [name for name, tensor in named if tensor not in done]:
            raise ValueError(f"{self.path} must hold all weights; {missing[0]} is in none of its files")

    def _read(self, name: str, source: Source, tensor: torch.Tensor) -> None:
        rows = own_rows(tensor)
        local = _local(tensor)
        if not local.numel():
            return
        with self.files.slices(source.all_names) as slices:
            if source.converter is None:
                (tensor_slice,) = slices.values()
                local.copy_(tensor_slice[rows] if tensor.dim() else tensor_slice[...])
            else:
                local.copy_(_converted(name, source, slices, tensor.shape, rows))


def _converted(
    name: str, source: Source, slices: Mapping[str, Slice], shape: torch.Size, rows: slice
) -> torch.Tensor:
    """Rows of a parameter that is transposed or merged from several tensors, such as those of its experts."""
    converter = deepcopy(source.converter)
    first, *rest = converter.operations
    merges = isinstance(first, MergeModulelist) and first.dim == 0
    by_row = all(_keeps_rows(operation) for operation in (rest if merges else converter.operations))
    for pattern, names in source.names.items():
        for listed in names[rows] if merges and by_row else names:
            whole = slices[listed]
            converter.add_tensor(name, listed, pattern, whole[rows] if by_row and not merges else whole[:])
    expected = torch.empty(len(range(*rows.indices(shape[0]))), *shape[1:], device="meta")
    # Transpose compares with the parameter's shape, which is that of the rows here
    stand_in = SimpleNamespace(get_parameter=lambda _: expected if by_row else expected.new_empty(shape))
    value = converter.convert(name, model=stand_in)[name]
    value = value[0] if isinstance(value, list) else value
    return value if by_row else value[rows]


def _keeps_rows(operation: ConversionOps) -> bool:
    """Whether the rows of an operation's result depend on the same rows of its inputs alone."""
    if isinstance(operation, Transpose):
        return 0 not in (operation.dim0, operation.dim1)
    return isinstance(operation, Concatenate) and operation.dim != 0


def _sources(model: PreTrainedModel, names: Collection[str]) -> dict[str, Source]:
    """Sources by parameter: transformers' own renamings and conversions for the model, as when it loads
    them. Tensors that belong to no parameter are left out."""
    conversions = get_model_conversion_mapping(model)
    renamings = [item for item in conversions if isinstance(item, WeightRenaming)]
    converters = [item for item in conversions if isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, Source] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if target not in expected:
            continue
        if pattern is None:
            sources[target] = Source({name: [name]})
        else:
            source = sources.setdefault(target, Source({}, by_pattern[pattern]))
            source.names.setdefault(pattern, []).append(name)
    return sources


@torch.no_grad()
def give_memory(
    module: nn.Module, *, device: torch.device, whole: Sequence[nn.Module], whole_on: torch.device
) -> list[torch.Tensor]:
    """Gives a module's parameters memory on a device; those of its parts `whole`, and all buffers, on
    `whole_on`. Parameters and buffers that have a value keep it; returns these. What was one parameter stays
    one."""
    first: dict[torch.Tensor, str] = {}
    tied = {
        name: known
        for name, item in module.named_parameters(remove_duplicate=False)
        if (known := first.setdefault(item, name)) != name
    }
    values = {name: _local(item).clone() for name, item in module.named_parameters() if not item.is_meta}
    buffers = dict(module.named_buffers())
    module.to_empty(device=device)
    for part in whole:
        part.to_empty(device=whole_on)
    for name, known in tied.items():
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, module.get_parameter(known))
    parameters = dict(module.named_parameters())
    for name, value in values.items():
        _local(parameters[name]).copy_(value)
    for name, buffer in buffers.items():
        parent, _, own = name.rpartition(".")
        there = torch.empty_like(buffer, device=whole_on) if buffer.is_meta else buffer.to(whole_on)
        setattr(module.get_submodule(parent), own, there)
    named = dict(module.named_buffers())
    had_value = [name for name, buffer in buffers.items() if not buffer.is_meta]
    return [*(parameters[name] for name in values), *(named[name] for name in had_value)]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
