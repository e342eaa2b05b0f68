"""Cold start: supervised learning on demonstrations, with the trainer's own parts."""

from __future__ import annotations

import math
import time
from contextlib import closing

import torch

from vlm_sapo.algo.reductions import token_mean
from vlm_sapo.config.schema import SftConfig, SftTrainerConfig
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.metrics import StepMeter
from vlm_sapo.training.batch import MicroBatch, MiniBatch, minibatches
from vlm_sapo.training.build import build_sft
from vlm_sapo.training.launch import join
from vlm_sapo.training.resume import open_folder
from vlm_sapo.training.run import FINISHED, Core
from vlm_sapo.types import Group, Prompt, Response, RowError


def sft(config: SftConfig, console: Console | None = None) -> dict:
    """Minimises the mean negative log-prob of the demonstrations' tokens; returns the summary."""
    processes = join(config, console)
    console = processes.console
    folder = open_folder(config, processes)
    if (summary := processes.world.on_main(folder.summary)) is not None:
        console.say(FINISHED)
        return summary
    core = build_sft(config, folder, processes)
    with closing(core), core.interruption.handling_signals():
        columns = {task.task: task.columns["response"] for task in config.data.tasks}
        return loop(core, config.train, columns)


def loop(core: Core, train: SftTrainerConfig, columns: dict[str, str]) -> dict:
    """Updates until `train.steps` are done, from wherever the run stands; returns the summary. `columns` hold
    the demonstrations, by task."""
    with core.checkpoint_on_error():
        core.evaluator.at(core.progress.step, last=train.steps)
    with core.console.progress("sft", train.steps, core.progress.step) as show:
        for step in range(core.progress.step + 1, train.steps + 1):
            started, meter = time.perf_counter(), StepMeter(core.world)
            lr = core.policy.set_step(step - 1)
            with meter.time("data"), core.checkpoint_on_error(), core.rollouts.tracking_cursor():
                prompts = core.stream.take(train.rows_per_step)
                rows = [(prompt, demonstration(core, prompt, columns)) for prompt in prompts]
            with meter.time("update"):
                loss, norm = update(core, rows)
            core.advance(step, time.perf_counter() - started)
            record = (
                {"step": step, "lr": lr}
                | meter.record()
                | (
                    {"policy/skipped_updates": 1}
                    if math.isnan(norm)
                    else {"loss": loss, "policy/grad_norm": norm}
                )
            )
            core.folder.append("metrics.jsonl", record)
            show(step, f"loss {loss:.4f}  {record['time/step']:.2f} s")
            with core.checkpoint_on_error():
                core.evaluator.at(step, last=train.steps)
            core.checkpoint_if_due(step, last=train.steps)
    return core.finish(train.steps)


def demonstration(core: Core, prompt: Prompt, columns: dict[str, str]) -> Response:
    """The row's demonstration as a finished response."""
    column = columns[prompt.example.task]
    text = prompt.example.columns.get(column)
    if not isinstance(text, str) or not text.strip():
        raise RowError(
            f"{prompt.example.label}: field {column} holds no demonstration; give it one or filter it out"
        )
    return core.encode.respond(prompt, text)


def update(core: Core, rows: list[tuple[Prompt, Response]]) -> tuple[float, float]:
    """One optimizer update on all processes' rows; returns the loss per token and the gradient's norm."""
    policy = core.policy
    groups = [Group(prompt, (completion,), ()) for prompt, completion in rows]
    ones = [torch.ones(1) for _ in rows]
    (batch,) = minibatches(
        groups, ones, count=1, layout=policy.layout, budget=policy.memory.budget, world=core.world
    )
    passed = policy.accumulate(batch, likelihood)
    return sum(core.world.all_gather(sum(item["loss"] for item in passed))), policy.step()


def likelihood(logprobs: torch.Tensor, micro: MicroBatch, minibatch: MiniBatch) -> torch.Tensor:
    """The negative log-prob of the demonstrations' tokens, over the mini-batch's tokens."""
    return token_mean(-logprobs, micro.mask.to(logprobs.device), **minibatch.denominators)
