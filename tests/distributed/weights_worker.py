"""One process of several that send a sharded model's weights to engines, and what that takes.

python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.weights_worker FOLDER
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from tests.dispatch import LiveBytes, Traffic
from tests.rollout.vllm_stand_in import StandInLlm, modules, sources
from vlm_sapo.distributed import World
from vlm_sapo.models.loading import Adapters, load_vlm
from vlm_sapo.models.lora import layers
from vlm_sapo.models.parallel import shard
from vlm_sapo.rollout import weight_transfer
from vlm_sapo.rollout.engine import EngineNeeds
from vlm_sapo.rollout.vllm import VllmEngine
from vlm_sapo.rollout.vllm_client import Server, Unavailable

BF16 = torch.bfloat16


def opened(folder: Path, *, lora: bool, sharded: bool):
    vlm = load_vlm(str(folder), lora=Adapters(base="base", rank=4) if lora else None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers(vlm.model).values():
            for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                factor.copy_(torch.randn(factor.shape, generator=generator))
    if sharded:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("part",))
        shard(vlm, mesh, dtype=BF16, offload=False)
    return vlm


def stream(folder: Path, *, lora: bool) -> dict:
    """What two processes gather, against the same model in one piece."""
    whole, parts = (opened(folder, lora=lora, sharded=sharded) for sharded in (False, True))
    expected, traffic, live = dict(whole.stream_weights(BF16)), Traffic(), LiveBytes()
    names, equal = [], []
    with traffic, live:
        for name, weight in parts.stream_weights(BF16):
            names.append(name)
            equal.append(torch.equal(weight, expected[name]))
    saved = parts.weights(keep=dist.get_rank() == 0)
    matrices = [math.prod(item.shape) for item in parts.stored_weights() if len(item.shape) > 1]
    return {
        "names": names,
        "expected": list(expected),
        "equal": all(equal),
        "as_saved": all(
            item.device.type == "meta" or torch.equal(item.to(expected[name].dtype), expected[name])
            for name, item in saved.items()
        ),
        "gathered": traffic.gathered,
        "dropped": traffic.dropped,
        "most": live.most,
        "largest": 2 * max(matrices),
        "vectors": sum(4 * math.prod(item.shape) for item in parts.stored_weights() if len(item.shape) == 1),
        "factors": sum(4 * layer.lora_A["default"].weight.numel() for layer in layers(parts.model).values()),
    }


def into_a_folder(folder: Path, model: Path, world: World) -> dict:
    """Files of a few weights each; only the main process brings weights to the host."""
    vlm, copied = opened(model, lora=False, sharded=True), []
    weight_transfer.SHARD_BYTES = 2**14
    to_host = weight_transfer.to_host
    weight_transfer.to_host = lambda weight: copied.append(weight.nbytes) or to_host(weight)
    transfer, traffic = weight_transfer.Folder(folder, dtype=BF16, world=world), Traffic()
    with traffic:
        transfer.stage(vlm, "first")
    world.barrier()
    files = sorted((folder / "first").glob("*.safetensors"))
    written = {name: weight for file in files for name, weight in load_file(file).items()}
    expected = dict(opened(model, lora=False, sharded=False).stream_weights(BF16))
    world.barrier()
    transfer.close()
    return {
        "files": len(files),
        "equal": written.keys() == expected.keys()
        and all(torch.equal(written[name], weight) for name, weight in expected.items()),
        "copied": sum(copied),
        "dropped": traffic.dropped,
    }


def into_vllm(model: Path, world: World) -> dict:
    """vLLM in each process; in the second one it fails at the third weight."""
    vlm = opened(model, lora=False, sharded=True)
    sys.modules.update(modules())
    needs = EngineNeeds(vlm, str(model), longest=64, dtype="bfloat16", sequences_per_batch=1, warn=print)
    engine = VllmEngine(needs, dtype="bfloat16")
    StandInLlm.fails_at = 3 if dist.get_rank() == 1 else None
    try:
        engine.sync(vlm)
        failure = None
    except RuntimeError as error:
        failure = str(error)
    StandInLlm.fails_at = None
    taken = world.all_gather(len(engine.llm.weights))  # hangs if a process waits in a gather
    vlm.version += 1
    engine.sync(vlm)
    return {"failure": failure, "taken": taken, "at_last": len(engine.llm.weights)}


def by_nccl(model: Path, world: World, kind: str) -> dict:
    """Two servers; the connection to the second breaks once in the middle, and once before the start."""
    vlm, taken = opened(model, lora=False, sharded=True), []
    sys.modules.update(modules(sources(kind, taken, breaks={1: 0, 2: 5})))
    torch.cuda.is_available, torch.cuda.synchronize = lambda: True, lambda: None
    transfer = weight_transfer.Nccl("127.0.0.1", dtype=BF16, timeout=60, world=world)
    torch.cuda.is_available = lambda: False

    async def attempts() -> list[str]:
        outcomes = []
        for name in ("first", "second", "second", "second"):
            server = Server(f"http://{name}", timeout=1)
            server.call = answer
            try:
                await transfer.send(None, server, restarted=False)
                outcomes.append("sent")
            except Unavailable:
                outcomes.append("broken")
        return outcomes

    outcomes = []
    for version in ("a", "b"):
        transfer.stage(vlm, version)
        transfer.deliver(lambda: outcomes.append(weight_transfer.asyncio.run(attempts())))
    expected = list(vlm.stream_weights(BF16))
    equal = [
        len(sent) == len(expected)
        and all(
            name == meta.name and meta.dtype == weight.dtype and torch.equal(weight, other)
            for (name, weight), (_, other), meta in zip(sent, expected, metadata, strict=True)
        )
        for sent, metadata in taken
    ]
    return {"outcomes": outcomes, "passes": equal}


async def answer(client, route):
    assert route == "get_world_size"
    return {"world_size": 1}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, world = Path(sys.argv[1]), World()
    facts = {
        f"stream-{family}{'-lora' if lora else ''}": stream(folder / family, lora=lora)
        for family, lora in (
            ("qwen3_vl", False),
            ("qwen3_vl", True),
            ("qwen3_vl_moe", False),
            ("qwen3_5", False),
        )
    }
    facts["folder"] = into_a_folder(folder / "weights", folder / "qwen3_vl_moe", world)
    facts["vllm"] = into_vllm(folder / "qwen3_vl", world)
    for kind in ("iter", "iter_full"):
        facts[f"nccl-{kind}"] = by_nccl(folder / "qwen3_vl", world, kind)
    (folder / f"facts_{dist.get_rank()}.json").write_text(json.dumps(facts))
    world.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
