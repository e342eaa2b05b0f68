"""A model's weights in the format of published checkpoints, also if it is sharded or has adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.core_model_loading import revert_weight_conversion

from vlm_sapo.models import lora as adapters
from vlm_sapo.models.families import FAMILIES
from vlm_sapo.models.file_modes import use_umask

Gather = Callable[[torch.Tensor], torch.Tensor]
"""Makes a full tensor of a parameter that may be sharded."""
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gathers a sharded tensor into host memory; any other is returned as it is. All processes must call this
    in the same order."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Converts a full tensor, the same on all processes, to the parameter's type, device and sharding."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device, parameter.dtype)
    mesh, placements = parameter.device_mesh, parameter.placements
    own = distribute_tensor(tensor.to(parameter.dtype), mesh, placements, src_data_rank=None).to_local()
    sizes = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(own.to(parameter.device), mesh, placements, run_check=False, **sizes)


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


def gather_and_drop(tensor: torch.Tensor) -> torch.Tensor:
    """Takes part in `full_tensor` for the other processes' sake; the result is an empty meta tensor."""
    return full_tensor(tensor).to("meta")


@torch.no_grad()
def hf_state_dict(model: nn.Module, gather: Gather = full_tensor) -> dict[str, torch.Tensor]:
    """The state dict with the names and layout of published checkpoints, adapters merged. Tensors are views
    of the parameters where nothing has to be computed.

    The experts of a layer stay one tensor, transposed where the family's checkpoints store it so:
    transformers loads every form, but would save a different one.
    """
    if adapters.attached(model):
        weights = adapters.merged(model, gather)
    else:
        weights = {name: gather(weight.detach()) for name, weight in model.named_parameters()}
    transposed = FAMILIES[model.config.model_type].experts_transposed
    experts = {name: weights.pop(name) for name in list(weights) if name.endswith(EXPERTS)}
    return revert_weight_conversion(model, weights) | {
        name: weight.transpose(1, 2) if transposed else weight for name, weight in experts.items()
    }


def save_model(model: nn.Module, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Writes config and weights so that both transformers and vLLM load them."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if adapters.attached(model):  # merged weights are not in 4 bits
        config.__dict__.pop("quantization_config", None)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = hf_state_dict(model) if weights is None else weights
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    use_umask(folder)
