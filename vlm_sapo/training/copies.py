"""How the processes of a run hold the model: each a copy, or each a part of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from vlm_sapo.distributed import World
from vlm_sapo.models.experts import RoutedPass
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.packing import Inputs
from vlm_sapo.models.parallel import Root, run_alone, shard
from vlm_sapo.models.vlm import VLM

T = TypeVar("T")
Scored = tuple[torch.Tensor, torch.Tensor]
"""Log-probs and entropies [N, T]."""
BUCKET = 2**26
"""Numbers that are summed over processes at once."""


class Copies(Protocol):
    """Where the model's parameters are."""

    def spread(self, vlm: VLM) -> None:
        """Brings the model to the devices; before the optimizer is made."""

    def run(self, forward_pass: Pass, inputs: Inputs, routed: RoutedPass | None = None) -> Scored:
        """Runs a pass of a model that was spread. All processes call it equally often."""

    def alone(self, vlm: VLM, work: Callable[[], T]) -> T:
        """Runs work in which each process uses the whole model as often as it likes, without gradients."""

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Makes the gradients those of all processes, after the last backward pass of an update."""


class Whole:
    """Each process has a copy; gradients are summed once per update, however many passes there were. What no
    pass had a part in has a gradient of zero, in one process as in several."""

    def __init__(self, world: World, device: torch.device):
        self.world, self.device = world, device

    def spread(self, vlm: VLM) -> None:
        vlm.place(self.device)

    def run(self, forward_pass: Pass, inputs: Inputs, routed: RoutedPass | None = None) -> Scored:
        return forward_pass(inputs, routed)

    def alone(self, vlm: VLM, work: Callable[[], T]) -> T:
        return work()

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is None:  # no pass of this process had a part in it
                parameter.grad = torch.zeros_like(parameter)
        if self.world.size == 1:
            return
        for bucket in _buckets(parameters):
            flat = torch.cat([parameter.grad.flatten() for parameter in bucket])
            dist.all_reduce(flat)
            sums = flat.split([parameter.numel() for parameter in bucket])
            for parameter, total in zip(bucket, sums, strict=True):
                parameter.grad.copy_(total.view_as(parameter))


class Sharded:
    """`mesh`'s last dimension shares one copy; see models/parallel.py. Gradients are reduced as they are
    made."""

    def __init__(self, mesh: DeviceMesh, *, dtype: torch.dtype | None, offload: bool):
        self.mesh, self.dtype, self.offload = mesh, dtype, offload
        self.roots: dict[VLM, Root] = {}

    def spread(self, vlm: VLM) -> None:
        self.roots[vlm] = shard(vlm, self.mesh, dtype=self.dtype, offload=self.offload)

    def run(self, forward_pass: Pass, inputs: Inputs, routed: RoutedPass | None = None) -> Scored:
        return self.roots[forward_pass.vlm](forward_pass, inputs, routed)

    def alone(self, vlm: VLM, work: Callable[[], T]) -> T:
        return run_alone(self.roots[vlm], work)

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Nothing is left to do."""


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type, about BUCKET numbers together."""
    bucket: list[nn.Parameter] = []
    for parameter in sorted(parameters, key=lambda item: str(item.dtype)):  # stable, so the same everywhere
        size = sum(item.numel() for item in bucket)
        if bucket and (size + parameter.numel() > BUCKET or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
