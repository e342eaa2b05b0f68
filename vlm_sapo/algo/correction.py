"""Importance weights from the rollout engine's distribution to the policy's. All tensors [N, T].

Tokens are sampled from the engine's distribution, which differs from the policy's by rounding, other kernels
or older weights. The weights are constants outside the gate; the ratio inside it is between policies only.
"""

from __future__ import annotations

import torch

from vlm_sapo.algo.objectives import LIMIT


def importance(policy: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor, *, level: str) -> torch.Tensor:
    """policy / engine per token, or the product over a response at each of its tokens (level `sequence`); 1
    where the mask is off."""
    difference = torch.where(mask, policy, 0.0) - torch.where(mask, engine, 0.0)
    if level == "sequence":
        difference = torch.where(mask, difference.sum(-1, keepdim=True), 0.0)
    return difference.clamp(-LIMIT, LIMIT).exp()


def truncated(weights: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """At most `high` (truncated importance sampling); `low` is ignored."""
    return weights.clamp(max=high)


def masked(weights: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """0 outside [low, high]. Masked tokens still count in the loss's denominator."""
    return torch.where((weights >= low) & (weights <= high), weights, 0.0)


CORRECTIONS = {"truncated": truncated, "masked": masked}


def mismatch_metrics(policy: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """Difference between the engine's and the policy's log-probs before the update."""
    difference = (policy - engine)[mask]
    bounded = difference.clamp(-LIMIT, LIMIT)
    return {
        "mismatch_mean": float(difference.abs().mean()),
        "mismatch_max": float(difference.abs().max()),
        "mismatch_kl": float((bounded.exp() - 1.0 - bounded).mean()),
    }


def correction_metrics(
    weights: torch.Tensor, corrected: torch.Tensor, mask: torch.Tensor
) -> dict[str, float]:
    """Mean weight, share of tokens whose weight was changed, and effective sample size as a share of
    the tokens."""
    used = corrected[mask]
    return {
        "correction_mean": float(used.mean()),
        "correction_cut": float((weights != corrected)[mask].double().mean()),
        "correction_ess": float(used.sum() ** 2 / (used**2).sum().clamp(min=1e-12) / len(used)),
    }
