"""Builds the objects of a run from its config. Nothing below this file sees a config."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from vlm_sapo import config as cfg
from vlm_sapo.algo.advantages import ADVANTAGES
from vlm_sapo.configfile import dump
from vlm_sapo.data.rows import ExampleSet, open_rows
from vlm_sapo.data.stream import PromptStream
from vlm_sapo.evaluation.evaluate import evaluate
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.layout import Layout, Plain, SharedPrefix
from vlm_sapo.models.vlm import VLM, load_vlm
from vlm_sapo.plugins import locate, resolve
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.folder import RunFolder
from vlm_sapo.rewards.pool import Reward
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.training import checkpoint
from vlm_sapo.training.batch import minibatches
from vlm_sapo.training.loss import build_loss
from vlm_sapo.training.policy import Policy
from vlm_sapo.training.run import Core, Evaluator, Training, write_rollouts
from vlm_sapo.training.selfcheck import SelfCheck
from vlm_sapo.types import Example, Prompt, Sampling

EVAL_SEED = 1_000_003


def build_examples(rows: cfg.Rows) -> ExampleSet:
    """The examples of a `data` or `eval.data` section."""
    transform = resolve(rows.transform, field="data.transform") if rows.transform else None
    return ExampleSet(
        open_rows(rows.source, split=rows.split, args=rows.args),
        name=rows.source,
        columns=rows.columns,
        keep=rows.filter,
        limit=rows.limit,
        transform=transform,
    )


def open_folder(config: cfg.TrainConfig | cfg.SftConfig) -> RunFolder:
    """The run's folder, made or found to belong to this config."""
    folder = RunFolder(config.run.folder)
    stored = config.model_copy(update={"run": config.run.model_copy(update={"overwrite": False})})
    folder.open(dump(stored), overwrite=config.run.overwrite)
    return folder


def build_training(config: cfg.TrainConfig, folder: RunFolder, console: Console) -> Training:
    """Everything that `train` needs, resumed where the run's folder holds a checkpoint."""
    train, rollout, algo = config.train, config.rollout, config.algo
    if train.minibatches == 1:
        console.warn(
            "train.minibatches is 1: every ratio is 1 and every objective the plain policy gradient; use 4"
        )
    core = _build_core(
        config,
        folder,
        console,
        kl=algo.kl,
        temperature=rollout.temperature,
        reuse_sampled=train.old_logprobs == "rollout",
    )
    split = partial(
        minibatches,
        count=train.minibatches,
        budget=train.tokens_per_microbatch,
        mask_truncated=algo.mask_truncated,
    )
    return Training(
        core=core,
        check=SelfCheck(core.policy, console, budget=train.tokens_per_microbatch),
        advantage=ADVANTAGES[algo.advantage],
        loss=build_loss(
            algo.objective.model_dump(),
            ratio=algo.ratio,
            reduction=algo.reduction,
            kl=algo.kl,
            max_tokens=rollout.max_tokens,
        ),
        split=split,
        sampling=Sampling(rollout.group, rollout.max_tokens, rollout.temperature, config.run.seed),
        prompts_per_step=train.prompts_per_step,
        log_rollouts=partial(write_rollouts, core.folder, config.log.rollouts),
    )


def build_sft(config: cfg.SftConfig, folder: RunFolder, console: Console) -> Core:
    """Everything that `sft` needs."""
    return _build_core(config, folder, console)


