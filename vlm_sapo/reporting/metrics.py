"""A step's metrics as one flat record of numbers: pure functions of the step's records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import pstdev
from typing import Protocol

import torch
from torch.nn.functional import pad

from vlm_sapo.algo import balance, diagnostics, objectives
from vlm_sapo.models.experts import ExpertUsage
from vlm_sapo.types import Group, Response

Metrics = dict[str, float]
TENSORS = ("mask", "advantages", "logprobs", "entropies", "old", "sampled", "reference", "prepared")


@dataclass(frozen=True)
class UpdateStats:
    """The data of one optimizer update: tensors [N, T] in host memory, for the responses that went through
    the model, in that order."""

    rows: torch.Tensor
    """[N] int64, the row of each in its mini-batch."""
    mask: torch.Tensor
    advantages: torch.Tensor
    logprobs: torch.Tensor
    """Before the update."""
    entropies: torch.Tensor
    old: torch.Tensor
    sampled: torch.Tensor | None
    """The engine's log-probs; None where they are the old ones."""
    reference: torch.Tensor | None
    prepared: torch.Tensor | None
    """From the objective's `prepare` for the whole mini-batch."""
    usages: tuple[ExpertUsage, ...]
    """Use of the experts of an MoE model, by pass."""
    loss: float
    """This process's share."""
    grad_norm: float
    """Before clipping, of all processes; NaN where the update was skipped."""
    skipped: bool
    """Whether the update was skipped because a number was not finite."""

    @staticmethod
    def join(parts: Sequence[UpdateStats]) -> UpdateStats:
        """Joins the data of several processes."""
        width = max(part.mask.shape[1] for part in parts)
        tensors = {}
        for name in TENSORS:
            items = [vars(part)[name] for part in parts]
            rows = [item for item in items if item is not None and len(item)]
            padded = [pad(item, (0, width - item.shape[1])) for item in rows]
            tensors[name] = torch.cat(padded) if padded else items[0]
        return replace(
            parts[0],
            rows=torch.cat([part.rows for part in parts]),
            usages=tuple(usage for part in parts for usage in part.usages),
            loss=sum(part.loss for part in parts),
            **tensors,
        )


class Diagnosed(Protocol):
    """A loss that reports metrics of what its objective did; see training.loss.PolicyLoss."""

    def describe(self, stats: UpdateStats) -> Metrics: ...

    def distributions(self, stats: UpdateStats) -> dict[str, list]: ...

    def effective(self, stats: UpdateStats) -> torch.Tensor: ...


@dataclass(frozen=True)
class Trace:
    """Per-token values of a response in an update; all [R] float32, 0 on the environment's tokens."""

    log_ratio: torch.Tensor
    effective: torch.Tensor
    """Share of the plain policy gradient that remains."""
    entropy: torch.Tensor

    def first(self, length: int) -> Trace:
        """The trace of the first `length` tokens, without padding."""
        return Trace(*(values[:length] for values in vars(self).values()))


def traces(stats: UpdateStats, loss: Diagnosed) -> dict[int, Trace]:
    """Traces by row of the mini-batch; empty for a skipped update."""
    if stats.skipped or not len(stats.rows):
        return {}
    log_ratio = torch.where(stats.mask, stats.logprobs - stats.old, 0.0)
    effective = torch.where(stats.mask, loss.effective(stats), 0.0)
    return {
        int(row): Trace(log_ratio[index].clone(), effective[index].clone(), stats.entropies[index].clone())
        for index, row in enumerate(stats.rows)
    }


def update_metrics(stats: UpdateStats, loss: Diagnosed) -> Metrics:
    """Metrics of one update over all processes' tokens."""
    logprobs, old, mask = stats.logprobs, stats.old, stats.mask
    metrics = diagnostics.ratio_metrics(logprobs, old, mask)
    metrics |= diagnostics.clip_metrics(logprobs, old, stats.advantages, mask)
    metrics |= loss.describe(stats)
    metrics |= {
        "entropy": float(stats.entropies[mask].mean()),
        "grad_norm": stats.grad_norm,
        "loss": stats.loss,
    }
    if stats.reference is not None:
        metrics["kl_reference"] = float(objectives.k3(logprobs, stats.reference)[mask].mean())
    return metrics | (usage_metrics(stats.usages, int(mask.sum())) if stats.usages else {})


