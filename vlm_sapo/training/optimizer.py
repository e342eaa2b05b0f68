"""The optimizer: its kinds, its schedule, and its state in files without code in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from vlm_sapo.models.weights import discarded, like, whole

LARGEST = 4 * 2**30
"""Bytes from which a file is full."""
FILES = "optimizer-*.safetensors"
Write = Callable[[Path], None]
"""Writes part of a checkpoint into a folder."""


def schedule_factor(step: int, *, kind: str, warmup: int, total: int) -> float:
    """Factor of the peak learning rate at a step (0-based) of `total`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total - warmup, 1)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[kind]


def build_optimizer(name: str, parameters: Sequence[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """`adamw`, or one that holds its moments in 8 bits."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    import bitsandbytes

    kinds = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}
    return vars(bitsandbytes.optim)[kinds[name]](parameters, **options)


def state_parts(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], *, keep: bool
) -> Iterator[Write]:
    """What writes the state, as copies in host memory, a few GB at a time. Where it is sharded all processes
    must go through this, and those that don't `keep` it get nothing."""
    tensors: dict[str, torch.Tensor] = {}
    size = number = 0
    for name, parameter in parameters.items():
        for field, value in optimizer.state.get(parameter, {}).items():
            held = torch.as_tensor(value)
            if keep:
                tensors[f"{name}/{field}"] = whole(held).to("cpu", copy=True)
                size += tensors[f"{name}/{field}"].nbytes
            else:
                discarded(held)
        if size > LARGEST:
            number, size = number + 1, 0
            yield partial(_write_state, tensors, number)
            tensors = {}
    yield partial(_write_state, tensors, number + 1)


def _write_state(tensors: dict[str, torch.Tensor], number: int, folder: Path) -> None:
    save_file(tensors, folder / FILES.replace("*", f"{number:05d}"))


def load_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], folder: Path
) -> None:
    """Takes over what `state_parts` wrote; parameters may be sharded otherwise than they were."""
    places = {name: place for place, name in enumerate(parameters)}
    state: dict[int, dict[str, torch.Tensor | int]] = {}
    for path in sorted(folder.glob(FILES)):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, _, field = key.rpartition("/")
                value, parameter = file.get_tensor(key), parameters[name]
                if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                    value = like(value, parameter)
                if value.dtype == torch.int64:  # bitsandbytes counts its steps with plain numbers
                    value = int(value)
                state.setdefault(places[name], {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
