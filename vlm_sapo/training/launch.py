"""The processes that a launcher started: their number, devices, and how they share the model."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch.distributed.device_mesh import init_device_mesh

from vlm_sapo.config import schema as cfg
from vlm_sapo.config.load import check_processes
from vlm_sapo.config.rollout import VllmConfig, VllmServerConfig
from vlm_sapo.distributed import World
from vlm_sapo.models.device import Device, find_device
from vlm_sapo.models.parallel import FullySharded, Parallelism, Replicated, prefetched_layers
from vlm_sapo.reporting.console import Console, SilentConsole

DEVICE_TIMEOUT = timedelta(hours=1)
"""How long devices wait for each other."""
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, from the view of one."""

    accelerator: Accelerator
    world: World
    console: Console
    device: Device
    shard: int
    """Processes that share one copy of the model."""
    local: int
    """Processes on this machine."""


def join(config: cfg.TrainConfig | cfg.SftConfig, console: Console | None = None) -> Processes:
    """Joins the processes that were started together. Raises ValueError if the config does not fit their
    number, or asks for a precision that the GPU lacks."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    shard = check_processes(config, size)
    _check_installed(config)
    _use_deterministic_operations(config.run.deterministic)
    devices = torch.cuda.device_count()
    if (
        (forgotten := forgotten_launcher(config, size, devices))
        and config.train.shard == "all"
        and devices > 1
    ):
        raise ValueError(forgotten)
    device = find_device(int(os.environ.get("LOCAL_RANK", "0")))
    if size > 1 and devices and device.problem:  # the others would wait for this process on their GPUs
        raise ValueError(device.problem)
    device.check_half_precision(
        {"train.precision": config.train.precision, "model.dtype": config.model.dtype}
    )
    if (size > 1 or config.train.offload) and not dist.is_initialized():
        _connect(size, device.torch)
    accelerator = Accelerator(cpu=device.torch.type == "cpu", mixed_precision=config.train.precision)
    if accelerator.distributed_type not in SUPPORTED:
        raise ValueError(
            f"the launcher asks for {accelerator.distributed_type.value}, and this trainer shards by itself; "
            "launch without that plugin (accelerate launch --multi_gpu, or torchrun) and set train.shard"
        )
    world = World()
    console = (console or Console()) if world.main else SilentConsole()
    if forgotten:
        console.warn(forgotten)
    local = max(size // len(set(world.all_gather(socket.gethostname()))), 1)
    return Processes(accelerator, world, console, device, shard, local)


def forgotten_launcher(config: cfg.TrainConfig | cfg.SftConfig, size: int, devices: int) -> str:
    """What to say where one process was started, and the config or the machine, with its number of GPUs, is
    for several; empty where nothing was forgotten."""
    verb, shard = "sft" if isinstance(config, cfg.SftConfig) else "train", config.train.shard
    if size > 1 or (shard != "all" and devices <= 1) or (config.train.offload and devices <= 1):
        return ""
    start = f"torchrun --nproc-per-node {devices if devices > 1 else 8} -m vlm_sapo {verb} ..."
    if devices > 1:
        shares = " and train.shard (all) has nothing to share" if shard == "all" else ""
        other = "set train.shard=1" if shard == "all" else "hide the others with CUDA_VISIBLE_DEVICES=0"
        return (
            f"one process was started, so one GPU of {devices} would train{shares}; start one process for "
            f"each, with `{start}`, or {other} to train on one"
        )
    return (
        "train.shard (all) shares the model among all processes, and one was started; with several GPUs "
        f"start one for each, with `{start}`; with one set train.shard=1"
    )


def _use_deterministic_operations(choice: bool | None) -> None:
    """Carries out run.deterministic."""
    if choice is None and torch.cuda.is_available():
        return
    if choice is not False:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # finds bugs, and takes time
    torch.use_deterministic_algorithms(choice is not False)


def _check_installed(config: cfg.TrainConfig | cfg.SftConfig) -> None:
    """Raises ValueError if the config needs bitsandbytes or vLLM and it is not installed; before a model is
    loaded."""
    four_bits = config.model.lora is not None and config.model.lora.bits
    needs = {"model.lora.bits": four_bits, "train.optimizer": config.train.optimizer != "adamw"}
    if any(needs.values()) and find_spec("bitsandbytes") is None:
        field = next(field for field, needed in needs.items() if needed)
        raise ValueError(
            f"{field} needs bitsandbytes; install the extra quantized (docs/install.md), or leave it out"
        )
    engine = config.rollout.engine
    sends = isinstance(engine, VllmServerConfig) and engine.weights == "nccl"
    if (isinstance(engine, VllmConfig) or sends) and find_spec("vllm") is None:
        missing = "rollout.engine (vllm) needs vllm, which is not installed"
        other = "rollout.engine=hf"
        if sends:
            missing = "rollout.engine.weights (nccl) needs vllm, which is not installed"
            other = "rollout.engine.weights=folder"
        raise ValueError(
            f"{missing}; install the extra vllm (in the repository `uv pip install -e '.[vllm]'`), or set "
            f"{other}"
        )


def _connect(size: int, device: torch.device) -> None:
    """Starts the process group: gloo for tensors on the host, nccl for those on GPUs. Sharding needs a group
    even with one process."""
    options: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options["device_id"] = device  # nccl connects now, and not within the first collective's time
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=DEVICE_TIMEOUT, **options)


def is_sharded(config: cfg.TrainConfig | cfg.SftConfig, processes: Processes) -> bool:
    """Whether processes share a model or it is in host memory, so that FSDP holds it."""
    return processes.shard > 1 or config.train.offload


def build_parallelism(config: cfg.TrainConfig | cfg.SftConfig, processes: Processes) -> Parallelism:
    """Builds the configured parallelism: replicated or fully sharded."""
    train, device, size = config.train, processes.accelerator.device, processes.world.size
    if not is_sharded(config, processes):
        return Replicated(processes.world, device)
    replicas = size // processes.shard
    shape = (replicas, processes.shard) if replicas > 1 else (processes.shard,)
    names = ("replicate", "shard") if replicas > 1 else ("shard",)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    dtype = torch.bfloat16 if train.precision == "bf16" else None
    return FullySharded(
        mesh,
        processes.world,
        dtype=dtype,
        offload=train.offload,
        reduce_dtype=torch.bfloat16 if train.reduce_dtype == "bfloat16" else torch.float32,
        prefetch=prefetched_layers(processes.shard, processes.local),
    )
