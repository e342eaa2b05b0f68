"""Advantages of one group: [G] float64 rewards to [G] advantages. A group without variance gets zeros.

Rewards closer together than 1e-9 count as equal, so a constant .9 never turns rounding into a signal.
"""

from __future__ import annotations

import torch


def zscore(rewards: torch.Tensor) -> torch.Tensor:
    """(R - mean) / std with the sample standard deviation (GRPO, GSPO, SAPO eq. 2)."""
    deviation = centred(rewards)
    return deviation / rewards.std() if deviation.any() else deviation


def centred(rewards: torch.Tensor) -> torch.Tensor:
    """R - mean (Dr.GRPO)."""
    if rewards.max() - rewards.min() < 1e-9:
        return torch.zeros_like(rewards)
    return rewards - rewards.mean()


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """R minus the mean of the other rewards (RLOO)."""
    return centred(rewards) * (len(rewards) / max(len(rewards) - 1, 1))


ADVANTAGES = {"zscore": zscore, "centred": centred, "leave_one_out": leave_one_out}
