"""Builds the objects of a run from its config. Nothing below this file sees a config."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from vlm_sapo import config as cfg
from vlm_sapo.algo.advantages import ADVANTAGES
from vlm_sapo.data.rows import ExampleSet, open_rows
from vlm_sapo.data.stream import PromptStream
from vlm_sapo.evaluation.evaluate import evaluate
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.vlm import VLM, load_vlm
from vlm_sapo.plugins import locate, resolve
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.curves import draw_curves
from vlm_sapo.reporting.folder import RunFolder
from vlm_sapo.rewards.combine import Reward, build_reward
from vlm_sapo.rollout.engine import RolloutEngine
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.training import checkpoint
from vlm_sapo.training.batch import MiniBatch, minibatches
from vlm_sapo.training.loss import PolicyLoss, build_loss
from vlm_sapo.training.policy import Policy
from vlm_sapo.types import Example, Group, Prompt, Sampling

EVAL_SEED = 1_000_003


@dataclass
class Evaluator:
    """Measures the model and keeps the results in the run's folder; does nothing without held-out rows."""

    run: Callable[[], tuple[dict, list[dict]]] | None
    every: int
    folder: RunFolder
    console: Console

    def at(self, step: int, *, last: int) -> None:
        """Evaluates before the first step, every so many steps and after the last one, once each."""
        due = step in (0, last) or (self.every and step % self.every == 0)
        done = {record["step"] for record in self.folder.read("evaluations.jsonl")}
        if self.run is None or not due or step in done:
            return
        result, records = self.run()
        self.folder.append("evaluations.jsonl", {"step": step} | result)
        low, high = result["ci95"]
        self.console.say(
            f"held-out pass@1 after {step} steps: {result['pass@1']:.3f}  "
            f"(95 % interval {low:.3f} to {high:.3f}, {result['n']} problems, "
            f"{result['response_tokens']:.1f} tokens per response)"
        )
        self.console.samples(records[:3])


@dataclass
class Core:
    """What `train` and `sft` have in common."""

    folder: RunFolder
    console: Console
    policy: Policy
    stream: PromptStream
    evaluator: Evaluator
    progress: checkpoint.Progress
    checkpoint_every: int
    keep: int

    def checkpoint_if_due(self, step: int) -> None:
        """Writes a checkpoint after every so many steps."""
        if self.checkpoint_every and step % self.checkpoint_every == 0:
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        self.progress.position, self.progress.skipped = self.stream.position, self.stream.skipped
        checkpoint.save(self.folder.path / "checkpoints", self.policy, self.progress, keep=self.keep)

    def finish(self, steps: int) -> dict:
        """Writes `final/`, `curves.png` and `summary.json`; returns the summary."""
        self.policy.save(self.folder.path / "final")
        evaluations = self.folder.read("evaluations.jsonl")
        draw_curves(self.folder.path / "curves.png", self.folder.read("metrics.jsonl"), evaluations)
        summary: dict = {"steps": steps, "seconds": round(self.progress.seconds, 1)}
        for name, step in (("eval_before", 0), ("eval_after", steps)):
            found = [record for record in evaluations if record["step"] == step]
            summary |= {name: {key: found[0][key] for key in ("pass@1", "ci95", "n")}} if found else {}
        if self.stream.skipped:
            summary["rows_skipped"] = self.stream.skipped
        self.folder.replace("summary.json", json.dumps(summary, indent=2) + "\n")
        self.console.say(
            f"done: {steps} steps in {summary['seconds']} s; everything is in {self.folder.path}"
        )
        return summary


@dataclass
class Training:
    """What the loop of `train` works with."""

    core: Core
    engine: RolloutEngine
    reward: Reward
    advantage: Callable[[torch.Tensor], torch.Tensor]
    loss: PolicyLoss
    split: Callable[[list[Group], list[torch.Tensor]], list[MiniBatch]]
    sampling: Sampling
    prompts_per_step: int
    log_rollouts: Callable[[int, list[Group], list[torch.Tensor]], None] = field(default=lambda *_: None)

    def sampling_at(self, step: int) -> Sampling:
        """Each step draws with a seed of its own, so a resumed run draws what the whole one would have."""
        return replace(self.sampling, seed=self.sampling.seed * 1_000_033 + step)


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


