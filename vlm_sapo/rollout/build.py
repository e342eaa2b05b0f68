"""Builds the engine that a config names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from vlm_sapo.config.rollout import (
    EngineConfig,
    EnvironmentConfig,
    OwnEngineConfig,
    VllmConfig,
    VllmServerConfig,
)
from vlm_sapo.distributed import World
from vlm_sapo.models.device import find_device
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import count_parameters, load_outline, load_vlm
from vlm_sapo.models.vlm import PARTS, VLM
from vlm_sapo.plugins import check_call, resolve, resolve_call
from vlm_sapo.rollout.engine import EngineNeeds, RolloutEngine
from vlm_sapo.rollout.environment import Episodes
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.rollout.vllm import VllmEngine
from vlm_sapo.rollout.vllm_client import Server
from vlm_sapo.rollout.vllm_lora import NO_FOLDER, AdapterShape, served_beside
from vlm_sapo.rollout.vllm_servers import VllmServers
from vlm_sapo.rollout.weight_transfer import AdapterFolder, Folder, Nccl

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def build_engine(engine: EngineConfig, needs: EngineNeeds) -> RolloutEngine:
    """Builds the configured engine. Raises ValueError for a user's function that doesn't fit."""
    if isinstance(engine, VllmConfig):
        return VllmEngine(
            needs,
            dtype=engine.weights_dtype(needs.dtype),
            tensor_parallel=engine.tensor_parallel,
            gpu_memory=engine.gpu_memory,
            adapter=engine.adapter,
            options=engine.options,
        )
    if isinstance(engine, VllmServerConfig):
        servers = [Server(url, timeout=engine.timeout) for url in engine.servers]
        return VllmServers(needs, servers, _transfer(engine, needs), patience=engine.patience)
    if isinstance(engine, OwnEngineConfig):
        field = "rollout.engine.function"
        built = resolve_call(engine.function, needs, field=field, args=engine.args)
        if not isinstance(built, RolloutEngine):
            raise ValueError(
                f"{field} ({engine.function}) must return an engine with the attributes and methods of "
                f"vlm_sapo.rollout.engine.RolloutEngine; it returned a {type(built).__name__}"
            )
        if built.shares_weights != engine.policy_modules:
            raise ValueError(
                f"rollout.engine.policy_modules ({str(engine.policy_modules).lower()}) must be what "
                f"{engine.function} says as shares_weights ({str(built.shares_weights).lower()}); change one"
            )
        return built
    return HfEngine(
        needs.vlm,
        sequences_per_batch=needs.sequences_per_batch,
        autocast=needs.autocast,
        with_full_params=needs.with_full_params,
        warn=needs.warn,
        experts=needs.experts,
    )


def build_episodes(
    environment: EnvironmentConfig, engine: RolloutEngine, encode: Encoder, world: World
) -> Episodes:
    """Puts an environment around the engine. Raises ValueError if there is none of that name, or if it
    doesn't take its arguments."""
    field = "rollout.environment.function"
    function = resolve(environment.function, field=field)
    check_call(function, name=environment.function, field=field, args=environment.args)
    new_environment = partial(function, **environment.args)
    encode.user_turn("")  # fails here if the template has no further turns
    return Episodes(engine, encode, new_environment, max_turns=environment.max_turns, world=world)


def open_model(
    engine: EngineConfig,
    path: str,
    *,
    dtype: str,
    longest: int | None,
    sequences_per_batch: int,
    warn: Callable[[str], None],
) -> tuple[VLM, RolloutEngine]:
    """Loads a model that is not trained, and builds its engine. For vLLM, which loads the weights itself, the
    model is an outline: enough to encode prompts. `longest` is None for the model's whole context."""
    if engine.shares_weights:
        device = find_device()
        device.check(lambda: count_parameters(path), warn)
        device.check_half_precision({"dtype": dtype})
        vlm = load_vlm(path, dtype=dtype, device=device.torch, freeze=list(PARTS))
        device.check_kernels(vlm.layer_kinds, warn)
        vlm.eval()
    else:
        vlm = load_outline(path)
    longest = vlm.context if longest is None else min(longest, vlm.context)
    needs = EngineNeeds(vlm, path, longest, dtype, sequences_per_batch, warn)
    return vlm, build_engine(engine, needs)


def _transfer(engine: VllmServerConfig, needs: EngineNeeds) -> Folder | Nccl | None:
    name = engine.weights_dtype(needs.dtype)
    dtype = DTYPES[name]
    if needs.folder is None:
        return None
    shape = AdapterShape.of(needs.vlm)
    world = needs.world or World()
    if engine.weights == "nccl":
        served_beside(engine.adapter, shape, needs.vlm, name, obstacle=NO_FOLDER, warn=needs.warn)
        return Nccl(engine.address, dtype=dtype, timeout=engine.timeout, world=world)
    folder = Path(engine.folder) if engine.folder else needs.folder
    if served_beside(engine.adapter, shape, needs.vlm, name, warn=needs.warn):
        return AdapterFolder(folder, world=world)
    return Folder(folder, dtype=dtype, world=world)
