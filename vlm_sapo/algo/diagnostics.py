"""Diagnostics of an objective on a mini-batch: ratios, effective update, gate, variance within sequences.

Inputs are detached [N, T] tensors; `mask` marks response tokens. Every metric is the mean over the
mini-batch, a quantile, or a share; metrics that don't apply to an objective are absent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vlm_sapo.algo import objectives

Objective = Callable[[objectives.TokenTensors], torch.Tensor]


def effective_update(objective: Objective, tensors: objectives.TokenTensors) -> torch.Tensor:
    """f'(r) per token, by differentiating the objective: the share of the plain policy gradient that remains.

    For GRPO it is 0 where the clip is active and 1 elsewhere, so objectives compare on one scale.
    """
    with torch.enable_grad():
        leaf = tensors.logprobs.detach().requires_grad_()
        changed = replace(tensors, logprobs=leaf)
        (slope,) = torch.autograd.grad(objective(changed).sum(), leaf)
    scale = tensors.advantages * changed.log_ratio.detach().exp()
    return torch.where(scale == 0, 1.0, -slope / torch.where(scale == 0, 1.0, scale))


def ratio_metrics(logprobs: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """Ratios, |log r|, the variance of log r within sequences, and two estimates of KL(old, new)."""
    log_ratio = objectives.token_log_ratio(logprobs, old, mask)
    values = log_ratio[mask]
    metrics = _quantiles("ratio", values.exp()) | _quantiles("abs_log_ratio", values.abs())
    lengths = mask.sum(-1).clamp(min=1)
    mean = log_ratio.sum(-1) / lengths
    variance = (torch.where(mask, log_ratio - mean[:, None], 0.0) ** 2).sum(-1) / lengths
    metrics |= _quantiles("sequence_variance", variance)
    metrics["sequence_variance_over_02"] = float((variance > 0.02).double().mean())
    metrics["sequence_ratio_max"] = float(mean.exp().max())
    metrics["kl_old_k1"] = float(-values.mean())
    metrics["kl_old_k3"] = float((values.exp() - 1.0 - values).mean())
    return metrics


def update_metrics(update: torch.Tensor, advantage: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """The effective update [N, T] overall and by the advantage's sign, and shares of tokens below bounds."""
    metrics = {}
    for name, where in (("", mask), ("_pos", mask & (advantage > 0)), ("_neg", mask & (advantage < 0))):
        if where.any():
            metrics[f"effective_update{name}"] = float(update[where].mean())
    metrics["update_under_90"] = float((update[mask] < 0.9).double().mean())
    metrics["update_under_50"] = float((update[mask] < 0.5).double().mean())
    return metrics


def clip_metrics(
    logprobs: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, mask: torch.Tensor
) -> dict[str, float]:
    """Shares of these tokens that GRPO (.2/.2) and GSPO (3e-4/4e-4) would have clipped."""
    shares = {}
    for name, level, low, high in (
        ("grpo", objectives.token_log_ratio, 0.2, 0.2),
        ("gspo", objectives.sequence_log_ratio, 3e-4, 4e-4),
    ):
        ratio = level(logprobs, old, mask).exp()
        clipped = torch.where(advantage > 0, ratio > 1 + high, ratio < 1 - low)
        shares[f"{name}_would_clip"] = float(clipped[mask].double().mean())
    return shares


def gate_metrics(
    logprobs: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    *,
    tau_pos: float,
    tau_neg: float,
) -> dict[str, float]:
    """SAPO as a sequence-level gate: |mean gate - gate of the mean| in log form, its bound, and the mean of
    the actual gate."""
    tau = objectives.temperature(advantage, tau_pos=tau_pos, tau_neg=tau_neg)
    true_gate = objectives.gate_weight(objectives.token_log_ratio(logprobs, old, mask).exp(), tau)
    lengths = mask.sum(-1).clamp(min=1)
    metrics = {"gate_mean": float((torch.where(mask, true_gate, 0.0).sum(-1) / lengths).mean())}
    log_form = gate_deviation(logprobs, old, advantage, mask, tau_pos=tau_pos, tau_neg=tau_neg)
    if not len(log_form.tau):
        return metrics
    bound = log_form.tau**2 / 4 * log_form.variance
    deviation = {
        "gate_deviation": float(log_form.deviation.mean()),
        "gate_deviation_bound": float(bound.mean()),
    }
    return deviation | metrics


@dataclass(frozen=True)
class GateDeviation:
    """SAPO's gate within sequences, in log form; all [M]."""

    variance: torch.Tensor
    """Variance of log r within the sequence."""
    deviation: torch.Tensor
    """|mean gate - gate of the mean|, at most tau^2/4 times the variance."""
    tau: torch.Tensor


def gate_deviation(
    logprobs: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    *,
    tau_pos: float,
    tau_neg: float,
) -> GateDeviation:
    """For the M sequences whose advantages have one sign, and therefore one temperature (arXiv 2511.20347,
    section 4). In float64, because both gates are close to 1."""
    positive, other = (mask & (advantage > 0)).any(-1), (mask & (advantage <= 0)).any(-1)
    uniform = ~(positive & other)
    tau = torch.where(positive, advantage.new_tensor(tau_pos), advantage.new_tensor(tau_neg))[uniform]
    logprobs, old, mask = logprobs[uniform], old[uniform], mask[uniform]
    log_ratio = objectives.token_log_ratio(logprobs.double(), old.double(), mask)
    lengths = mask.sum(-1).clamp(min=1)
    mean = log_ratio.sum(-1, keepdim=True) / lengths[:, None]

    def average(values: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, values, 0.0).sum(-1) / lengths

    def log_gate(values: torch.Tensor) -> torch.Tensor:
        return torch.cosh(0.5 * tau.double()[:, None] * values) ** -2

    deviation = (average(log_gate(log_ratio)) - log_gate(mean)[:, 0]).abs()
    return GateDeviation(average((log_ratio - mean) ** 2), deviation, tau)


DECADES = torch.logspace(-6, 1, 29)
"""Bin edges on a log scale, four per factor of ten."""


def histograms(
    log_ratio: torch.Tensor, update: torch.Tensor, advantage: torch.Tensor, mask: torch.Tensor
) -> dict[str, list[int]]:
    """Token counts of a mini-batch: `log_ratio` in 59 bins with edges at -DECADES and DECADES, the outer bins
    open; `attenuated_pos` and `attenuated_neg`, |1 - effective update| by the advantage's sign, in 30 bins
    with edges at DECADES, the outer ones open."""
    values = log_ratio[mask]
    bins = torch.bucketize(values.abs(), DECADES.to(values))
    signed = torch.where(values < 0, -bins, bins) + len(DECADES)
    counts = {"log_ratio": torch.bincount(signed, minlength=2 * len(DECADES) + 1).tolist()}
    for name, where in (("pos", mask & (advantage > 0)), ("neg", mask & (advantage < 0))):
        bins = torch.bucketize((1 - update[where]).abs().to(values), DECADES.to(values))
        counts[f"attenuated_{name}"] = torch.bincount(bins, minlength=len(DECADES) + 1).tolist()
    return counts


def _quantiles(name: str, values: torch.Tensor) -> dict[str, float]:
    points = torch.tensor([0.01, 0.5, 0.99], dtype=values.dtype, device=values.device)
    low, middle, high = torch.quantile(values[: 2**24], points).tolist()
    return {
        f"{name}_p01": low,
        f"{name}_p50": middle,
        f"{name}_p99": high,
        f"{name}_max": float(values.max()),
    }
