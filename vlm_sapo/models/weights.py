"""A model's weights in the format of published checkpoints, also if it is sharded or has adapters."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from vlm_sapo.models import lora as adapters
from vlm_sapo.models.families import FAMILIES
from vlm_sapo.models.file_modes import use_umask

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gathers a sharded tensor into host memory; any other is returned as it is. All processes must call this
    in the same order."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Converts a full tensor, the same on all processes, to the parameter's type, device and sharding."""
    return from_rows(tensor[own_rows(parameter)].to(parameter.dtype), parameter)


def own_rows(parameter: torch.Tensor) -> slice:
    """The rows, indices of the first dimension, that this process holds: all of a parameter that is not
    sharded. The last dimension of the mesh shards in equal parts, of which the last ones may be smaller."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    *others, placement = parameter.placements
    assert placement == Shard(0) and all(other.is_replicate() for other in others), "FSDP shards rows alone"
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    size = -(-rows // mesh.size(mesh.ndim - 1))
    start = min(mesh.get_local_rank(mesh.ndim - 1) * size, rows)
    return slice(start, min(start + size, rows))


def from_rows(rows: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A tensor of the parameter's size, device and sharding, from a copy of the rows that this process
    holds."""
    own = rows.to(parameter.device, copy=True)
    if not isinstance(parameter, DTensor):
        return own
    sizes = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(own, parameter.device_mesh, parameter.placements, run_check=False, **sizes)


