"""The optimizer: AdamW variants, learning-rate schedules, and its state as safetensors files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from vlm_sapo.models.file_modes import use_umask
from vlm_sapo.models.weights import from_rows, full_tensor, gather_and_drop, own_rows
from vlm_sapo.training.stochastic_adamw import StochasticAdamW

MAX_FILE_BYTES = 4 * 2**30
"""Size from which the next tensors go to another file."""
FILES = "optimizer-*.safetensors"
Write = Callable[[Path], None]
"""Writes part of a checkpoint into a folder."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning rate over `total_steps`."""

    lr: float
    total_steps: int
    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0
    """Of stochastic rounding."""

    def rate_at(self, step: int) -> float:
        """The learning rate of a step (0-based)."""
        return self.lr * self._factor(step)

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        factors = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        return factors.get(self.schedule, 1.0)


def build_optimizer(parameters: Sequence[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Builds AdamW: for weights in bfloat16 with stochastic rounding, or variants with moments in 8 bits."""
    options: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw" and any(parameter.dtype == torch.bfloat16 for parameter in parameters):
        return StochasticAdamW(parameters, seed=settings.seed, **options)
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    import bitsandbytes

    kinds = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}
    return vars(bitsandbytes.optim)[kinds[settings.name]](parameters, **options)


class Shares:
    """Deals tensors out to `writers` processes, each to the one with the fewest bytes so far; of two equal
    ones to the first. All processes deal alike, so each knows its own."""

    def __init__(self, rank: int, writers: int):
        self.rank, self.writers = rank, writers
        self.sizes = [0] * writers

    def deal(self, size: int) -> int:
        """The rank of the process that writes a tensor of so many bytes."""
        writer = self.sizes.index(min(self.sizes))
        self.sizes[writer] += size
        return writer


def state_parts(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], shares: Shares
) -> Iterator[Write]:
    """Functions that write this process's share of the state from copies in host memory, a few GB each. For a
    sharded state all processes must iterate."""
    tensors: dict[str, torch.Tensor] = {}
    number = 1
    for name, parameter in parameters.items():
        for field, value in optimizer.state.get(parameter, {}).items():
            moment = torch.as_tensor(value)
            if shares.deal(moment.nbytes) == shares.rank:
                tensors[f"{name}/{field}"] = full_tensor(moment).to("cpu", copy=True)
            else:
                gather_and_drop(moment)
        if sum(tensor.nbytes for tensor in tensors.values()) > MAX_FILE_BYTES:
            yield partial(_write_state, tensors, _file(number, shares))
            tensors, number = {}, number + 1
    if tensors or not shares.rank:
        yield partial(_write_state, tensors, _file(number, shares))


def _file(number: int, shares: Shares) -> str:
    writer = f"{shares.rank + 1:05d}-" if shares.writers > 1 else ""
    return FILES.replace("*", f"{writer}{number:05d}")


def _write_state(tensors: dict[str, torch.Tensor], name: str, folder: Path) -> None:
    save_file(tensors, folder / name)
    use_umask(folder)


def load_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], folder: Path
) -> None:
    """Loads what `state_parts` wrote, by however many processes; the parameters may be sharded differently
    now. Of a sharded one only this process's rows are read."""
    indices = {name: index for index, name in enumerate(parameters)}
    state: dict[int, dict[str, torch.Tensor | int]] = {}
    for path in sorted(folder.glob(FILES)):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, _, field = key.rpartition("/")
                stored, parameter = file.get_slice(key), parameters[name]
                if isinstance(parameter, DTensor) and stored.get_shape() == list(parameter.shape):
                    value = from_rows(stored[own_rows(parameter)], parameter)
                else:
                    value = file.get_tensor(key)
                if value.dtype == torch.int64:  # bitsandbytes counts its steps with plain numbers
                    value = int(value)
                state.setdefault(indices[name], {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
