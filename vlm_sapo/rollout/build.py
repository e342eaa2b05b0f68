"""Builds the engine that a config names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
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
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import load_outline, load_vlm
from vlm_sapo.models.vlm import PARTS, VLM
from vlm_sapo.plugins import check_call, resolve, resolve_call
from vlm_sapo.rollout.engine import RolloutEngine
from vlm_sapo.rollout.environment import Episodes
from vlm_sapo.rollout.hf import HfEngine, call
from vlm_sapo.rollout.vllm import VllmEngine
from vlm_sapo.rollout.vllm_client import Server
from vlm_sapo.rollout.vllm_servers import VllmServers
from vlm_sapo.rollout.weight_transfer import Folder, Nccl

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EngineNeeds:
    """What an engine is built for."""

    vlm: VLM
    path: str
    """Of the checkpoint that the model was loaded from."""
    longest: int
    """The most tokens of a prompt and its response."""
    dtype: str
    """Of the weights, where the engine's config says `auto`."""
    prompts_per_batch: int
    warn: Callable[[str], None]
    folder: Path | None = None
    """Where weights for servers go unless the config names one; without it servers keep the weights that they
    have."""
    autocast: Callable = nullcontext
    with_full_params: Callable = call
    world: World | None = None
    experts: bool = False
    """Whether responses carry their tokens' experts."""


def build_engine(engine: EngineConfig, needs: EngineNeeds) -> RolloutEngine:
    """The engine for a model. Raises ValueError where one of the user's is none."""
    if isinstance(engine, VllmConfig):
        return VllmEngine(
            needs.vlm,
            needs.path,
            longest=needs.longest,
            dtype=engine.weights_dtype(needs.dtype),
            tensor_parallel=engine.tensor_parallel,
            gpu_memory=engine.gpu_memory,
            launched=needs.world is not None and needs.world.size > 1,
            options=engine.options,
            experts=needs.experts,
        )
    if isinstance(engine, VllmServerConfig):
        return VllmServers(
            needs.vlm,
            [Server(url, timeout=engine.timeout) for url in engine.servers],
            _transfer(engine, needs),
            path=needs.path,
            longest=needs.longest,
            patience=engine.patience,
            warn=needs.warn,
            world=needs.world or World(),
            experts=needs.experts,
        )
    if isinstance(engine, OwnEngineConfig):
        built = resolve_call(engine.function, needs, field="rollout.engine.function", args=engine.args)
        if not isinstance(built, RolloutEngine):
            raise ValueError(
                f"rollout.engine.function ({engine.function}) must return an engine with the attributes and "
                f"methods of vlm_sapo.rollout.engine.RolloutEngine; it returned a {type(built).__name__}"
            )
        return built
    return HfEngine(
        needs.vlm,
        prompts_per_batch=needs.prompts_per_batch,
        autocast=needs.autocast,
        with_full_params=needs.with_full_params,
        warn=needs.warn,
        experts=needs.experts,
    )


def build_episodes(
    environment: EnvironmentConfig, engine: RolloutEngine, encode: Encoder, world: World
) -> Episodes:
    """The engine with an environment around it. Raises ValueError where there is none of that name, or it
    does not take its arguments."""
    field = "rollout.environment.function"
    make = resolve(environment.function, field=field)
    check_call(make, name=environment.function, field=field, args=environment.args)
    make = partial(make, **environment.args)
    encode.user_turn("")  # or a template without further turns would end every episode at its first
    return Episodes(engine, encode, make, max_turns=environment.max_turns, world=world)


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
    if engine.shares_weights:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        vlm = load_vlm(path, dtype=dtype, device=device, freeze=list(PARTS))
        vlm.eval()
    else:
        vlm = load_outline(path)
    longest = vlm.context if longest is None else min(longest, vlm.context)
    needs = EngineNeeds(vlm, path, longest, dtype, prompts_per_batch, warn)
    return vlm, build_engine(engine, needs)


def _transfer(engine: VllmServerConfig, needs: EngineNeeds) -> Folder | Nccl | None:
    dtype = DTYPES[engine.weights_dtype(needs.dtype)]
    if needs.folder is None:
        return None
    if engine.weights == "nccl":
        return Nccl(engine.address, dtype=dtype, timeout=engine.timeout)
    folder = Path(engine.folder) if engine.folder else needs.folder
    return Folder(folder, dtype=dtype, world=needs.world or World())
