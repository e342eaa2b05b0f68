"""Reduces token losses [N, T] of a micro-batch to its share of the optimizer step's loss.

The denominators are counted over the whole optimizer step (all micro-batches), so the sum over micro-batches
is the step's loss however it is split. Where the mask is off a loss may be anything, also NaN.
"""

from __future__ import annotations

import torch


def sequence_mean(losses: torch.Tensor, mask: torch.Tensor, *, num_sequences: int) -> torch.Tensor:
    """Mean over sequences of token means (GRPO, GSPO, SAPO)."""
    lengths = mask.sum(-1).clamp(min=1)
    return (_masked(losses, mask).sum(-1) / lengths).sum() / num_sequences


def token_mean(losses: torch.Tensor, mask: torch.Tensor, *, num_tokens: int) -> torch.Tensor:
    """Mean over all tokens (DAPO)."""
    return _masked(losses, mask).sum() / num_tokens


def constant(
    losses: torch.Tensor, mask: torch.Tensor, *, num_sequences: int, max_tokens: int
) -> torch.Tensor:
    """Sum over tokens divided by sequences times the longest possible response (Dr.GRPO)."""
    return _masked(losses, mask).sum() / (num_sequences * max_tokens)


def _masked(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, losses, 0.0)


DENOMINATORS = ("num_sequences", "num_tokens", "max_tokens")
"""What a reduction can ask for by name, besides losses and mask."""
REDUCTIONS = {"sequence_mean": sequence_mean, "token_mean": token_mean, "constant": constant}
