"""The loss of a micro-batch: objective on log-ratios, the KL term, and the reduction, each chosen on its
own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch

from vlm_sapo.algo import objectives
from vlm_sapo.algo.balance import sequence_balance
from vlm_sapo.algo.correction import CORRECTIONS, correction_metrics, importance, mismatch_metrics
from vlm_sapo.algo.diagnostics import (
    Objective,
    effective_update,
    gate_deviation,
    gate_metrics,
    histograms,
    update_metrics,
)
from vlm_sapo.algo.objectives import OBJECTIVES, RATIOS, k3, temperature
from vlm_sapo.algo.reductions import REDUCTIONS
from vlm_sapo.plugins import resolve
from vlm_sapo.training.batch import MicroBatch, MiniBatch

SEQUENCES = 32
"""Of a mini-batch, whose variance and deviation are logged."""
Correct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


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
    correct: Correct | None = None
    """Weights against the engine's distribution: the importance weights, and what is left of them."""
    balance: float = 0.0
    """Weight of the loss that spreads each response's tokens over the experts."""

    def __call__(self, logprobs: torch.Tensor, micro: MicroBatch, minibatch: MiniBatch) -> torch.Tensor:
        """The micro-batch's share of the mini-batch's loss; logprobs [N, T]."""
        losses = self.objective(self.ratio(logprobs, micro.old, micro.mask), micro.advantages)
        if self.correct is not None:
            losses = losses * self.correct(micro.old, micro.sampled, micro.mask)[1]
        if micro.reference is not None:
            losses = losses + self.kl * k3(logprobs, micro.reference)
        loss = self.reduce(losses, micro.mask, **minibatch.denominators)
        if self.balance:
            usage, lengths = micro.usage, micro.mask.sum(-1)
            uneven = sequence_balance(usage.probabilities, usage.counts, lengths.clamp(min=1))
            uneven = torch.where(lengths > 0, uneven, 0.0).sum()
            loss = loss + self.balance * uneven / minibatch.num_sequences
        return loss

    def effective(self, logprobs, old, advantages, mask) -> torch.Tensor:
        """[N, T] share of the plain policy gradient that is left of each token; advantages [N, 1] or
        [N, T]."""
        return effective_update(self.objective, self.ratio(logprobs, old, mask), advantages)

    def distributions(self, logprobs, old, advantages, mask) -> dict[str, list]:
        """Histograms of a whole mini-batch, all [N, T], and with SAPO `sequences`: of up to SEQUENCES the
        variance of log r, the gate's deviation and tau^2/4."""
        log_ratio = objectives.token_log_ratio(logprobs, old, mask)
        update = self.effective(logprobs, old, advantages, mask)
        found: dict[str, list] = histograms(log_ratio, update, advantages, mask)
        if self.gate is not None:
            tau = temperature(advantages[:, :1], **self.gate)
            columns = (*gate_deviation(logprobs, old, mask, tau), tau[:, 0] ** 2 / 4)
            stride = -(-len(mask) // SEQUENCES)
            found["sequences"] = [
                [float(f"{value:.5g}") for value in row] for row in torch.stack(columns, 1)[::stride].tolist()
            ]
        return found

    def describe(self, logprobs, old, advantages, mask, sampled) -> dict[str, float]:
        """Metrics of the objective on a whole mini-batch, all [N, T]; `sampled` is None where the engine's
        log-probs are the old ones."""
        metrics = update_metrics(self.objective, self.ratio(logprobs, old, mask), advantages, mask)
        if self.gate is not None:
            metrics |= gate_metrics(logprobs, old, advantages, mask, **self.gate)
        if sampled is not None:
            metrics |= mismatch_metrics(old, sampled, mask)
        if sampled is not None and self.correct is not None:
            metrics |= correction_metrics(*self.correct(old, sampled, mask), mask)
        return metrics


def build_loss(
    objective: dict[str, float],
    *,
    ratio: str,
    reduction: str,
    kl: float,
    max_tokens: int,
    correction: dict[str, Any] | None = None,
    balance: float = 0.0,
) -> PolicyLoss:
    """`objective` and `correction` are the fields of the config's sections, `type` among them."""
    parameters = {name: value for name, value in objective.items() if name != "type"}
    return PolicyLoss(
        objective=_own(**parameters)
        if objective["type"] == "own"
        else partial(OBJECTIVES[objective["type"]], **parameters),
        ratio=RATIOS[ratio],
        reduce=partial(REDUCTIONS[reduction], max_tokens=max_tokens),
        kl=kl,
        gate=parameters if objective["type"] == "sapo" else None,
        correct=None if correction is None else partial(_correct, **correction),
        balance=balance,
    )


def _own(function: str, args: dict[str, Any]) -> Objective:
    """A function of the user's. Raises ValueError where it doesn't take these arguments."""
    found = resolve(function, field="algo.objective.function")
    try:
        signature(found).bind(None, None, **args)
    except TypeError as error:
        raise ValueError(
            f"algo.objective.args ({args}) must fit {function}{signature(found)}; {error}"
        ) from error
    return partial(found, **args)


def _correct(
    policy: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor, *, type: str, level: str, **bounds
):
    weights = importance(policy, engine, mask, level=level).detach()
    return weights, CORRECTIONS[type](weights, **bounds)
