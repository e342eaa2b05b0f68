"""Builds rows, reward, sampler and evaluation sets from a config."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace

from vlm_sapo.config import schema as cfg
from vlm_sapo.data import sources as data
from vlm_sapo.data.holdout import Split, TaskRows, apply, split
from vlm_sapo.data.rows import ExampleSet
from vlm_sapo.data.stream import InlinePreparation, Preparation, TaskMixture, ThreadedPreparation
from vlm_sapo.distributed import World
from vlm_sapo.evaluation.benchmarks import benchmarks_of
from vlm_sapo.evaluation.periodic import EvaluationSet
from vlm_sapo.evaluation.results import Measure
from vlm_sapo.fingerprint import fingerprint_settings
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.vlm import VLM
from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.rewards.verifiers.layout import ResponseLayout
from vlm_sapo.rollout.engine import RolloutEngine
from vlm_sapo.rollout.sampler import PrefetchedSampler, Rollouts, Sampler
from vlm_sapo.training.build_policy import Config, Purpose
from vlm_sapo.training.inputs import by_content
from vlm_sapo.training.launch import Processes
from vlm_sapo.types import RowError, Sampling

EVAL_SEED = 1_000_003
MAX_WORKERS = 4
"""Threads that prepare prompts, unless `data.workers` says how many."""


def build_tasks(config: Config, processes: Processes) -> TaskRows:
    """The rows of each task, split as `data.holdout` says: by the main process, for all."""
    tasks, size = data.build_tasks(config.data), config.data.holdout

    def work() -> Split | None:
        if size is None:
            return None
        with processes.console.progress("split by image", sum(map(len, tasks.values())), lines=2) as show:
            parts = split(tasks, size, lambda done: show(done, "rows"))
        if parts.unreadable and config.data.on_error == "stop":  # now, and not when it is drawn
            task, row = parts.unreadable[0]
            _ = tasks[task][row]
        return parts

    return apply(processes.world.on_main(work), tasks, mixture=bool(config.data.mixture))


def build_rows(
    config: Config,
    rows: Mapping[str, ExampleSet],
    encode: Encoder,
    processes: Processes,
    purpose: Purpose,
) -> TaskMixture:
    """The stream of training rows of all tasks."""
    minibatch = purpose.prompts_per_step // purpose.minibatches
    # a prefetching sampler reports failures itself
    world = World() if config.rollout.ahead else processes.world
    stream = data.build_stream(
        config.data,
        encode,
        seed=config.run.seed,
        minibatch=minibatch,
        world=world,
        preparation=_build_preparation(config.data.workers, processes.local),
        examples=rows,
    )
    for task in (task for task, share in stream.shares.items() if share * minibatch < 1):
        processes.console.warn(
            f"not every mini-batch of {minibatch} prompts has one of {task}; its share is too small"
        )
    _check_layouts(config.reward, stream)
    return stream


def _build_preparation(workers: int | None, trainers: int) -> Preparation:
    """Threads that prepare prompts; `trainers` training processes share this machine's cores."""
    if workers is None:
        workers = max(min((os.cpu_count() or 1) // trainers, MAX_WORKERS), 1)
    return ThreadedPreparation(workers) if workers else InlinePreparation()


def _check_layouts(reward: cfg.RewardConfig, stream: TaskMixture) -> None:
    """Raises ValueError where `format` shall follow a prompt that asks for no layout, by each task's first
    row."""
    if any(part.name == "format" and "pattern" not in part.args for part in reward.parts):
        for tasks in stream.streams.values():
            with suppress(RowError):  # it is an error when its turn comes
                ResponseLayout.asked(tasks.examples[0]).check()


def build_reward(reward: cfg.RewardConfig, trainers: int = 1) -> RewardPool:
    """The reward with its worker processes; `trainers` training processes share this machine's cores."""
    return RewardPool(
        [part.model_dump() for part in reward.parts],
        on_error=reward.on_error,
        timeout=reward.timeout,
        workers=reward.workers or max(min((os.cpu_count() or 1) // trainers, 8), 1),
    )


def default_dtype(config: Config) -> str:
    """The dtype of an engine's weights that matches the trainer's precision."""
    return "bfloat16" if config.train.precision == "bf16" else config.model.dtype


def longest_row(config: Config, evaluated: Sequence[int], vlm: VLM) -> int:
    """The most tokens of a prompt and its response, in training and in evaluations with responses of these
    lengths."""
    response = max([config.rollout.max_tokens, *evaluated])
    return int(min(config.data.max_prompt_tokens + response, vlm.context))


def build_rollouts(
    config: Config,
    stream: TaskMixture,
    engine: RolloutEngine,
    reward: RewardPool,
    world: World,
    purpose: Purpose,
) -> Rollouts:
    """Gives each step its groups: sampled when needed, or `rollout.ahead` steps before."""
    rollout = config.rollout
    sampler = Sampler(stream, engine, reward, purpose.sampling, purpose.prompts_per_step, rollout.resample)
    if not rollout.ahead:
        return sampler
    return PrefetchedSampler(sampler, steps=rollout.ahead, last=config.train.steps, world=world)


def _fingerprints(item: EvaluationSet, of_run: Sequence[dict]) -> dict[str, str]:
    """The hashes of a set's rows and of how it is measured; `of_run` are the parts of the run's reward."""
    graded = [item.measure.part, item.measure.official, item.measure.by, item.parts or of_run]
    settings = by_content([item.examples.reading, *graded])
    return {
        "rows": item.examples.fingerprint(),
        "settings": fingerprint_settings(asdict(item.sampling), *settings),
    }


def build_evaluation_sets(config: Config, rows: TaskRows) -> list[EvaluationSet]:
    """What is held out of training, the sets of `eval.data`, and the benchmarks, in this order: the first
    decides which checkpoint is best. Raises ValueError if two have one name."""
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
    held_out = [*rows.held_out.items(), *((item.task, data.build_examples(item)) for item in section.data)]
    sets = []
    for name, examples in held_out:  # a config without any may have no reward
        measure = Measure(section.part or config.reward.measured)
        sets.append(EvaluationSet(name, examples, sampling, measure, of_training=name in rows.held_out))
    for item in benchmarks_of(config):
        longer = replace(sampling, max_tokens=item.max_tokens)
        parts = None if item.graded_by_run else item.parts
        sets.append(EvaluationSet(item.name, item.examples, longer, item.measure, parts=parts))
    of_run = [part.model_dump() for part in config.reward.parts]
    sets = [replace(item, fingerprints=_fingerprints(item, of_run)) for item in sets]
    names = [item.name for item in sets]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two evaluations of one name ({', '.join(names)}); give each set of eval.data a `name`"
        )
    return sets