def build_training(config: cfg.TrainConfig, console: Console) -> Training:
    """Everything that `train` needs, resumed where the run's folder holds a checkpoint."""
    train, rollout, algo = config.train, config.rollout, config.algo
    reward = build_reward([part.model_dump() for part in config.reward])
    if train.minibatches == 1:
        console.warn(
            "train.minibatches is 1: every ratio is 1 and every objective the plain policy gradient; use 4"
        )
    core, engine = _build_core(config, console, reward=reward, kl=algo.kl, temperature=rollout.temperature)
    split = partial(
        minibatches,
        count=train.minibatches,
        budget=train.tokens_per_microbatch,
        mask_truncated=algo.mask_truncated,
    )
    return Training(
        core=core,
        engine=engine,
        reward=reward,
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


def build_sft(config: cfg.SftConfig, console: Console) -> Core:
    """Everything that `sft` needs."""
    return _build_core(config, console, reward=build_reward([part.model_dump() for part in config.reward]))[0]


def _build_core(
    config: cfg.TrainConfig | cfg.SftConfig, console: Console, *, reward: Reward, kl=0.0, temperature=1.0
) -> tuple[Core, RolloutEngine]:
    torch.manual_seed(config.run.seed)
    train = config.train
    accelerator = Accelerator(mixed_precision=train.precision)
    if accelerator.num_processes > 1:
        raise ValueError(
            f"this version trains in one process; the launcher started {accelerator.num_processes}, start one"
        )
    examples = build_examples(config.data)
    folder = RunFolder(config.run.folder)
    folder.open(cfg.dump(config), overwrite=config.run.overwrite)
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
    )
    engine = HfEngine(vlm, prompts_per_batch=config.rollout.prompts_per_batch, autocast=accelerator.autocast)
    stream = PromptStream(examples, encode, seed=config.run.seed, skip=config.data.on_error == "skip")
    progress = checkpoint.restore(found, policy) if found else checkpoint.Progress()
    stream.position, stream.skipped = progress.position, progress.skipped
    folder.rewind(progress.step)
    console.say(_banner(config, vlm, examples, accelerator, found))
    core = Core(
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
    )
    return core, engine


def _load(model: cfg.Model, path: str, accelerator: Accelerator, freeze: list[str]) -> VLM:
    return load_vlm(
        path,
        dtype=model.dtype,
        device=accelerator.device,
        gradient_checkpointing=model.gradient_checkpointing,
        freeze=freeze,
    )


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
            return evaluate(engine, examples, encode, reward, sampling, part=part, progress=show)

    return run


def write_rollouts(
    folder: RunFolder, count: int, step: int, groups: list[Group], advantages: list[torch.Tensor]
) -> None:
    """Adds the first `count` groups of a step to `rollouts.jsonl`, a line per response."""
    for group, values in zip(groups[:count], advantages[:count], strict=True):
        for completion, score, value in zip(group.completions, group.scores, values.tolist(), strict=True):
            folder.append(
                "rollouts.jsonl",
                {
                    "step": step,
                    "id": group.prompt.example.id,
                    "problem": group.prompt.example.problem,
                    "answer": group.prompt.example.answer,
                    "response": completion.text,
                    "reward": score.total,
                    "parts": dict(score.parts),
                    "advantage": value,
                    "tokens": len(completion.ids),
                    "finish": completion.finish,
                },
            )


def _banner(config, vlm: VLM, examples: ExampleSet, accelerator: Accelerator, found: Path | None) -> str:
    trained = sum(parameter.numel() for parameter in vlm.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in vlm.parameters())
    start = f"resumed from {found}" if found else f"model {config.model.path}"
    return (
        f"{start}: {total:,} parameters, {trained:,} of them trained, on {accelerator.device}; "
        f"{len(examples):,} rows of {config.data.source}; writing to {config.run.folder}"
    )