def update_record(updates: Sequence[Metrics], skipped: int) -> Metrics:
    """`loss`, `policy/<metric>` over the updates, and `minibatch<k>/<metric>`. `skipped` is a count."""
    record: Metrics = {}
    for name in dict.fromkeys(name for metrics in updates for name in metrics):
        values = [metrics[name] for metrics in updates if name in metrics]
        worst = name.endswith("_max")
        record[f"policy/{name}"] = max(values) if worst else sum(values) / len(values)
    record = {"loss": record.pop("policy/loss", 0.0)} | record
    record |= {"policy/skipped_updates": skipped} if skipped else {}
    for index, metrics in enumerate(updates):
        record |= {f"minibatch{index}/{name}": value for name, value in metrics.items()}
    return record


def usage_metrics(usages: Sequence[ExpertUsage], tokens: int) -> Metrics:
    """Router metrics of a mini-batch of `tokens` tokens."""
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
    """Rewards (by part), lengths and shares of all groups that were sampled; `seconds` are durations by
    name."""
    groups = [*groups, *replaced]
    responses = [response for group in groups for response in group.responses]
    rewards = [reward for group in groups for reward in group.rewards]
    lengths = [int(response.mask.sum()) for response in responses]
    metrics = {
        "reward/mean": sum(reward.total for reward in rewards) / len(rewards),
        "reward/std": sum(map(_deviation, groups)) / len(groups),
    }
    for part in dict.fromkeys(name for reward in rewards for name in reward.parts):
        metrics[f"reward/{part}"] = sum(reward.parts.get(part, 0.0) for reward in rewards) / len(rewards)
    outcomes = Counter(
        f"outcome/{label}/{outcome}" for reward in rewards for label, outcome in reward.outcomes.items()
    )
    metrics |= {name: count for name, count in outcomes.items() if not name.endswith("/graded")}
    metrics |= environment_metrics(responses)
    return metrics | {
        "reward/zero_variance": sum(group.zero_variance for group in groups) / len(groups),
        "rollout/groups": len(groups),
        "rollout/responses": len(responses),
        "response/identical": sum(map(_identical, groups)) / len(groups),
        "response/tokens": sum(lengths) / len(lengths),
        "response/tokens_max": max(lengths),
        "response/truncated": sum(response.finish == "length" for response in responses) / len(responses),
        "prompt/tokens": sum(len(group.prompt.ids) for group in groups) / len(groups),
        "rollout/tokens_per_second": sum(lengths) / max(seconds["rollout"], 1e-9),
    }


def environment_metrics(responses: Sequence[Response]) -> Metrics:
    """Turns, calls, images and failures: means over responses; empty without an environment."""
    names = sorted({name for response in responses for name in response.counts})
    return {
        f"environment/{name}": sum(item.counts.get(name, 0) for item in responses) / len(responses)
        for name in names
    }


def _deviation(group: Group) -> float:
    """Standard deviation of a group's rewards: what its advantages are made of."""
    return pstdev(reward.total for reward in group.rewards)


def _identical(group: Group) -> float:
    """Share of a group's responses that equal another one of the group."""
    counts = Counter(tuple(response.ids.tolist()) for response in group.responses)
    return sum(count for count in counts.values() if count > 1) / len(group.responses)


def task_metrics(groups: Sequence[Group], replaced: Sequence[Group], minibatches: int) -> Metrics:
    """Reward by task of all groups that were sampled, and each task's count in every mini-batch of the
    trained `groups`; empty for a single task."""
    sampled = [*groups, *replaced]
    tasks = sorted({group.prompt.example.task for group in groups})
    if len(tasks) == 1:
        return {}
    metrics: Metrics = {}
    size = len(groups) // minibatches
    for task in tasks:
        rewards = [r.total for group in sampled if group.prompt.example.task == task for r in group.rewards]
        metrics[f"task/{task}/reward"] = sum(rewards) / len(rewards)
        own = [group.prompt.example.task == task for group in groups]
        for index in range(minibatches):
            metrics[f"minibatch{index}/prompts/{task}"] = sum(own[index * size : (index + 1) * size])
    return metrics
