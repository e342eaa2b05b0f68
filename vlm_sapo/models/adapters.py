"""Low-rank adapters inside a model: what its weights are with them."""

from __future__ import annotations

import torch
from torch import nn


def merged(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by the names that they have without adapters, each with its active adapters added."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    found = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if not any(f".{part}." in name for layer in layers.values() for part in layer.adapter_layer_names)
    }
    for name, layer in layers.items():
        deltas = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters]
        found[f"{name}.weight"] = layer.get_base_layer().weight + sum(deltas)
    return found
