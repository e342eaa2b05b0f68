"""Bytes that one of 32 processes of a sharded model gathers and reduces in a pass and its backward pass. The
group is torch's fake one: 31 of the processes don't exist, and nothing is sent.

python -m tests.distributed.traffic_worker MODEL
"""

from __future__ import annotations

import json
import sys
from collections import Counter

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import example, group_slice
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import SharedPrefix
from vlm_sapo.models.parallel import shard

PROCESSES = 32
KINDS = {"_allgather_base_": "gathered", "_reduce_scatter_base_": "reduced"}


class Collectives(TorchDispatchMode):
    """Bytes by kind and dtype, as whole tensors."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("c10d::")
        if function.namespace == "c10d":
            whole = max(args[0], args[1], key=lambda tensor: tensor.nbytes)
            dtype = str(whole.dtype).removeprefix("torch.")
            self.bytes[f"{KINDS.get(name, name)} {dtype}"] += whole.nbytes
        return function(*args, **(kwargs or {}))


def main(path: str) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("shard",))
    vlm = load_vlm(path, freeze=["vision", "merger"], gradient_checkpointing=True)
    language = {name: item.numel() for name, item in vlm.named_parameters() if item.requires_grad}
    layers = sum(size for name, size in language.items() if ".layers." in name)
    prompt = Encoder(vlm)(example(1))
    root = shard(vlm, mesh, dtype=torch.bfloat16, offload=False)
    inputs = SharedPrefix().inputs([group_slice(prompt, [[103, 104], [105]])])
    with Collectives() as forward:
        scores = root(Pass(vlm), inputs)
    with Collectives() as backward:
        scores.logprobs.sum().backward()
    facts = {"layers": layers, "rest": sum(language.values()) - layers}
    print(json.dumps(facts | {"forward": forward.bytes, "backward": backward.bytes}))


if __name__ == "__main__":
    main(sys.argv[1])
