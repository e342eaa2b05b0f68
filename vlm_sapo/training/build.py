"""Builds the objects of a run from its config. Nothing below this file sees a config."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from vlm_sapo.config import schema as cfg
from vlm_sapo.data.sources import build_examples, build_stream
from vlm_sapo.data.stream import TaskMixture
from vlm_sapo.distributed import World
from vlm_sapo.evaluation.benchmarks import Benchmark, build_benchmarks
from vlm_sapo.evaluation.periodic import HELD_OUT, EvaluationSet, Evaluator
from vlm_sapo.evaluation.results import Measure
from vlm_sapo.models import lora as adapters
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import Adapters, load_outline, load_vlm
from vlm_sapo.models.packing import Layout, choose
from vlm_sapo.models.parallel import Replicated
from vlm_sapo.models.vlm import VLM
from vlm_sapo.plugins import locate
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.reporting.step_report import StepReport
from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.rollout.build import EngineNeeds, build_engine, build_episodes
from vlm_sapo.rollout.engine import RolloutEngine
from vlm_sapo.rollout.sampler import PrefetchedSampler, Rollouts, Sampler
from vlm_sapo.training.checkpoint import Progress, restore
from vlm_sapo.training.checks import Parity, SelfCheck, allowed_difference
from vlm_sapo.training.folder import build_alarms, build_checkpoints, open_logs
from vlm_sapo.training.launch import Processes, build_parallelism
from vlm_sapo.training.loss import PolicyLoss, build_advantage, build_loss
from vlm_sapo.training.optimizer import OptimizerSettings
from vlm_sapo.training.policy import ADAPTER, MemoryBudget, Policy, PolicySettings, UpdateGuard
from vlm_sapo.training.run import Interruption, Run, TrainingRun
from vlm_sapo.types import Sampling

EVAL_SEED = 1_000_003
Config = cfg.TrainConfig | cfg.SftConfig


@dataclass(frozen=True)
class Purpose:
    """In what a run of `train` differs from one of `sft`."""

    prompts_per_step: int
    minibatches: int
    sampling: Sampling
    algo: cfg.AlgoConfig
    reuse_sampled: bool = False
    score_all: bool = False


def build_training(
    config: cfg.TrainConfig, folder: RunFolder, processes: Processes
) -> tuple[TrainingRun, PolicyLoss]:
    """Everything that `train` needs, resumed where the run's folder holds a checkpoint."""
    train, rollout, algo = config.train, config.rollout, config.algo
    console, world = processes.console, processes.world
    if train.minibatches == 1:
        console.warn(
            "train.minibatches is 1: every ratio is 1 and every objective the plain policy gradient; use 4"
        )
    loss, advantage = build_loss(algo, max_tokens=rollout.max_tokens), build_advantage(algo.advantage)
    own_old = algo.correction is not None or algo.replay == "r2"
    purpose = Purpose(
        prompts_per_step=train.prompts_per_step,
        minibatches=train.minibatches,
        sampling=Sampling(rollout.group, rollout.max_tokens, rollout.temperature, config.run.seed),
        algo=algo,
        reuse_sampled=train.old_logprobs != "recompute" and not own_old,
        score_all=not advantage.rewards_decide,
    )
    run = _build_run(config, folder, processes, purpose)
    self_check = SelfCheck(
        run.policy,
        console,
        choose=train.old_logprobs == "auto" and not own_old and not run.progress.step,
        uncorrected=bool(rollout.ahead) and algo.correction is None,
    )
    shares_weights = run.rollouts.engine.shares_weights
    report = StepReport(
        folder,
        build_alarms(config, folder, console, run.interruption),
        world,
        tokenizer=run.policy.vlm.tokenizer,
        loss=loss,
        rollouts=config.log.rollouts,
        parts=[(part.name, part.args) for part in config.reward.parts],
    )
    training_run = TrainingRun(
        **{item.name: vars(run)[item.name] for item in fields(run)},
        minibatches=train.minibatches,
        mask_truncated=algo.mask_truncated,
        keep_zero_advantages=algo.kl > 0,
        checks=[self_check] if shares_weights else [self_check, build_parity(config, run)],
        advantage=advantage,
        report=report,
    )
    return training_run, loss


def build_sft(config: cfg.SftConfig, folder: RunFolder, processes: Processes) -> Run:
    """Everything that `sft` needs."""
    purpose = Purpose(
        prompts_per_step=config.train.rows_per_step,
        minibatches=1,
        sampling=Sampling(1, config.rollout.max_tokens, 1.0, config.run.seed),
        algo=cfg.AlgoConfig(),
    )
    return _build_run(config, folder, processes, purpose)


