"""Reinforcement learning: the loop."""

from __future__ import annotations

import time
from contextlib import closing

import torch

from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.metrics import StepMeter
from vlm_sapo.training.build import build_training
from vlm_sapo.training.launch import join
from vlm_sapo.training.resume import open_folder
from vlm_sapo.training.run import FINISHED, Training
from vlm_sapo.types import Group


def train(config: TrainConfig, console: Console | None = None) -> dict:
    """Trains as the config says and returns the summary. A finished run is reported, not repeated."""
    processes = join(config, console)
    console = processes.console
    folder = open_folder(config, processes)
    if (summary := processes.world.on_main(folder.summary)) is not None:
        console.say(FINISHED)
        return summary
    training = build_training(config, folder, processes)
    with closing(training.core), training.core.interruption.handling_signals():
        return loop(training, config.train.steps)


def loop(training: Training, steps: int) -> dict:
    """Steps until `steps` are done, from wherever the run stands; returns the summary."""
    core = training.core
    with core.checkpoint_on_error():
        core.evaluator.at(core.progress.step, last=steps)
    with core.console.progress("train", steps, core.progress.step) as show:
        for step in range(core.progress.step + 1, steps + 1):
            show(step, advance(training, step))
            with core.checkpoint_on_error():
                core.evaluator.at(step, last=steps)
            core.checkpoint_if_due(step, last=steps)
    return core.finish(steps)


def advance(training: Training, step: int) -> str:
    """One step: draw groups, score them, update in mini-batches. Returns the numbers that matter most."""
    core, policy = training.core, training.core.policy
    started, meter = time.perf_counter(), StepMeter(core.world, training.loss)
    lr = policy.set_step(step - 1)
    with meter.time("draw"), core.checkpoint_on_error():
        drawn = core.rollouts(step, policy.vlm)
    with meter.time("check"), core.checkpoint_on_error():
        checked = training.check(step, drawn)
    behind = policy.vlm.version - drawn.version
    advantages = [advantages_of(training, group) for group in drawn.groups]
    batch = training.split(drawn.groups, advantages, layout=policy.layout, budget=policy.memory.budget)
    with meter.time("old_logprobs"):
        policy.score(batch, fresh=behind == 0)
    with meter.time("update"):
        for minibatch in batch:
            for passed in policy.accumulate(minibatch, training.loss):
                meter.add(**passed)
            if minibatch.micros:
                meter.close_minibatch(policy.step())
    core.advance(step, time.perf_counter() - started)
    extra = {"lr": lr, "rollout/updates_behind": behind} | checked
    return training.report(step, meter, drawn, advantages, extra)


def advantages_of(training: Training, group: Group) -> torch.Tensor:
    """[G] float64 advantages of a group's rewards."""
    return training.advantage(torch.tensor([score.total for score in group.rewards], dtype=torch.float64))
