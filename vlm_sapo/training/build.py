"""Builds the objects of a run from its config. Nothing below this file sees a config."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from vlm_sapo.algo.advantages import ADVANTAGES
from vlm_sapo.config import schema as cfg
from vlm_sapo.data.sources import build_examples, build_stream
from vlm_sapo.data.stream import TaskMixture
from vlm_sapo.distributed import World
from vlm_sapo.evaluation.benchmarks import Benchmark, build_benchmarks
from vlm_sapo.evaluation.evaluate import evaluate
from vlm_sapo.evaluation.periodic import HELD_OUT, Evaluator
from vlm_sapo.evaluation.results import Measure
from vlm_sapo.evaluation.samples import SampleFile
from vlm_sapo.models import lora as adapters
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import Adapters, load_outline, load_vlm
from vlm_sapo.models.packing import Layout, choose
from vlm_sapo.models.parallel import Replicated
from vlm_sapo.models.vlm import VLM
from vlm_sapo.plugins import locate
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.reporting.step_report import Reporter
from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.rollout.build import build_engine, engine_dtype, problems_at_once
from vlm_sapo.rollout.sampler import PrefetchedSampler, Sampler
from vlm_sapo.training.batch import minibatches
from vlm_sapo.training.checkpoint import Progress, restore
from vlm_sapo.training.checks import Parity, allowed
from vlm_sapo.training.guard import Guard
from vlm_sapo.training.interruption import Interruption
from vlm_sapo.training.launch import Processes, build_parallelism
from vlm_sapo.training.loss import build_loss
from vlm_sapo.training.memory import Memory
from vlm_sapo.training.policy import ADAPTER, Policy
from vlm_sapo.training.resume import build_alarms, build_checkpoints, go_on
from vlm_sapo.training.run import Core, Training
from vlm_sapo.training.selfcheck import SelfCheck
from vlm_sapo.types import Sampling

EVAL_SEED = 1_000_003


def build_training(config: cfg.TrainConfig, folder: RunFolder, processes: Processes) -> Training:
    """Everything that `train` needs, resumed where the run's folder holds a checkpoint."""
    train, rollout, algo = config.train, config.rollout, config.algo
    console, world = processes.console, processes.world
    if train.minibatches == 1:
        console.warn(
            "train.minibatches is 1: every ratio is 1 and every objective the plain policy gradient; use 4"
        )
    own_old = algo.correction is not None or algo.replay == "r2"
    core = _build_core(
        config,
        folder,
        processes,
        minibatch=train.prompts_per_step // train.minibatches,
        algo=algo,
        reuse_sampled=train.old_logprobs != "recompute" and not own_old,
        sampling=Sampling(rollout.group, rollout.max_tokens, rollout.temperature, config.run.seed),
        prompts_per_step=train.prompts_per_step,
    )
    split = partial(
        minibatches,
        count=train.minibatches,
        mask_truncated=algo.mask_truncated,
        keep_flat=algo.kl > 0,
        world=world,
    )
    choose = train.old_logprobs == "auto" and not own_old and not core.progress.step
    uncorrected = bool(rollout.ahead) and algo.correction is None
    checks = [
        SelfCheck(
            core.policy,
            console,
            choose=choose,
            world=world,
            uncorrected=uncorrected,
        )
    ]
    if rollout.engine.type != "hf":
        checks.append(build_parity(config, core))
    return Training(
        core=core,
        checks=checks,
        advantage=ADVANTAGES[algo.advantage],
        loss=build_loss(
            algo.objective.model_dump(),
            ratio=algo.ratio,
            reduction=algo.reduction,
            kl=algo.kl,
            max_tokens=rollout.max_tokens,
            correction=algo.correction.model_dump() if algo.correction else None,
            balance=algo.balance,
        ),
        split=split,
        report=Reporter(
            core,
            minibatches=train.minibatches,
            rollouts=config.log.rollouts,
            alarms=build_alarms(config, core),
            parts=[(part.name, part.args) for part in config.reward.parts],
        ),
    )


def build_sft(config: cfg.SftConfig, folder: RunFolder, processes: Processes) -> Core:
    """Everything that `sft` needs."""
    rows = config.train.rows_per_step
    sampling = Sampling(1, config.rollout.max_tokens, 1.0, config.run.seed)
    return _build_core(
        config,
        folder,
        processes,
        minibatch=rows,
        sampling=sampling,
        prompts_per_step=rows,
        algo=cfg.AlgoConfig(),
    )


