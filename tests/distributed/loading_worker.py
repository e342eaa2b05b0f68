"""One process of several: loads models as shards, and compares them with models that were loaded whole.

python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.loading_worker FOLDER BIG
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from vlm_sapo.models.loading import Adapters, load_vlm
from vlm_sapo.models.parallel import shard
from vlm_sapo.models.vlm import VLM

KINDS = (
    {},
    {"freeze": ["vision", "merger"], "dtype": "bfloat16"},
    {"lora": Adapters("base", rank=4, parts=("vision", "language")), "dtype": "bfloat16"},
)


def loaded(path: str, mesh: DeviceMesh, *, defer: bool, offload: bool = False, **options) -> VLM:
    torch.manual_seed(3)
    vlm = load_vlm(path, defer=defer, gradient_checkpointing=True, **options)
    assert (vlm.model.device.type == "meta") == defer
    shard(vlm, mesh, dtype=None, offload=offload)
    return vlm


def compare(path: str, mesh: DeviceMesh, options: dict, *, offload: bool) -> None:
    """Everything must be the same, bit by bit."""
    usual, later = (loaded(path, mesh, defer=defer, offload=offload, **options) for defer in (False, True))
    one, two = (
        dict(vlm.named_parameters(remove_duplicate=False)) | dict(vlm.named_buffers())
        for vlm in (usual, later)
    )
    assert one.keys() == two.keys()
    assert len(list(usual.parameters())) == len(list(later.parameters()))
    for name, tensor in one.items():
        other = two[name]
        assert (tensor.dtype, tensor.requires_grad) == (other.dtype, other.requires_grad), name
        assert isinstance(tensor, DTensor) == isinstance(other, DTensor), name
        if isinstance(tensor, DTensor):
            assert tensor.placements == other.placements, name
            tensor, other = tensor.to_local(), other.to_local()
        assert torch.equal(tensor, other), name
    one, two = usual.weights(), later.weights()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def resident(field: str) -> int:
    """Bytes of this process's memory: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(path: str, mesh: DeviceMesh, *, small: str) -> str:
    """What loading takes beside the shards, and the largest tensor, in bytes. A small model comes first, for
    what is imported only then."""
    loaded(small, mesh, defer=True)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    vlm = loaded(path, mesh, defer=True)
    peak = resident("VmHWM")
    shards = sum((item.to_local() if isinstance(item, DTensor) else item).nbytes for item in vlm.parameters())
    largest = max(item.nbytes for item in vlm.parameters())
    return f"beside {peak - before - shards} largest {largest} shards {shards}"


def say(line: str) -> None:
    """In one write: `print` ends its line with a second one, and the other process's may come between."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    folder, big = Path(sys.argv[1]), sys.argv[2]
    models = sorted(folder.iterdir())
    say(f"memory {dist.get_rank()}: {measure(big, mesh, small=str(models[0]))}")
    for path in models:
        for number, options in enumerate(KINDS):
            compare(str(path), mesh, options, offload=number == 1)
        say(f"same {dist.get_rank()}: {path.name}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
