"""Builds the model that is trained, its encoder and its policy from a config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from vlm_sapo.config import schema as cfg
from vlm_sapo.hub import local_model
from vlm_sapo.models import lora as adapters
from vlm_sapo.models.encode import NO_TOOLS, Encoder
from vlm_sapo.models.fused import should_fuse
from vlm_sapo.models.loading import Adapters, load_outline, load_vlm
from vlm_sapo.models.packing import Layout, choose
from vlm_sapo.models.parallel import Replicated
from vlm_sapo.models.tool_chat import ToolChat
from vlm_sapo.models.vlm import VLM
from vlm_sapo.plugins import locate
from vlm_sapo.reporting.console import Console
from vlm_sapo.training.launch import Processes, build_parallelism, is_sharded
from vlm_sapo.training.optimizer import OptimizerSettings
from vlm_sapo.training.policy import ADAPTER, MemoryBudget, Policy, PolicySettings, UpdateGuard
from vlm_sapo.types import Sampling

Config = cfg.TrainConfig | cfg.SftConfig


@dataclass(frozen=True)
class Purpose:
    """The settings in which `train` and `sft` differ."""

    prompts_per_step: int
    minibatches: int
    sampling: Sampling
    algo: cfg.AlgoConfig
    reuse_sampled: bool = False
    score_all: bool = False


def check_moe(model: cfg.ModelConfig, algo: cfg.AlgoConfig) -> None:
    """Raises ValueError if options for MoE models are set for a dense model."""
    options = {
        f"algo.replay ({algo.replay})": algo.replay != "none",
        f"algo.balance ({algo.balance:g})": algo.balance > 0,
        "model.freeze (router)": "router" in model.freeze,
    }
    used = [name for name, is_used in options.items() if is_used]
    if used and not load_outline(local_model(model.path, model.revision, weights=False)).routers:
        raise ValueError(
            f"{used[0]} must be for a mixture of experts; {model.path} is dense, so leave it out"
        )


def weights_path(model: cfg.ModelConfig, checkpoint: Path | None) -> str:
    """The folder of the trained model's weights without adapters: the checkpoint, or that of `model.path`."""
    if checkpoint and model.lora is None:
        return str(checkpoint)
    return local_model(model.path, model.revision)


def load_trained(config: Config, checkpoint: Path | None, processes: Processes) -> tuple[str, VLM]:
    """Loads the model to train, from the checkpoint or from `model.path`: into host memory, with 4-bit
    weights onto the device, or without its weights if it will be sharded. Returns also the path of its
    weights without adapters."""
    model = config.model
    path, lora = weights_path(model, checkpoint), model.lora
    if lora is None:
        return path, _load(config, path, processes, freeze=model.freeze)
    start = Path(locate(lora.adapter)) if lora.adapter else None
    if start is not None:
        adapters.check(start, model.path)
    shape = Adapters(
        base=model.path,
        rank=lora.rank,
        alpha=lora.alpha,
        parts=tuple(lora.parts),
        folder=checkpoint / ADAPTER if checkpoint else start,
        bits=lora.bits,
    )
    return path, _load(config, path, processes, freeze=model.freeze, lora=shape)


def _load(
    config: Config,
    path: str,
    processes: Processes,
    *,
    freeze: Sequence[str] = (),
    lora: Adapters | None = None,
) -> VLM:
    sharded = is_sharded(config, processes)
    vlm = load_vlm(
        path,
        dtype=config.model.dtype,
        device=processes.accelerator.device if lora is not None and lora.bits else "cpu",
        gradient_checkpointing=config.model.gradient_checkpointing,
        freeze=list(freeze),
        lora=lora,
        defer=sharded,
    )
    if should_fuse(config.model.fused):
        vlm.fuse()
    if sharded and vlm.unread is None:
        size = sum(parameter.nbytes for parameter in vlm.parameters())
        processes.console.warn(
            f"the weights in {path} are quantized and can't be read in parts: until they are sharded each "
            f"process holds all of them in host memory ({size / 1e9:.1f} GB)"
        )
    return vlm


def build_encoder(
    vlm: VLM, model: cfg.ModelConfig, *, max_tokens: int, tools: ToolChat = NO_TOOLS
) -> Encoder:
    """The encoder of the model's prompts, which offer these tools."""
    return Encoder(
        vlm,
        min_pixels=model.min_pixels,
        max_pixels=model.max_pixels,
        max_tokens=max_tokens,
        tools=tools,
    )


def build_policy(config: Config, vlm: VLM, processes: Processes, purpose: Purpose) -> Policy:
    """The policy with its optimizer, and the reference model if there is a KL term."""
    train, algo, reference = config.train, purpose.algo, None
    if algo.kl:
        reference = vlm if config.model.lora else _load(config, weights_path(config.model, None), processes)
    parallelism = build_parallelism(config, processes)
    optimizer = OptimizerSettings(
        lr=train.lr,
        total_steps=train.steps,
        name=train.optimizer,
        schedule=train.schedule,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        betas=train.betas,
        seed=config.run.seed,
    )
    settings = PolicySettings(
        optimizer,
        max_grad_norm=train.max_grad_norm,
        temperature=purpose.sampling.temperature,
        reuse_sampled=purpose.reuse_sampled,
        replay=algo.replay != "none",
        score_all=purpose.score_all,
        layout=_layout(train.layout, vlm, processes.console),
    )
    can_shrink = isinstance(parallelism, Replicated)
    bad_updates = config.run.folder / "bad_updates"
    return Policy(
        vlm,
        processes.accelerator,
        settings,
        parallelism=parallelism,
        memory=MemoryBudget(train.tokens_per_microbatch, processes.console, can_shrink=can_shrink),
        guard=UpdateGuard(bad_updates, processes.console, limit=train.bad_updates, world=processes.world),
        reference=reference,
    )


def _layout(name: str, vlm: VLM, console: Console) -> Layout:
    if name == "shared" and not vlm.shares_prefix:
        console.warn(
            f"train.layout is shared, but transformers {version('transformers')} has another form of "
            f"{vlm.model.config.model_type}'s linear attention than is known here; the plain layout is used, "
            "and responses are sampled from copies of their prompt: the same results, more slowly"
        )
    return choose(name, shares_prefix=vlm.shares_prefix)
