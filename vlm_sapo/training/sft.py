"""Supervised fine-tuning on demonstrations (cold start), with the trainer's own parts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import torch

from vlm_sapo.algo.reductions import token_mean
from vlm_sapo.config.schema import SftConfig, SftTrainerConfig
from vlm_sapo.reporting.callbacks import Callback
from vlm_sapo.rollout.environment import Episodes, play
from vlm_sapo.training.batch import Batch, MicroBatch, collate
from vlm_sapo.training.build import build_sft
from vlm_sapo.training.folder import open_folder
from vlm_sapo.training.hub_use import publish, say_finished
from vlm_sapo.training.launch import join
from vlm_sapo.training.policy import ForwardPass
from vlm_sapo.training.run import Run
from vlm_sapo.types import Group, Prompt, RowError


def sft(config: SftConfig, callbacks: Sequence[Callback] = ()) -> dict:
    """Minimizes the mean negative log-prob of the demonstrations' tokens; returns the summary."""
    processes = join(config)
    folder, config = open_folder(config, processes)
    if (summary := processes.world.on_main(folder.summary)) is not None:
        say_finished(config, folder, processes.console)
        return summary
    run = build_sft(config, folder, processes)
    with closing(run), run.interruption.handling_signals(), run.calling(callbacks):
        columns = {task.task: task.columns["response"] for task in config.data.tasks}
        summary = loop(run, config.train, columns)
    publish(config, folder, processes)
    return summary


def loop(run: Run, train: SftTrainerConfig, columns: dict[str, str]) -> dict:
    """Runs the remaining of `train.steps` steps; returns the summary. `columns` has the column of the
    demonstrations, by task."""
    run.evaluate(run.progress.step, last=train.steps)
    with run.console.progress("sft", train.steps, run.progress.step) as show:
        for step in range(run.progress.step + 1, train.steps + 1):
            show(step, train_step(step, run, train.rows_per_step, columns))
            run.evaluate(step, last=train.steps)
            run.checkpoint_if_due(step, last=train.steps)
    return run.finish(train.steps)


def train_step(step: int, run: Run, rows: int, columns: dict[str, str]) -> str:
    """One update on `rows` demonstrations. Returns the console line."""
    run.begin_step()
    lr = run.policy.set_step(step - 1)
    with run.before_update("data"), run.rollouts.tracking_cursor():
        groups = demonstrations(run, run.stream.take(rows), columns)
    run.stream.prefetch(rows)  # while this step trains
    batch = collate(groups, minibatches=1, rewards_decide=False, world=run.world)
    batch = batch.replace(advantages=batch.mask.double())
    with run.watch.time("update"):
        stats = run.policy.update(batch, Likelihood())
    run.end_step(step)
    loss = sum(run.world.all_gather(stats.loss))
    updated = {"policy/skipped_updates": 1} if stats.skipped else {"policy/grad_norm": stats.grad_norm}
    times = {f"time/{name}": seconds for name, seconds in run.seconds.items()}
    record = {"step": step, "lr": lr, "loss": 0.0 if stats.skipped else loss} | times | updated
    record |= run.stream.epochs(run.stream.state())
    run.folder.append("metrics.jsonl", record)
    return f"loss {loss:.4f}  {record['time/step']:.2f} s"


def demonstrations(run: Run, prompts: Sequence[Prompt], columns: dict[str, str]) -> list[Group]:
    """The rows' demonstrations, each as a group with one response. One of several turns, a list of texts, is
    played with the run's environment."""
    turns = {prompt: _turns(prompt, columns[prompt.example.task]) for prompt in prompts}
    engine = run.rollouts.engine
    if isinstance(engine, Episodes):
        responses = play(engine, prompts, turns)
        return [Group(prompt, (item,), ()) for prompt, item in zip(prompts, responses, strict=True)]
    for prompt in prompts:
        if len(turns[prompt]) > 1:
            raise RowError(
                f"{prompt.example.label}: its demonstration has {len(turns[prompt])} turns; set "
                "rollout.environment, which answers them"
            )
    return [Group(prompt, (run.encode.respond(prompt, turns[prompt][0]),), ()) for prompt in prompts]


def _turns(prompt: Prompt, column: str) -> list[str]:
    value = prompt.example.columns.get(column)
    turns = [value] if isinstance(value, str) else value
    if not (isinstance(turns, list | tuple) and turns and all(_is_text(turn) for turn in turns)):
        raise RowError(
            f"{prompt.example.label}: field {column} holds no demonstration; add one, or filter out the row"
        )
    return list(turns)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


class Likelihood:
    """The negative log-prob of the demonstrations' tokens, over the mini-batch's tokens."""

    needs_usage = False
    prepares = False

    def __call__(self, passed: ForwardPass, micro: MicroBatch, minibatch: Batch) -> torch.Tensor:
        return token_mean(-passed.logprobs, micro.mask, num_tokens=minibatch.num_tokens)

    def prepare(self, logprobs: torch.Tensor, minibatch: Batch) -> None:
        return None