def gather_and_drop(tensor: torch.Tensor) -> torch.Tensor:
    """Takes part in `full_tensor` for the other processes' sake; the result is an empty meta tensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to("meta")


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of a published checkpoint, not yet gathered or merged."""

    name: str
    parameter: torch.Tensor
    """Or a constant that checkpoints hold, such as the scale of a layer."""
    layer: LoraLayer | None
    """The layer whose adapter is merged into it."""
    transposed: bool
    """Whether checkpoints store the last two dimensions the other way round."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the full tensor, as it is stored."""
        shape = self.parameter.shape if self.layer is None else adapters.weight_shape(self.layer)
        return (shape[0], shape[2], shape[1]) if self.transposed else tuple(shape)

    def dtype_in(self, engine: torch.dtype) -> torch.dtype:
        """The dtype in which an engine of this dtype gets it. Vectors keep theirs: engines compute some, such
        as the decay of linear attention, in float32."""
        return engine if len(self.shape) > 1 else self.parameter.dtype

    def take(self, dtype: torch.dtype) -> torch.Tensor:
        """The full tensor for an engine, contiguous, on the device that computes. A sharded one is merged and
        cast before it is gathered, so that only `dtype` travels; all processes must call this."""
        weight = self._merged(on_device).to(self.dtype_in(dtype))
        return self._stored(weight.full_tensor() if isinstance(weight, DTensor) else weight).contiguous()

    def gather(self) -> torch.Tensor:
        """The full tensor in the parameter's own dtype, for saving; a view of the parameter where nothing has
        to be computed. A sharded one comes to host memory; all processes must call this."""
        return self._stored(full_tensor(self._merged()))

    def drop(self) -> torch.Tensor:
        """Takes part in `gather` for the other processes' sake; the result is an empty meta tensor."""
        if isinstance(self.parameter, DTensor):
            return self._stored(gather_and_drop(self._merged()))
        return torch.empty(self.shape, dtype=self.parameter.dtype, device="meta")

    def _merged(self, move: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> torch.Tensor:
        if self.layer is None:
            return move(self.parameter.detach())
        return adapters.merged(self.layer, move)

    def _stored(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.transpose(1, 2) if self.transposed else weight


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Moves the part of an offloaded tensor to the device of its mesh; any other is returned as it is."""
    if not isinstance(tensor, DTensor) or tensor.to_local().device.type == tensor.device_mesh.device_type:
        return tensor
    own, sizes = tensor.to_local(), {"shape": tensor.shape, "stride": tensor.stride()}
    own = own.to(tensor.device_mesh.device_type)
    return DTensor.from_local(own, tensor.device_mesh, tensor.placements, run_check=False, **sizes)


def stored_weights(model: nn.Module) -> list[StoredWeight]:
    """The weights with the names and layout of published checkpoints, adapters merged, tied ones once, in the
    order of the layers.

    The experts of a layer stay one tensor, transposed where the family's checkpoints store it so:
    transformers loads every form, but would save a different one.
    """
    layers = adapters.layers(model)
    parameters: dict[str, tuple[torch.Tensor, LoraLayer | None]] = {}
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    for name in _stored_names(model):
        if name in tensors and ".lora_" not in name:
            parameter = tensors[name]
            path, _, kind = name.rpartition(".base_layer.")
            layer = layers[path] if kind == "weight" else None
            parameters[name.replace(".base_layer.", ".")] = parameter, layer
    names = _published_names(model, [name for name in parameters if not name.endswith(EXPERTS)])
    transposed = FAMILIES[model.config.model_type].experts_transposed
    return [
        StoredWeight(names.get(name, name), parameter, layer, transposed and name.endswith(EXPERTS))
        for name, (parameter, layer) in parameters.items()
    ]


def _stored_names(model: nn.Module) -> Iterator[str]:
    """Names of parameters and buffers that files hold, in the order of the modules; what `state_dict` has as
    keys, without its hooks, which a sharded model may not run here."""
    for path, module in model.named_modules():
        own = (*module._parameters, *module._buffers)
        yield from (
            f"{path}.{name}" if path else name
            for name in own
            if name not in module._non_persistent_buffers_set
        )


def _published_names(model: nn.Module, names: list[str]) -> dict[str, str]:
    """The names that transformers saves these parameters under. It renames state dicts only, so it gets one
    of empty tensors, each as long as its index."""
    stand_ins = {name: torch.empty(index, device="meta") for index, name in enumerate(names)}
    renamed = {len(item): name for name, item in revert_weight_conversion(model, stand_ins).items()}
    assert sorted(renamed) == list(range(len(names))), "transformers would compute weights, not only rename"
    return {name: renamed[index] for index, name in enumerate(names)}


@torch.no_grad()
def hf_state_dict(model: nn.Module, *, keep: bool = True) -> dict[str, torch.Tensor]:
    """All `stored_weights`, to save them. A process without `keep` takes part in gathering sharded ones and
    gets empty tensors."""
    return {item.name: item.gather() if keep else item.drop() for item in stored_weights(model)}


@torch.no_grad()
def stream_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """All `stored_weights` for an engine of this dtype, one after the other: only those that the receiver
    keeps take memory. For a sharded model all processes must iterate to the end."""
    for item in stored_weights(model):
        yield item.name, item.take(dtype)


def save_model(model: nn.Module, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Writes config and weights so that both transformers and vLLM load them."""
    save_config(model, folder)
    weights = hf_state_dict(model) if weights is None else weights
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    use_umask(folder)


def save_config(model: nn.Module, folder: Path) -> None:
    """Writes the configs of model and generation, without weights."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if adapters.attached(model):  # merged weights are not in 4 bits
        config.__dict__.pop("quantization_config", None)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def save_share(folder: Path, weights: dict[str, torch.Tensor], *, writer: int, writers: int) -> None:
    """Writes the weights of one of several processes, which together write a model."""
    tensors = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / _share(writer, writers), metadata={"format": "pt"})
    use_umask(folder)


def save_index(folder: Path, writer_of: dict[str, int], *, size: int, writers: int) -> None:
    """Writes which file of `save_share` holds which weight; `size` is the bytes of all."""
    files = {name: _share(writer, writers) for name, writer in writer_of.items()}
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1))


def _share(writer: int, writers: int) -> str:
    return f"model-{writer + 1:05d}-of-{writers:05d}.safetensors"