def build_parity(config: cfg.TrainConfig, core: Core) -> Parity:
    """The comparison of the run's engine with its policy."""
    engine = config.rollout.engine
    dtype = engine_dtype(engine, default_dtype(config))
    return Parity(
        core.policy,
        core.rollouts,
        core.encode,
        core.console,
        sampling=core.rollouts.sampling,
        tolerance=config.rollout.tolerance or allowed(core.policy, dtype),
        every=config.rollout.check_every,
        budget=config.train.tokens_per_microbatch,
        world=core.world,
        places=engine.servers if engine.type == "vllm_server" else (),
    )


def default_dtype(config: cfg.TrainConfig | cfg.SftConfig) -> str:
    """Type of an engine's weights that computes as the trainer does."""
    return "bfloat16" if config.train.precision == "bf16" else config.model.dtype


def _build_core(
    config: cfg.TrainConfig | cfg.SftConfig,
    folder: RunFolder,
    processes: Processes,
    *,
    minibatch: int,
    sampling: Sampling,
    prompts_per_step: int,
    algo: cfg.AlgoConfig,
    reuse_sampled: bool = False,
) -> Core:
    _check_mixture(config.model, algo)
    console, world, accelerator = processes.console, processes.world, processes.accelerator
    reward = build_reward(config.reward, processes.local)  # first: its workers start while the model loads
    torch.manual_seed(config.run.seed)
    checkpoints = build_checkpoints(config, folder, processes)
    found = checkpoints.newest()
    path, vlm = _load_trained(config.model, found, accelerator.device)
    encode = build_encoder(vlm, config.model, max_tokens=config.data.max_prompt_tokens)
    background = World() if config.rollout.ahead else world  # what draws beside the loop tells by itself
    stream = build_stream(config.data, encode, seed=config.run.seed, minibatch=minibatch, world=background)
    for task in (task for task, share in stream.shares.items() if share * minibatch < 1):
        console.warn(f"not every mini-batch of {minibatch} prompts has one of {task}; its share is too small")
    parallelism = build_parallelism(config, processes)
    policy = _build_policy(config, vlm, processes, parallelism, sampling.temperature, algo, reuse_sampled)
    benchmarks = build_benchmarks(config.eval.benchmarks, limit=config.eval.limit)
    engine = build_engine(
        config.rollout.engine,
        vlm,
        path,
        longest=longest_row(config, benchmarks, vlm),
        dtype=default_dtype(config),
        prompts_per_batch=config.rollout.prompts_per_batch,
        warn=console.warn,
        folder=folder.path / "weights",
        autocast=accelerator.autocast,
        with_full_params=partial(parallelism.with_full_params, vlm),
        world=world,
        experts=algo.replay == "r3",
    )
    rollouts = Sampler(stream, engine, reward, sampling, prompts_per_step, config.rollout.resample)
    if config.rollout.ahead:
        steps, beside = config.rollout.ahead, config.rollout.engine.type == "vllm_server"
        rollouts = PrefetchedSampler(
            rollouts, steps=steps, last=config.train.steps, world=world, beside=beside
        )
    progress, state = restore(found, policy) if found else (Progress(), None)
    if state is not None:
        rollouts.restore(state)
    go_on(config, folder, processes, progress.step)
    console.say(_banner(config, vlm, stream, processes, found))
    measures = _measures(config, engine, encode, reward, processes, benchmarks)
    return Core(
        folder=folder,
        console=console,
        policy=policy,
        stream=stream,
        encode=encode,
        evaluator=Evaluator(
            measures, config.eval.every, folder, console, partial(_ready, rollouts, vlm), world
        ),
        progress=progress,
        checkpoint_every=config.checkpoint.every,
        checkpoints=checkpoints,
        interruption=Interruption(world),
        rollouts=rollouts,
        world=world,
    )


def _check_mixture(model: cfg.ModelConfig, algo: cfg.AlgoConfig) -> None:
    """Raises ValueError where options for a mixture of experts meet a dense model."""
    asked = {
        f"algo.replay ({algo.replay})": algo.replay != "none",
        f"algo.balance ({algo.balance:g})": algo.balance > 0,
        "model.freeze (router)": "router" in model.freeze,
    }
    options = [name for name, wanted in asked.items() if wanted]
    if options and not load_outline(path := str(locate(model.path))).routers:
        raise ValueError(f"{options[0]} must be for a mixture of experts; {path} is dense, so leave it out")


