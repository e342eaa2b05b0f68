"""The loss of a micro-batch: objective on log-ratios, the KL term, and the reduction, each chosen on its
own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from vlm_sapo.algo.diagnostics import Objective, gate_metrics, update_metrics
from vlm_sapo.algo.objectives import OBJECTIVES, k3
from vlm_sapo.algo.ratios import RATIOS
from vlm_sapo.algo.reductions import REDUCTIONS
from vlm_sapo.training.batch import MicroBatch, MiniBatch


@dataclass(frozen=True)
class PolicyLoss:
    """`objective(log_ratio, advantage)`, `ratio(logprobs, old, mask)`, `reduce(losses, mask,
    **denominators)`."""

    objective: Objective
    ratio: Callable[..., torch.Tensor]
    reduce: Callable[..., torch.Tensor]
    kl: float = 0.0
    gate: dict[str, float] | None = None
    """SAPO's temperatures, where the objective is SAPO."""

    def __call__(self, logprobs: torch.Tensor, micro: MicroBatch, minibatch: MiniBatch) -> torch.Tensor:
        """The micro-batch's share of the mini-batch's loss; logprobs [N, T]."""
        losses = self.objective(self.ratio(logprobs, micro.old, micro.mask), micro.advantages)
        if micro.reference is not None:
            losses = losses + self.kl * k3(logprobs, micro.reference)
        return self.reduce(losses, micro.mask, **minibatch.denominators)

    def describe(self, logprobs, old, advantages, mask) -> dict[str, float]:
        """Metrics of the objective on a whole mini-batch, all [N, T]."""
        metrics = update_metrics(self.objective, self.ratio(logprobs, old, mask), advantages, mask)
        if self.gate is not None:
            metrics |= gate_metrics(logprobs, old, advantages, mask, **self.gate)
        return metrics


def build_loss(
    objective: dict[str, float], *, ratio: str, reduction: str, kl: float, max_tokens: int
) -> PolicyLoss:
    """`objective` is the fields of the config's objective section, `type` among them."""
    parameters = {name: value for name, value in objective.items() if name != "type"}
    return PolicyLoss(
        objective=partial(OBJECTIVES[objective["type"]], **parameters),
        ratio=RATIOS[ratio],
        reduce=partial(REDUCTIONS[reduction], max_tokens=max_tokens),
        kl=kl,
        gate=parameters if objective["type"] == "sapo" else None,
    )
