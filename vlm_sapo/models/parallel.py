"""One model over several processes: each holds a part of every parameter, and layers are gathered when they
are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from vlm_sapo.models.vlm import VLM

T = TypeVar("T")


class Root(nn.Module):
    """Runs work inside its own forward pass, where a sharded model's outermost parameters are gathered."""

    def __init__(self, vlm: VLM):
        super().__init__()
        self.vlm = vlm

    def forward(self, work: Callable[..., T], *args) -> T:
        return work(*args)


def shard(vlm: VLM, mesh: DeviceMesh, *, dtype: torch.dtype | None, offload: bool) -> Root:
    """Shards the model in place over the last dimension of `mesh`; a dimension before it holds copies.

    Decoder layers and the vision tower's blocks are gathered one by one, in `dtype` if given; embeddings,
    head and norms stay gathered during a pass. A frozen tower stays whole on each device, since processes
    look at different numbers of pictures. Gradients are summed, not averaged.
    """
    visual, device = vlm.model.model.visual, torch.device(mesh.device_type)
    kept = set(visual.parameters()) if vlm.vision.frozen else set()
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
        "ignored_params": kept,
    }
    layers = list(vlm.model.model.language_model.layers)
    for layer in layers if kept else [*visual.blocks, *layers]:
        fully_shard(layer, **options)
    root = Root(vlm)
    fully_shard(root, **options)
    for unit in _units(root):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    if kept:
        visual.to(device)
    vlm.vision.device, vlm.vision.always = device, not kept
    return root


@torch.no_grad()
def run_alone(root: Root, work: Callable[[], T]) -> T:
    """Runs work on the whole model, which every process gathers once. Not for gradients."""
    units = _units(root)

    def gathered() -> T:
        for unit in units:
            unit.unshard()
        return work()

    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        return root(gathered)
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not root, recurse=False)


def _units(root: Root) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]