def _build_core(
    config: cfg.TrainConfig | cfg.SftConfig,
    folder: RunFolder,
    console: Console,
    *,
    kl: float = 0.0,
    temperature: float = 1.0,
    reuse_sampled: bool = False,
) -> Core:
    reward = _build_reward(config.reward)  # first: its workers start while the model loads
    torch.manual_seed(config.run.seed)
    train = config.train
    accelerator = Accelerator(mixed_precision=train.precision)
    if accelerator.num_processes > 1:
        raise ValueError(
            f"this version trains in one process; the launcher started {accelerator.num_processes}, start one"
        )
    examples = build_examples(config.data)
    found = checkpoint.latest(folder.path / "checkpoints")
    vlm = _load(config.model, str(found or locate(config.model.path)), accelerator, config.model.freeze)
    reference = None
    if kl:
        everything = ["vision", "merger", "language"]
        reference = _load(config.model, str(locate(config.model.path)), accelerator, everything)
    encode = _build_encoder(vlm, config)
    policy = Policy(
        vlm,
        accelerator,
        total_steps=train.steps,
        lr=train.lr,
        schedule=train.schedule,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        betas=train.betas,
        max_grad_norm=train.max_grad_norm,
        temperature=temperature,
        reference=reference,
        layout=_layout(train.layout, vlm, console),
        reuse_sampled=reuse_sampled,
    )
    engine = HfEngine(vlm, prompts_per_batch=config.rollout.prompts_per_batch, autocast=accelerator.autocast)
    stream = PromptStream(examples, encode, seed=config.run.seed, skip=config.data.on_error == "skip")
    progress = checkpoint.restore(found, policy) if found else checkpoint.Progress()
    stream.position, stream.skipped = progress.position, progress.skipped
    folder.rewind(progress.step)
    console.say(_banner(config, vlm, examples, accelerator, found))
    return Core(
        folder=folder,
        console=console,
        policy=policy,
        stream=stream,
        evaluator=Evaluator(
            _measure(config, engine, encode, reward, console), config.eval.every, folder, console
        ),
        progress=progress,
        checkpoint_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        engine=engine,
        reward=reward,
    )


def _build_reward(reward: cfg.Reward) -> Reward:
    return Reward(
        [part.model_dump() for part in reward.parts],
        on_error=reward.on_error,
        timeout=reward.timeout,
        workers=reward.workers,
    )


def _load(model: cfg.Model, path: str, accelerator: Accelerator, freeze: list[str]) -> VLM:
    return load_vlm(
        path,
        dtype=model.dtype,
        device=accelerator.device,
        gradient_checkpointing=model.gradient_checkpointing,
        freeze=freeze,
    )


def _layout(name: str, vlm: VLM, console: Console) -> Layout:
    if name == "plain":
        return Plain()
    if not vlm.attends_fully:
        console.warn(
            f"train.layout is shared, but {vlm.model.config.model_type} has layers without full attention; "
            "the plain layout is used"
        )
        return Plain()
    return SharedPrefix()


def _build_encoder(vlm: VLM, config: cfg.TrainConfig | cfg.SftConfig) -> Callable[[Example], Prompt]:
    return Encoder(
        vlm,
        system=config.data.system,
        template=config.data.template,
        min_pixels=config.model.min_pixels,
        max_pixels=config.model.max_pixels,
        max_tokens=config.data.max_prompt_tokens,
    )


def _measure(config, engine, encode, reward, console) -> Callable[[], tuple[dict, list[dict]]] | None:
    if config.eval.data is None:
        return None
    examples = build_examples(config.eval.data)
    sampling = Sampling(config.eval.samples, config.rollout.max_tokens, config.eval.temperature, EVAL_SEED)

    def run() -> tuple[dict, list[dict]]:
        with console.progress("evaluate", len(examples)) as show:
            part = config.eval.part or reward.parts[0].label
            skip = config.data.on_error == "skip"
            return evaluate(engine, examples, encode, reward, sampling, part=part, skip=skip, progress=show)

    return run


def _banner(config, vlm: VLM, examples: ExampleSet, accelerator: Accelerator, found: Path | None) -> str:
    trained = sum(parameter.numel() for parameter in vlm.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in vlm.parameters())
    start = f"resumed from {found}" if found else f"model {config.model.path}"
    return (
        f"{start}: {total:,} parameters, {trained:,} of them trained, on {accelerator.device}; "
        f"{len(examples):,} rows of {config.data.source}; writing to {config.run.folder}"
    )
