"""Log importance ratios, at token or sequence level. [N, T] responses by tokens.

Log-ratios are clamped to [-20, 20] before anything is exponentiated: beyond, exp overflows and its product
with a vanished gate is NaN, while the true gradient is nil.
"""

from __future__ import annotations

import torch

LIMIT = 20.0


def token(logprobs: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log pi(y_t) - log pi_old(y_t), 0 where the mask is off."""
    difference = torch.where(mask, logprobs, 0.0) - torch.where(mask, old, 0.0)
    return difference.clamp(-LIMIT, LIMIT)


def sequence(logprobs: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The response's mean log-ratio at every token; each token's gradient flows through itself
    (GSPO-token)."""
    current = torch.where(mask, logprobs, 0.0)
    difference = (current - torch.where(mask, old, 0.0)).detach()
    mean = difference.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    log_ratio = mean.clamp(-LIMIT, LIMIT) + current - current.detach()
    return torch.where(mask, log_ratio, 0.0)


RATIOS = {"token": token, "sequence": sequence}
