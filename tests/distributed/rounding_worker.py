"""Updates bfloat16 weights that four processes share as two copies of two shards, and saves them in full.

python -m torch.distributed.run --nproc-per-node 4 -m tests.distributed.rounding_worker FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vlm_sapo.models.weights import full_tensor, shard_like
from vlm_sapo.training.optimizer import OptimizerSettings, Shares, build_optimizer, load_state, state_parts


def model() -> nn.Module:
    """Seven rows don't divide evenly, and of one row one process has none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1)).bfloat16()


def train(module: nn.Module, folder: Path | None = None) -> None:
    """Four updates; with `folder` the optimizer is stored there after two and read by a new one."""
    named = dict(module.named_parameters())
    settings = OptimizerSettings(1e-3, 10, seed=3)
    optimizer = build_optimizer(list(named.values()), settings)
    generator = torch.Generator().manual_seed(1)
    for update in range(4):
        for parameter in named.values():
            full = torch.randn(parameter.shape, generator=generator).bfloat16()
            parameter.grad = shard_like(full, parameter)
        optimizer.step()
        if folder is not None and update == 1:
            for write in state_parts(optimizer, named, Shares(dist.get_rank(), dist.get_world_size())):
                write(folder)
            dist.barrier()
            optimizer = build_optimizer(list(named.values()), settings)
            load_state(optimizer, named, folder)


def main() -> None:
    dist.init_process_group("gloo")
    folder, module = Path(sys.argv[1]), model()
    fully_shard(module, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    train(module, folder)
    weights = {name: full_tensor(parameter.detach()) for name, parameter in module.named_parameters()}
    torch.save(weights, folder / f"weights_{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