def build_parity(config: cfg.TrainConfig, run: Run) -> Parity:
    """The comparison of the run's engine with its policy."""
    engine = config.rollout.engine
    tolerance = config.rollout.tolerance
    if tolerance is None:
        tolerance = allowed_difference(run.policy, engine.weights_dtype(default_dtype(config)))
    return Parity(
        run.policy,
        run.rollouts,
        run.encode,
        run.console,
        tolerance=tolerance,
        every=config.rollout.check_every,
        server_urls=engine.addresses,
    )


def default_dtype(config: Config) -> str:
    """Type of an engine's weights that computes as the trainer does."""
    return "bfloat16" if config.train.precision == "bf16" else config.model.dtype


def _build_run(config: Config, folder: RunFolder, processes: Processes, purpose: Purpose) -> Run:
    _check_moe(config.model, purpose.algo)
    console, world = processes.console, processes.world
    reward = build_reward(config.reward, processes.local)  # first: its workers start while the model loads
    torch.manual_seed(config.run.seed)
    checkpoints = build_checkpoints(config, folder, processes)
    checkpoint = checkpoints.newest()
    path, vlm = _load_trained(config.model, checkpoint, processes.accelerator.device)
    encode = build_encoder(vlm, config.model, max_tokens=config.data.max_prompt_tokens)
    stream = _build_stream(config, encode, processes, purpose)
    policy = _build_policy(config, vlm, processes, purpose)
    benchmarks = build_benchmarks(config.eval.benchmarks, limit=config.eval.limit)
    needs = EngineNeeds(
        vlm,
        path,
        longest=longest_row(config, benchmarks, vlm),
        dtype=default_dtype(config),
        prompts_per_batch=config.rollout.prompts_per_batch,
        warn=console.warn,
        folder=folder.path / "weights",
        autocast=processes.accelerator.autocast,
        with_full_params=policy.with_full_params,
        world=world,
        experts=purpose.algo.replay == "r3",
    )
    engine = build_engine(config.rollout.engine, needs)
    if config.rollout.environment is not None:
        engine = build_episodes(config.rollout.environment, engine, encode, stream.world)
    rollouts = _build_rollouts(config, stream, engine, reward, world, purpose)
    progress, state = restore(checkpoint, policy) if checkpoint else (Progress(), None)
    if state is not None:
        rollouts.restore(state)
    open_logs(config, folder, processes, progress.step)
    console.say(_banner(config, vlm, stream, processes, checkpoint))
    evaluator = Evaluator(
        sets=_evaluation_sets(config, benchmarks),
        every=config.eval.every,
        folder=folder,
        console=console,
        vlm=vlm,
        rollouts=rollouts,
        encode=encode,
        reward=reward,
        skip_bad_rows=config.data.on_error == "skip",
        world=world,
    )
    return Run(
        folder=folder,
        console=console,
        policy=policy,
        stream=stream,
        encode=encode,
        evaluator=evaluator,
        progress=progress,
        checkpoint_every=config.checkpoint.every,
        checkpoints=checkpoints,
        interruption=Interruption(world),
        rollouts=rollouts,
        world=world,
    )


def _check_moe(model: cfg.ModelConfig, algo: cfg.AlgoConfig) -> None:
    """Raises ValueError where options for a mixture of experts meet a dense model."""
    options = {
        f"algo.replay ({algo.replay})": algo.replay != "none",
        f"algo.balance ({algo.balance:g})": algo.balance > 0,
        "model.freeze (router)": "router" in model.freeze,
    }
    used = [name for name, is_used in options.items() if is_used]
    if used and not load_outline(path := str(locate(model.path))).routers:
        raise ValueError(f"{used[0]} must be for a mixture of experts; {path} is dense, so leave it out")


def _load_trained(model: cfg.ModelConfig, checkpoint: Path | None, device: torch.device) -> tuple[str, VLM]:
    """The model to train, from the checkpoint or from the start, in host memory unless it is in 4 bits; and
    the path of the weights that it was loaded from, adapters aside."""
    if model.lora is None:
        path = str(checkpoint or locate(model.path))
        return path, _load(model, path, freeze=model.freeze)
    path, lora = str(locate(model.path)), model.lora
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
    return path, _load(model, path, freeze=model.freeze, lora=shape, device=device if lora.bits else "cpu")


def _load(
    model: cfg.ModelConfig,
    path: str,
    *,
    freeze: Sequence[str] = (),
    lora: Adapters | None = None,
    device: torch.device | str = "cpu",
) -> VLM:
    return load_vlm(
        path,
        dtype=model.dtype,
        device=device,
        gradient_checkpointing=model.gradient_checkpointing,
        freeze=list(freeze),
        lora=lora,
    )


