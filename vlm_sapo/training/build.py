"""Builds a run from its config. Only the `build*` modules, `folder` and `launch` see a config."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch

from vlm_sapo.config import schema as cfg
from vlm_sapo.data.stream import TaskMixture
from vlm_sapo.evaluation.periodic import Evaluator
from vlm_sapo.models import lora as adapters
from vlm_sapo.models.loading import count_parameters
from vlm_sapo.models.vlm import VLM
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.reporting.step_report import StepReport
from vlm_sapo.rollout.build import build_engine, build_episodes, build_tools
from vlm_sapo.rollout.engine import EngineNeeds
from vlm_sapo.training.build_policy import (
    Config,
    Purpose,
    build_encoder,
    build_policy,
    check_moe,
    load_trained,
    weights_path,
)
from vlm_sapo.training.build_rollouts import (
    build_evaluation_sets,
    build_reward,
    build_rollouts,
    build_rows,
    build_tasks,
    default_dtype,
    longest_row,
)
from vlm_sapo.training.checkpoint import Progress, restore
from vlm_sapo.training.checks import Parity, SelfCheck, allowed_difference
from vlm_sapo.training.folder import build_alarms, build_checkpoints, open_logs
from vlm_sapo.training.inputs import check_resumed
from vlm_sapo.training.launch import Processes
from vlm_sapo.training.loss import PolicyLoss, build_advantage, build_loss
from vlm_sapo.training.run import Interruption, Run, TrainingRun
from vlm_sapo.types import Sampling


def build_training(
    config: cfg.TrainConfig, folder: RunFolder, processes: Processes
) -> tuple[TrainingRun, PolicyLoss]:
    """Builds what `train` needs, resumed from the newest checkpoint if the run's folder has one."""
    train, rollout, algo = config.train, config.rollout, config.algo
    console, world = processes.console, processes.world
    if train.minibatches == 1:
        console.warn(
            "train.minibatches is 1: every ratio is 1, so every objective is the plain policy gradient; use 4"
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
    auto = train.old_logprobs == "auto" and not own_old
    if auto and _rounds_adapters(run):
        console.say("adapters are rounded to half precision to sample: recomputing old log-probs")
        run.policy.recompute_old_logprobs()
        auto = False
    self_check = SelfCheck(
        run.policy,
        console,
        choose_old=auto and not run.progress.step,
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


def _rounds_adapters(run: Run) -> bool:
    """Whether the engine samples with the policy's modules, but with adapters rounded to half precision. The
    first step can't show the difference: adapters start without effect."""
    adapted = adapters.attached(run.policy.vlm.language)
    return run.rollouts.engine.shares_weights and adapted and not run.policy.is_exact


def build_sft(config: cfg.SftConfig, folder: RunFolder, processes: Processes) -> Run:
    """Builds what `sft` needs."""
    purpose = Purpose(
        prompts_per_step=config.train.rows_per_step,
        minibatches=1,
        sampling=Sampling(1, config.rollout.max_tokens, 1.0, config.run.seed),
        algo=cfg.AlgoConfig(),
    )
    return _build_run(config, folder, processes, purpose)


def build_parity(config: cfg.TrainConfig, run: Run) -> Parity:
    """Builds the comparison of the run's engine with its policy."""
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


def _build_run(config: Config, folder: RunFolder, processes: Processes, purpose: Purpose) -> Run:
    check_moe(config.model, purpose.algo)
    console, world = processes.console, processes.world
    reward = build_reward(config.reward, processes.local)  # first: its workers start while the model loads
    torch.manual_seed(config.run.seed)
    rows = build_tasks(config, processes)
    sets = build_evaluation_sets(config, rows)
    world.on_main(lambda: check_resumed(config, folder, console, rows, sets))
    checkpoints = build_checkpoints(config, folder, processes, ranked_by=sets[0].name if sets else None)
    checkpoint = checkpoints.newest()
    processes.device.check(lambda: count_parameters(weights_path(config.model, checkpoint)), console.warn)
    path, vlm = load_trained(config, checkpoint, processes)
    processes.device.check_kernels(vlm.layer_kinds, console.warn)
    tools = build_tools(config.rollout.environment, vlm)
    encode = build_encoder(vlm, config.model, max_tokens=config.data.max_prompt_tokens, tools=tools)
    stream = build_rows(config, rows.trained, encode, processes, purpose)
    policy = build_policy(config, vlm, processes, purpose)
    needs = EngineNeeds(
        vlm,
        path,
        longest=longest_row(config, [item.sampling.max_tokens for item in sets], vlm),
        dtype=default_dtype(config),
        sequences_per_batch=config.rollout.batch_sequences,
        warn=console.warn,
        folder=folder.path / "weights",
        autocast=processes.accelerator.autocast,
        with_full_params=policy.with_full_params,
        world=world,
        experts=purpose.algo.replay == "r3",
        max_pixels=config.model.max_pixels,
        returned_images=config.rollout.returned_images,
    )
    engine = build_engine(config.rollout.engine, needs)
    if config.rollout.environment is not None:
        engine = build_episodes(config.rollout.environment, engine, encode, stream.world, console.warn)
    rollouts = build_rollouts(config, stream, engine, reward, world, purpose)
    progress, state = restore(checkpoint, policy) if checkpoint else (Progress(), None)
    if state is not None:
        rollouts.restore(state)
    open_logs(config, folder, processes, progress.step)
    held_out = sum(map(len, rows.held_out.values()))
    console.say(_banner(config, vlm, stream, held_out, processes, checkpoint, purpose))
    evaluator = Evaluator(
        sets=sets,
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


def _banner(
    config: Config,
    vlm: VLM,
    stream: TaskMixture,
    held_out: int,
    processes: Processes,
    checkpoint: Path | None,
    purpose: Purpose,
) -> str:
    trained = sum(parameter.numel() for parameter in vlm.parameters() if parameter.requires_grad)
    total = vlm.model.num_parameters()
    start = f"resumed from {checkpoint}" if checkpoint else f"model {config.model.path}"
    size, shard = processes.world.size, processes.shard
    where = processes.accelerator.device.type
    if size > 1:
        copies = "each with a copy" if shard == 1 else f"{shard} of which share a copy"
        where = f"{size} processes ({where}), {copies}"
    if vlm.fused_modules:
        where += f", {vlm.fused_modules} norms and MLPs fused"
    steps, prompts = config.train.steps, purpose.prompts_per_step
    apart = f", {held_out:,} more rows held out (by image)" if held_out else ""
    return (
        f"{start}: {total:,} parameters, {trained:,} of them trained, on {where}; "
        f"{describe_rows(stream, steps * prompts)} in {steps} steps of {prompts}{apart}; "
        f"writing to {config.run.folder}"
    )


def describe_rows(stream: TaskMixture, prompts: int) -> str:
    """The rows of each task, and how often a run of so many prompts goes through them."""
    counts = {name: len(rows.examples) for name, rows in stream.streams.items()}
    epochs = {name: prompts * stream.shares[name] / counts[name] for name in counts}
    shown = {name: f"{value:,.1f}" if value >= 1 else f"{value:.2g}" for name, value in epochs.items()}
    return ", ".join(f"{counts[name]:,} rows of {name} ({shown[name]} epochs)" for name in counts)
