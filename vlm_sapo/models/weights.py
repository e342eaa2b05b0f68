"""A model's weights as published checkpoints have them, also of a model that is sharded or has adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.core_model_loading import revert_weight_conversion

from vlm_sapo.models import lora as adapters
from vlm_sapo.models.families import FAMILIES

Take = Callable[[torch.Tensor], torch.Tensor]
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of all processes' parts, in host memory; one that isn't sharded as it is. All processes must
    call this in the same order."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A tensor that all processes have in the parameter's type and place, sharded as it is."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device, parameter.dtype)
    mesh, placements = parameter.device_mesh, parameter.placements
    own = distribute_tensor(tensor.to(parameter.dtype), mesh, placements, src_data_rank=None).to_local()
    sizes = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(own.to(parameter.device), mesh, placements, run_check=False, **sizes)


def discarded(tensor: torch.Tensor) -> torch.Tensor:
    """Takes part in `whole`, and keeps nothing of what it gives."""
    return whole(tensor).to("meta")


@torch.no_grad()
def stored_weights(model: nn.Module, take: Take = whole) -> dict[str, torch.Tensor]:
    """The weights as published checkpoints name and lay them out, adapters merged; views where nothing has to
    be computed. `take` makes a parameter a whole tensor.

    Experts' matrices stay whole, and are turned where the family's checkpoints have them so. transformers
    takes every form when it loads, but would save another one.
    """
    if adapters.attached(model):
        held = adapters.merged(model, take)
    else:
        held = {name: take(weight.detach()) for name, weight in model.named_parameters()}
    turned = FAMILIES[model.config.model_type].experts_turned
    experts = {name: held.pop(name) for name in list(held) if name.endswith(EXPERTS)}
    return revert_weight_conversion(model, held) | {
        name: weight.transpose(1, 2) if turned else weight for name, weight in experts.items()
    }


def save_model(model: nn.Module, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Writes config and weights, in a form that both transformers and vLLM load."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if adapters.attached(model):  # what is merged is not in 4 bits
        config.__dict__.pop("quantization_config", None)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = stored_weights(model) if weights is None else weights
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