def _load_trained(model: cfg.ModelConfig, found: Path | None, device: torch.device) -> tuple[str, VLM]:
    """The model to train, from the checkpoint `found` or from the start, in host memory unless it is in 4
    bits; and the path of the weights that it was made from, adapters aside."""
    if model.lora is None:
        path = str(found or locate(model.path))
        return path, _load(model, path, model.freeze)
    path, lora = str(locate(model.path)), model.lora
    given = Path(locate(lora.adapter)) if lora.adapter else None
    if given is not None:
        adapters.check(given, model.path)
    shape = Adapters(
        base=model.path,
        rank=lora.rank,
        alpha=lora.alpha,
        parts=tuple(lora.parts),
        folder=found / ADAPTER if found else given,
        bits=lora.bits,
    )
    return path, _load(model, path, model.freeze, shape, device if lora.bits else "cpu")


def _build_policy(config, vlm, processes, parallelism, temperature, algo, reuse_sampled) -> Policy:
    train, reference = config.train, None
    if algo.kl:
        reference = vlm if config.model.lora else _load(config.model, str(locate(config.model.path)), [])
    return Policy(
        vlm,
        processes.accelerator,
        total_steps=train.steps,
        lr=train.lr,
        schedule=train.schedule,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        betas=train.betas,
        max_grad_norm=train.max_grad_norm,
        optimizer=train.optimizer,
        temperature=temperature,
        reference=reference,
        layout=_layout(train.layout, vlm, processes.console),
        reuse_sampled=reuse_sampled,
        replay=algo.replay != "none",
        balance=algo.balance > 0,
        parallelism=parallelism,
        guard=Guard(
            config.run.folder / "bad_updates",
            processes.console,
            limit=train.bad_updates,
            world=processes.world,
        ),
        memory=Memory(
            train.tokens_per_microbatch, processes.console, can_shrink=isinstance(parallelism, Replicated)
        ),
    )


def _ready(rollouts: Sampler | PrefetchedSampler, vlm: VLM) -> None:
    """Gives the engine the present weights, when it is free."""
    rollouts.settle()
    rollouts.engine.sync(vlm)


def longest_row(config: cfg.TrainConfig | cfg.SftConfig, benchmarks: Sequence[Benchmark], vlm: VLM) -> int:
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


def _load(
    model: cfg.ModelConfig,
    path: str,
    freeze: list[str],
    lora: Adapters | None = None,
    device: torch.device | str = "cpu",
) -> VLM:
    return load_vlm(
        path,
        dtype=model.dtype,
        device=device,
        gradient_checkpointing=model.gradient_checkpointing,
        freeze=freeze,
        lora=lora,
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


def _measures(
    config, engine, encode, reward, processes, benchmarks
) -> dict[str, Callable[[SampleFile], tuple]]:
    """By name, functions that evaluate: `held-out` on `eval.data`, and the benchmarks."""
    draw = Sampling(
        config.eval.samples,
        config.rollout.max_tokens,
        config.eval.temperature,
        EVAL_SEED,
        top_p=config.eval.top_p,
        top_k=config.eval.top_k,
        min_p=config.eval.min_p,
    )
    console, world = processes.console, processes.world
    batch = problems_at_once(config.rollout.engine, config.rollout.prompts_per_batch)
    skip = config.data.on_error == "skip"
    found: dict[str, Callable[[SampleFile], tuple]] = {}

    def run(examples, reward: RewardPool, measure: Measure, sampling: Sampling, samples: SampleFile):
        with console.progress(f"evaluate {samples.name}", len(examples), lines=4) as show:
            return evaluate(
                engine,
                examples,
                encode,
                reward,
                sampling,
                measure,
                samples=samples,
                batch=batch,
                skip=skip,
                progress=lambda done: show(done, "problems"),
                world=world,
            )

    def run_benchmark(benchmark: Benchmark, samples: SampleFile):
        sampling = replace(draw, max_tokens=benchmark.max_tokens)
        with closing(RewardPool(benchmark.parts)) as own:
            return run(benchmark.examples, own, benchmark.measure, sampling, samples)

    if config.eval.data is not None:
        examples = build_examples(config.eval.data, task=HELD_OUT)
        measure = Measure(config.eval.part or config.reward.measured)
        found[HELD_OUT] = partial(run, examples, reward, measure, draw)
    for benchmark in benchmarks:
        found[benchmark.name] = partial(run_benchmark, benchmark)
    return found


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
