"""Parallelism over processes: replicated weights, or fully sharded ones (FSDP2), gathered layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from vlm_sapo.distributed import World
from vlm_sapo.models.experts import RoutedPass
from vlm_sapo.models.forward import Pass, Scores
from vlm_sapo.models.packing import Inputs
from vlm_sapo.models.unread import give_memory
from vlm_sapo.models.vlm import VLM

T = TypeVar("T")


class Root(nn.Module):
    """FSDP's root module: runs work inside its forward pass, where the root's own parameters are gathered."""

    def __init__(self, vlm: VLM):
        super().__init__()
        self.vlm = vlm

    def forward(self, work: Callable[..., T], *args) -> T:
        return work(*args)


def prefetched_layers(shard: int, local: int) -> int:
    """How many layers are gathered ahead of the current one, if `shard` processes share a model and a node
    has `local`: over a network, whose delays vary, one more."""
    return 1 if shard <= local else 2


def shard(
    vlm: VLM,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None,
    offload: bool,
    reduce_dtype: torch.dtype = torch.float32,
    prefetch: int = 1,
) -> Root:
    """Shards the model in place over the last dimension of `mesh`; a dimension before it replicates.

    Decoder layers and the vision tower's blocks are gathered one by one, in `dtype` unless None; embeddings,
    head and norms stay gathered during a pass. A frozen tower is replicated on each device, since processes
    encode different numbers of images. Gradients are summed, not averaged, over processes in `reduce_dtype`
    and over passes in the parameters' own. While a layer computes, the next `prefetch` ones are gathered.
    Weights that are still unread are read then, by each process its own rows.
    """
    device, whole = torch.device(mesh.device_type), vlm.vision.modules if vlm.vision.frozen else []
    replicated = {parameter for module in whole for parameter in module.parameters()}
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(dtype, reduce_dtype, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
        "ignored_params": replicated,
    }
    stacks = [
        vlm.language.layers,
        *([] if whole else [vlm.family.vision_blocks(vlm.model)]),
    ]
    for stack in stacks:
        for layer in stack:
            fully_shard(layer, **options)
        _gather_ahead(list(stack), prefetch)
    root = Root(vlm)
    fully_shard(root, **options)
    for unit in _units(root):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    if vlm.unread is not None:
        _read(root, vlm, whole, device=torch.device("cpu") if offload else device, whole_on=device)
    for module in whole:
        module.to(device)
    vlm.vision.device, vlm.vision.always = device, not replicated
    return root


def _gather_ahead(layers: list[FSDPModule], count: int) -> None:
    """Lets each layer start to gather the `count` layers that run after it, in both directions. Forwards FSDP
    would start a layer's gathering when the host reaches it, which is too late where the host waits for the
    device, as in routers."""
    for index, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[index + 1 : index + 1 + count])
        layer.set_modules_to_backward_prefetch(layers[max(index - count, 0) : index][::-1])


def _read(
    root: Root, vlm: VLM, whole: Sequence[nn.Module], *, device: torch.device, whole_on: torch.device
) -> None:
    """Gives a sharded model memory on a device and reads its weights; the modules `whole`, which are
    replicated, are on `whole_on`."""
    filled = give_memory(root, device=device, whole=whole, whole_on=whole_on)
    vlm.unread.read(vlm.model, filled=filled)
    vlm.unread = None


@torch.no_grad()
def run_with_full_params(root: Root, work: Callable[[], T]) -> T:
    """Runs work with the full parameters, which every process gathers once. Without gradients."""
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


BUCKET_SIZE = 2**26
"""Gradient elements per all-reduce."""


class Parallelism(Protocol):
    """How the model's parameters are distributed over processes."""

    sharded: bool
    """Whether a process holds only its share of each parameter."""

    def distribute(self, vlm: VLM) -> None:
        """Moves the model to the devices; must be called before the optimizer is built."""

    def run(self, forward_pass: Pass, inputs: Inputs, routed: RoutedPass | None = None) -> Scores:
        """Runs a pass of a distributed model. All processes must call it equally often."""

    def with_full_params(self, vlm: VLM, work: Callable[[], T]) -> T:
        """Runs work in which each process may run any number of passes, without gradients."""

    def align(self, passes: int) -> int:
        """Number of passes that each process must run if this one needs `passes`. All processes call it."""

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sums the gradients over all processes, after the last backward pass of an update."""


class Replicated:
    """Each process has a copy; gradients are summed once per update, however many passes there were.
    Parameters that no pass used get a gradient of zero, also with a single process."""

    sharded = False

    def __init__(self, world: World, device: torch.device):
        self.world, self.device = world, device

    def distribute(self, vlm: VLM) -> None:
        vlm.to_device(self.device)

    def run(self, forward_pass: Pass, inputs: Inputs, routed: RoutedPass | None = None) -> Scores:
        return forward_pass(inputs, routed)

    def with_full_params(self, vlm: VLM, work: Callable[[], T]) -> T:
        return work()

    def align(self, passes: int) -> int:
        return passes

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is None:  # no pass of this process used it
                parameter.grad = torch.zeros_like(parameter)
        if self.world.size == 1:
            return
        for bucket in _buckets(parameters):
            flat = torch.cat([parameter.grad.flatten() for parameter in bucket])
            dist.all_reduce(flat)
            sums = flat.split([parameter.numel() for parameter in bucket])
            for parameter, total in zip(bucket, sums, strict=True):
                parameter.grad.copy_(total.view_as(parameter))


class FullySharded:
    """FSDP over the last dimension of `mesh`, with the `options` of `shard`. Gradients are reduced during the
    backward pass."""

    sharded = True

    def __init__(self, mesh: DeviceMesh, world: World, **options: Any):
        self.mesh, self.world, self.options = mesh, world, options
        self.roots: dict[VLM, Root] = {}

    def distribute(self, vlm: VLM) -> None:
        self.roots[vlm] = shard(vlm, self.mesh, **self.options)

    def run(self, forward_pass: Pass, inputs: Inputs, routed: RoutedPass | None = None) -> Scores:
        return self.roots[forward_pass.vlm](forward_pass, inputs, routed)

    def with_full_params(self, vlm: VLM, work: Callable[[], T]) -> T:
        return run_with_full_params(self.roots[vlm], work)

    def align(self, passes: int) -> int:
        return max(self.world.all_gather(passes))

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """FSDP has already reduced them."""


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Groups parameters of one dtype into buckets of about BUCKET_SIZE elements."""
    bucket: list[nn.Parameter] = []
    for parameter in sorted(
        parameters, key=lambda item: str(item.dtype)
    ):  # stable, so the same on all processes
        size = sum(item.numel() for item in bucket)
        if bucket and (size + parameter.numel() > BUCKET_SIZE or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
