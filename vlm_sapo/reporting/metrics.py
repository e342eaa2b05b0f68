"""Gathers what happened in a step into one flat record of numbers."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from vlm_sapo.algo import balance, diagnostics, objectives
from vlm_sapo.distributed import World
from vlm_sapo.models.experts import Usage
from vlm_sapo.types import Group

Metrics = dict[str, float]


class Described(Protocol):
    """What tells what an objective did to a mini-batch; see training.loss.PolicyLoss."""

    def describe(self, logprobs, old, advantages, mask, sampled) -> Metrics: ...

    def distributions(self, logprobs, old, advantages, mask) -> dict[str, list]: ...

    def effective(self, logprobs, old, advantages, mask) -> torch.Tensor: ...


@dataclass(frozen=True)
class Trace:
    """What an update saw of a response; all [R] float32."""

    log_ratio: torch.Tensor
    effective: torch.Tensor
    """Share of the plain policy gradient that was left."""
    entropy: torch.Tensor


class StepMeter:
    """Times, and per-mini-batch diagnostics, of one step: of all processes' tokens, in the main one."""

    def __init__(self, world: World, loss: Described | None = None):
        self.world, self.loss = world, loss
        self.seconds: dict[str, float] = defaultdict(float)
        self.minibatches: list[Metrics] = []
        self.distributions: list[dict[str, list]] = []
        """Histograms by mini-batch."""
        self.traces: dict[int, Trace] = {}
        """This process's, by the `id` of the response's tensor of token ids."""
        self._traced: dict[int, Trace] = {}
        self._parts: list[tuple[torch.Tensor, ...]] = []
        self._usages: list[Usage] = []
        self._loss = 0.0
        self._has_reference = self._has_sampled = False
        self._start = time.perf_counter()
        self.skipped = 0
        """Updates that were left out."""

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds the block's duration to `time/<name>`."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def add(
        self,
        loss: float,
        logprobs,
        entropies,
        *,
        responses: Sequence[torch.Tensor],
        old,
        reference,
        advantages,
        mask,
        sampled,
        usage,
    ) -> None:
        """One micro-batch: tensors [N, T], advantages [N, 1], the N responses' ids; `reference` and
        `sampled` may be None, and `usage` is, but for a mixture of experts."""
        self._loss += loss
        kl = torch.zeros_like(logprobs) if reference is None else objectives.k3(logprobs, reference)
        self._has_reference, self._has_sampled = reference is not None, sampled is not None
        engine = old if sampled is None else sampled
        tensors = (logprobs, entropies, old, advantages.expand_as(mask), kl, engine, mask)
        real = mask.any(1)
        self._parts.append(tuple(tensor.detach()[real].cpu() for tensor in tensors))
        self._trace(
            responses, *(tensor.detach().cpu() for tensor in (logprobs, old, advantages, mask, entropies))
        )
        self._usages += [] if usage is None else [usage.to_cpu(real)]

    def _trace(self, responses, logprobs, old, advantages, mask, entropies) -> None:
        log_ratio = torch.where(mask, logprobs - old, 0.0)
        effective = self.loss.effective(logprobs, old, advantages, mask)
        for row, response in enumerate(responses):
            if mask[row].any():
                count = len(response)
                values = (log_ratio[row, :count], effective[row, :count], entropies[row, :count])
                self._traced[id(response)] = Trace(*values)

    def close_minibatch(self, grad_norm: float) -> None:
        """Ends a mini-batch that had micro-batches; without a norm its update was left out. All processes
        call it."""
        if math.isnan(grad_norm):
            self.skipped += 1
            self._parts, self._usages, self._loss, self._traced = [], [], 0.0, {}
            return
        self.traces |= self._traced
        told = self.world.gather((self._parts, self._usages, self._loss))
        if told:
            parts = [part for parts, _, _ in told for part in parts]
            usages = [usage for _, usages, _ in told for usage in usages]
            self._describe(parts, usages, sum(loss for _, _, loss in told), grad_norm)
        self._parts, self._usages, self._loss, self._traced = [], [], 0.0, {}

    def _describe(
        self, parts: list[tuple[torch.Tensor, ...]], usages: list[Usage], loss: float, grad_norm: float
    ) -> None:
        width = max(part[-1].shape[1] for part in parts)
        padded = [
            [torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in part]
            for part in parts
        ]
        logprobs, entropies, old, advantages, kl, engine, mask = map(torch.cat, zip(*padded, strict=True))
        metrics = diagnostics.ratio_metrics(logprobs, old, mask)
        metrics |= diagnostics.clip_metrics(logprobs, old, advantages, mask)
        sampled = engine if self._has_sampled else None
        if self.loss is not None:
            metrics |= self.loss.describe(logprobs, old, advantages, mask, sampled)
            self.distributions.append(self.loss.distributions(logprobs, old, advantages, mask))
        metrics |= {"entropy": float(entropies[mask].mean()), "grad_norm": grad_norm, "loss": loss}
        metrics |= {"kl_reference": float(kl[mask].mean())} if self._has_reference else {}
        metrics |= usage_metrics(usages, int(mask.sum())) if usages else {}
        self.minibatches.append(metrics)

    def record(self, seconds: Mapping[str, float] | None = None) -> Metrics:
        """`loss`, `policy/<metric>` over the mini-batches, `minibatch<k>/<metric>`, `time/<name>`, also of
        further `seconds` by name."""
        record: Metrics = {}
        for name in dict.fromkeys(name for metrics in self.minibatches for name in metrics):
            values = [metrics[name] for metrics in self.minibatches if name in metrics]
            worst = name.endswith("_max")
            record[f"policy/{name}"] = max(values) if worst else sum(values) / len(values)
        record = {"loss": record.pop("policy/loss", 0.0)} | record
        record |= {"policy/skipped_updates": self.skipped} if self.skipped else {}
        for index, metrics in enumerate(self.minibatches):
            record |= {f"minibatch{index}/{name}": value for name, value in metrics.items()}
        record |= {f"time/{name}": value for name, value in (self.seconds | dict(seconds or {})).items()}
        record["time/step"] = time.perf_counter() - self._start
        return record


