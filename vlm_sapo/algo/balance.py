"""How evenly an MoE model's tokens are distributed over its experts.

[N] responses, [M] MoE layers, [E] experts.
"""

from __future__ import annotations

import torch


def sequence_balance(
    probabilities: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """The complementary sequence-wise loss of DeepSeek-V3 (arXiv 2412.19437, eq. 17) for each response, [N]:
    sum over experts of f P, mean over layers.

    f is E times an expert's share of the selections, P its mean probability. probabilities and counts
    [N, M, E] are sums over a response's tokens, lengths [N] their number. The loss is 1 if all experts are
    selected equally often; only P has a gradient.
    """
    load = counts * (counts.shape[-1] / counts.sum(-1, keepdim=True))
    return (load.detach() * probabilities / lengths[:, None, None]).sum(-1).mean(-1)


def router_metrics(
    counts: torch.Tensor, entropy: torch.Tensor, changed: torch.Tensor | None, tokens: int
) -> dict[str, float]:
    """Load of the busiest expert over the mean, averaged over layers, entropy per token, and the share of
    tokens and layers whose experts changed (unless `changed` is None). All are sums over a response's tokens:
    counts [N, M, E], entropy and changed [N]."""
    load = counts.double().sum(0)  # [M, E]
    metrics = {
        "expert_load": float((load.amax(-1) / load.mean(-1)).mean()),
        "router_entropy": float(entropy.double().sum() / tokens),
    }
    return (
        metrics if changed is None else metrics | {"experts_changed": float(changed.double().sum() / tokens)}
    )