def _build_stream(config: Config, encode: Encoder, processes: Processes, purpose: Purpose) -> TaskMixture:
    minibatch = purpose.prompts_per_step // purpose.minibatches
    # What samples in the background reports failures by itself.
    world = World() if config.rollout.ahead else processes.world
    stream = build_stream(config.data, encode, seed=config.run.seed, minibatch=minibatch, world=world)
    for task in (task for task, share in stream.shares.items() if share * minibatch < 1):
        processes.console.warn(
            f"not every mini-batch of {minibatch} prompts has one of {task}; its share is too small"
        )
    return stream


def _build_policy(config: Config, vlm: VLM, processes: Processes, purpose: Purpose) -> Policy:
    train, algo, reference = config.train, purpose.algo, None
    if algo.kl:
        reference = vlm if config.model.lora else _load(config.model, str(locate(config.model.path)))
    parallelism = build_parallelism(config, processes)
    optimizer = OptimizerSettings(
        lr=train.lr,
        total_steps=train.steps,
        name=train.optimizer,
        schedule=train.schedule,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        betas=train.betas,
    )
    settings = PolicySettings(
        optimizer,
        max_grad_norm=train.max_grad_norm,
        temperature=purpose.sampling.temperature,
        reuse_sampled=purpose.reuse_sampled,
        replay=algo.replay != "none",
        score_all=purpose.score_all,
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
        layout=_layout(train.layout, vlm, processes.console),
        reference=reference,
    )


def _build_rollouts(
    config: Config,
    stream: TaskMixture,
    engine: RolloutEngine,
    reward: RewardPool,
    world: World,
    purpose: Purpose,
) -> Rollouts:
    rollout = config.rollout
    sampler = Sampler(stream, engine, reward, purpose.sampling, purpose.prompts_per_step, rollout.resample)
    if not rollout.ahead:
        return sampler
    return PrefetchedSampler(sampler, steps=rollout.ahead, last=config.train.steps, world=world)


def longest_row(config: Config, benchmarks: Sequence[Benchmark], vlm: VLM) -> int:
    """The most tokens of a prompt and its response."""
    responses = max([config.rollout.max_tokens, *(benchmark.max_tokens for benchmark in benchmarks)])
    return int(min(config.data.max_prompt_tokens + responses, vlm.context))


def build_reward(reward: cfg.RewardConfig, trainers: int = 1) -> RewardPool:
    """The reward and the processes that grade, beside so many training processes of this machine."""
    return RewardPool(
        [part.model_dump() for part in reward.parts],
        on_error=reward.on_error,
        timeout=reward.timeout,
        workers=reward.workers or max(min((os.cpu_count() or 1) // trainers, 8), 1),
    )


def _layout(name: str, vlm: VLM, console: Console) -> Layout:
    if name == "shared" and not vlm.attends_fully:
        console.warn(
            f"train.layout is shared, but {vlm.model.config.model_type} has layers without full attention; "
            "the plain layout is used"
        )
    return choose(name, attends_fully=vlm.attends_fully)


def build_encoder(vlm: VLM, model: cfg.ModelConfig, *, max_tokens: int) -> Encoder:
    """Encodes examples for the model."""
    return Encoder(vlm, min_pixels=model.min_pixels, max_pixels=model.max_pixels, max_tokens=max_tokens)


def _evaluation_sets(config: Config, benchmarks: Sequence[Benchmark]) -> list[EvaluationSet]:
    """`held-out` on `eval.data`, and the benchmarks."""
    section = config.eval
    sampling = Sampling(
        section.samples,
        config.rollout.max_tokens,
        section.temperature,
        EVAL_SEED,
        top_p=section.top_p,
        top_k=section.top_k,
        min_p=section.min_p,
    )
    sets = []
    if section.data is not None:
        examples = build_examples(section.data, task=HELD_OUT)
        measure = Measure(section.part or config.reward.measured)
        sets.append(EvaluationSet(HELD_OUT, examples, sampling, measure))
    for item in benchmarks:
        longer = replace(sampling, max_tokens=item.max_tokens)
        sets.append(EvaluationSet(item.name, item.examples, longer, item.measure, parts=item.parts))
    return sets


def _banner(config, vlm: VLM, stream: TaskMixture, processes: Processes, found: Path | None) -> str:
    trained = sum(parameter.numel() for parameter in vlm.parameters() if parameter.requires_grad)
    total = vlm.model.num_parameters()
    tasks = ", ".join(stream.streams)
    start = f"resumed from {found}" if found else f"model {config.model.path}"
    size, shard = processes.world.size, processes.shard
    where = processes.accelerator.device.type
    if size > 1:
        held = "each with a copy" if shard == 1 else f"{shard} of which share a copy"
        where = f"{size} processes ({where}), {held}"
    return (
        f"{start}: {total:,} parameters, {trained:,} of them trained, on {where}; "
        f"{len(stream):,} rows of {tasks}; writing to {config.run.folder}"
    )