def usage_metrics(usages: Sequence[Usage], tokens: int) -> Metrics:
    """What a mini-batch's routers did to its `tokens`."""
    changed = [usage.changed for usage in usages if usage.changed is not None]
    return balance.router_metrics(
        torch.cat([usage.counts for usage in usages]),
        torch.cat([usage.entropy for usage in usages]),
        torch.cat(changed) if changed else None,
        tokens,
    )


def group_metrics(
    groups: Sequence[Group], replaced: Sequence[Group], seconds: Mapping[str, float]
) -> Metrics:
    """Rewards (by part), lengths and shares of all groups that were drawn; `seconds` are the times by
    name."""
    groups = [*groups, *replaced]
    completions = [completion for group in groups for completion in group.responses]
    scores = [score for group in groups for score in group.rewards]
    lengths = [len(completion.ids) for completion in completions]
    metrics = {"reward/mean": sum(score.total for score in scores) / len(scores)}
    for part in dict.fromkeys(name for score in scores for name in score.parts):
        metrics[f"reward/{part}"] = sum(score.parts.get(part, 0.0) for score in scores) / len(scores)
    outcomes = Counter(
        f"outcome/{label}/{outcome}" for score in scores for label, outcome in score.outcomes.items()
    )
    metrics |= {name: count for name, count in outcomes.items() if not name.endswith("/graded")}
    return metrics | {
        "reward/zero_variance": sum(group.flat for group in groups) / len(groups),
        "rollout/groups": len(groups),
        "response/identical": sum(map(_identical, groups)) / len(groups),
        "response/tokens": sum(lengths) / len(lengths),
        "response/tokens_max": max(lengths),
        "response/truncated": sum(completion.finish == "length" for completion in completions)
        / len(completions),
        "prompt/tokens": sum(len(group.prompt.ids) for group in groups) / len(groups),
        "rollout/tokens_per_second": sum(lengths) / max(seconds["rollout"], 1e-9),
    }


def _identical(group: Group) -> float:
    """Share of a group's responses that equal another one of it."""
    counts = Counter(tuple(completion.ids.tolist()) for completion in group.responses)
    return sum(count for count in counts.values() if count > 1) / len(group.responses)


def task_metrics(groups: Sequence[Group], replaced: Sequence[Group], minibatches: int) -> Metrics:
    """Reward of all groups that were drawn by task, and each task's count in every mini-batch of the trained
    `groups`; empty where there is one task."""
    drawn = [*groups, *replaced]
    tasks = sorted({group.prompt.example.task for group in groups})
    if len(tasks) == 1:
        return {}
    metrics: Metrics = {}
    size = len(groups) // minibatches
    for task in tasks:
        scores = [s.total for group in drawn if group.prompt.example.task == task for s in group.rewards]
        metrics[f"task/{task}/reward"] = sum(scores) / len(scores)
        own = [group.prompt.example.task == task for group in groups]
        for index in range(minibatches):
            metrics[f"minibatch{index}/prompts/{task}"] = sum(own[index * size : (index + 1) * size])
    return metrics
