"""Builds the engine that a config names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlm_sapo.config.rollout import (
    EngineConfig,
    EnvironmentConfig,
    OwnEngineConfig,
    ToolsConfig,
    VllmConfig,
    VllmServerConfig,
)
from vlm_sapo.distributed import World
from vlm_sapo.environments import Environment, sandbox
from vlm_sapo.environments.processes import Environments
from vlm_sapo.environments.tools import Tool, ToolEnvironment
from vlm_sapo.models.device import find_device
from vlm_sapo.models.encode import NO_TOOLS, Encoder
from vlm_sapo.models.loading import count_parameters, load_outline, load_vlm
from vlm_sapo.models.tool_chat import ToolChat, tool_chat
from vlm_sapo.models.vlm import PARTS, VLM
from vlm_sapo.plugins import PYTHON, absolute, check_call, resolve, resolve_call
from vlm_sapo.rollout.engine import EngineNeeds, RolloutEngine
from vlm_sapo.rollout.environment import Episodes, Limits
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.rollout.vllm import VllmEngine
from vlm_sapo.rollout.vllm_client import Server
from vlm_sapo.rollout.vllm_lora import NO_FOLDER, AdapterShape, served_beside
from vlm_sapo.rollout.vllm_servers import VllmServers
from vlm_sapo.rollout.weight_transfer import AdapterFolder, Folder, Nccl

FUNCTION = "rollout.environment.function"
MOST_WORKERS = 8
"""Answers that environments compute at the same time, unless the config says how many."""
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


def build_tools(environment: EnvironmentConfig | None, vlm: VLM) -> ToolChat:
    """What the prompts say of the tools that the config names. Raises ValueError for one that there is not,
    and for a chat template that can't offer them."""
    if not isinstance(environment, ToolsConfig):
        return NO_TOOLS
    tools = [Tool.of(name) for name in environment.tools]
    if twice := [name for name, count in Counter(tool.name for tool in tools).items() if count > 1]:
        raise ValueError(f"rollout.environment.tools has {twice[0]} twice; leave one out")
    if "python" in environment.tools:
        sandbox.check_supported()
    return tool_chat(
        vlm.processor, tools, vlm.family.coordinates, form=environment.format, hermes=vlm.family.hermes
    )


@dataclass(frozen=True)
class OwnEnvironment:
    """Creates environments of the user's class, in another process, too."""

    name: str
    args: Mapping[str, Any]

    def __call__(self) -> Environment:
        return resolve(self.name, field=FUNCTION)(**self.args)


def build_episodes(
    environment: EnvironmentConfig,
    engine: RolloutEngine,
    encode: Encoder,
    world: World,
    warn: Callable[[str], None] = print,
) -> Episodes:
    """Puts an environment around the engine. Raises ValueError if there is none of that name, or if it
    doesn't take its arguments."""
    encode.answer([("", ())])  # fails here if the template has no further turns
    if isinstance(environment, ToolsConfig):
        make = partial(ToolEnvironment, [absolute(name) for name in environment.tools], encode.tools.syntax)
    else:
        function = resolve(environment.function, field=FUNCTION)
        check_call(function, name=environment.function, field=FUNCTION, args=environment.args)
        make = OwnEnvironment(absolute(environment.function), environment.args)
        if environment.function.startswith(PYTHON):
            make = partial(function, **environment.args)
    workers = environment.workers or min(os.cpu_count() or 1, MOST_WORKERS)
    environments = Environments(make, timeout=environment.timeout, workers=workers)
    environments.start()
    limits = Limits(environment.max_turns, environment.max_turn_tokens, environment.max_images)
    return Episodes(engine, encode, environments, limits=limits, world=world, warn=warn)


def open_model(
    engine: EngineConfig,
    path: str,
    *,
    dtype: str,
    longest: int | None,
    sequences_per_batch: int,
    warn: Callable[[str], None],
    returned_images: int = 0,
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
    needs = EngineNeeds(vlm, path, longest, dtype, sequences_per_batch, warn, returned_images=returned_images)
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
