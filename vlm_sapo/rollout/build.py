"""Builds the engine that a config names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from vlm_sapo.config.rollout import EngineConfig, VllmConfig, VllmServerConfig
from vlm_sapo.distributed import World
from vlm_sapo.models.loading import load_outline, load_vlm
from vlm_sapo.models.vlm import PARTS, VLM
from vlm_sapo.rollout.engine import RolloutEngine
from vlm_sapo.rollout.hf import HfEngine, run
from vlm_sapo.rollout.vllm import VllmEngine
from vlm_sapo.rollout.vllm_client import Server
from vlm_sapo.rollout.vllm_servers import VllmServers
from vlm_sapo.rollout.weight_transfer import Folder, Nccl

AT_ONCE = 256
"""Problems that an evaluation hands to vLLM at the same time; it batches them itself."""


def problems_at_once(engine: EngineConfig, prompts_per_batch: int) -> int:
    """How many problems an evaluation draws, grades and writes together."""
    return prompts_per_batch if engine.type == "hf" else max(AT_ONCE, prompts_per_batch)


def engine_dtype(engine: EngineConfig, default: str) -> str:
    """Type of the engine's weights, where `auto` stands for the default."""
    return default if engine.type == "hf" or engine.dtype == "auto" else engine.dtype


def build_engine(
    engine: EngineConfig,
    vlm: VLM,
    path: str,
    *,
    longest: int,
    dtype: str,
    prompts_per_batch: int,
    warn: Callable[[str], None],
    folder: Path | None = None,
    autocast: Callable = nullcontext,
    with_full_params: Callable = run,
    world: World | None = None,
    experts: bool = False,
) -> RolloutEngine:
    """The engine for a model that was loaded from `path`, for prompts and responses of `longest` tokens.

    `dtype` is what `auto` stands for. `folder` is where weights for servers go unless the config names one;
    without it servers keep the weights that they have. With `experts` completions tell their tokens' experts.
    """
    dtype = engine_dtype(engine, dtype)
    if isinstance(engine, VllmConfig):
        return VllmEngine(
            vlm,
            path,
            longest=longest,
            dtype=dtype,
            tensor_parallel=engine.tensor_parallel,
            gpu_memory=engine.gpu_memory,
            launched=world is not None and world.size > 1,
            options=engine.options,
            experts=experts,
        )
    if isinstance(engine, VllmServerConfig):
        return VllmServers(
            vlm,
            [Server(url, timeout=engine.timeout) for url in engine.servers],
            folder and _transfer(engine, folder, dtype, world or World()),
            path=path,
            longest=longest,
            patience=engine.patience,
            warn=warn,
            world=world or World(),
            experts=experts,
        )
    return HfEngine(
        vlm,
        prompts_per_batch=prompts_per_batch,
        autocast=autocast,
        with_full_params=with_full_params,
        warn=warn,
        experts=experts,
    )


def open_model(
    engine: EngineConfig,
    path: str,
    *,
    dtype: str,
    longest: int | None,
    prompts_per_batch: int,
    warn: Callable[[str], None],
) -> tuple[VLM, RolloutEngine]:
    """A model that is not trained, and its engine. vLLM holds the weights itself, so that of the model only
    what prompts need is loaded. `longest` is None for the model's whole context."""
    if engine.type == "hf":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        vlm = load_vlm(path, dtype=dtype, device=device, freeze=list(PARTS))
        vlm.eval()
    else:
        vlm = load_outline(path)
    longest = vlm.context if longest is None else min(longest, vlm.context)
    return vlm, build_engine(
        engine,
        vlm,
        path,
        longest=longest,
        dtype=dtype,
        prompts_per_batch=prompts_per_batch,
        warn=warn,
    )


def _transfer(engine: VllmServerConfig, folder: Path, dtype: str, world: World) -> Folder | Nccl:
    kind: torch.dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[
        dtype
    ]
    if engine.weights == "nccl":
        return Nccl(engine.address, dtype=kind, timeout=engine.timeout)
    return Folder(Path(engine.folder) if engine.folder else folder, dtype=kind, world=world)
