"""One process of several: gradients that are summed in float32 and in bfloat16, and what else must not change.

python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.reduce_worker MODEL
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.conftest import example, group_slice
from vlm_sapo.distributed import World
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import Plain
from vlm_sapo.models.parallel import FullySharded

PASSES = 3


def gradient(path: str, mesh: DeviceMesh, **options) -> torch.Tensor:
    """The gradient of other rows in each process, over several passes."""
    vlm = load_vlm(path, defer=True, gradient_checkpointing=True)
    parallelism = FullySharded(mesh, World(), offload=False, **options)
    parallelism.distribute(vlm)
    prompt = Encoder(vlm)(example(dist.get_rank(), images=1))
    for number in range(PASSES):
        rows = [[10 + number, 20, 30 + dist.get_rank()], [7, 8, 9, 40 + number]]
        inputs = Plain().inputs([group_slice(prompt, rows)])
        parallelism.run(Pass(vlm), inputs).logprobs.sum().backward()
    grads = [parameter.grad for parameter in vlm.parameters()]
    assert all(grad.dtype == torch.float32 for grad in grads)
    return torch.cat([grad.full_tensor().flatten() for grad in grads])


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    exact = gradient(sys.argv[1], mesh, dtype=torch.bfloat16)
    ahead = gradient(sys.argv[1], mesh, dtype=torch.bfloat16, prefetch=2)
    rounded = gradient(sys.argv[1], mesh, dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    full = gradient(sys.argv[1], mesh, dtype=None)
    if not dist.get_rank():
        print(f"ahead {(ahead - exact).norm() / exact.norm():.6f}")
        print(
            f"rounded {(rounded - exact).norm() / exact.norm():.6f} sum {rounded.norm() / exact.norm():.6f}"
        )
        print(f"bfloat16 passes {(exact - full).norm() / full.norm():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
