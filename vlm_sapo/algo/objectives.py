"""Policy objectives: each token's loss from its importance ratio and advantage. All tensors [N, T].

With r = exp(log_ratio), every objective's gradient is `-f'(r) r A grad log pi`; at r = 1 all have f' = 1, so
on policy they are the plain policy gradient. An objective is a function that asks for fields of TokenTensors
by name and returns the losses [N, T].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

LIMIT = 20.0


def token_log_ratio(logprobs: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log pi(y_t) - log pi_old(y_t), 0 where the mask is off."""
    difference = torch.where(mask, logprobs, 0.0) - torch.where(mask, old, 0.0)
    return difference.clamp(-LIMIT, LIMIT)


def sequence_log_ratio(logprobs: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The response's mean log-ratio at every token; each token's gradient flows through itself
    (GSPO-token)."""
    current = torch.where(mask, logprobs, 0.0)
    difference = (current - torch.where(mask, old, 0.0)).detach()
    mean = difference.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    log_ratio = mean.clamp(-LIMIT, LIMIT) + current - current.detach()
    return torch.where(mask, log_ratio, 0.0)


RATIOS = {"token": token_log_ratio, "sequence": sequence_log_ratio}


@dataclass(frozen=True)
class TokenTensors:
    """The tensors [N, T] that an objective can ask for by name."""

    logprobs: torch.Tensor
    """log pi of each token, with its gradient."""
    old: torch.Tensor
    """The log-probs before the update."""
    advantages: torch.Tensor
    mask: torch.Tensor
    """bool, true on the tokens with a loss."""
    level: str = "token"
    """Level of `log_ratio`: `token` or `sequence`."""
    sampled: torch.Tensor | None = None
    """The log-probs of the engine that sampled."""
    reference: torch.Tensor | None = None
    """The log-probs of the reference model, if any."""
    prepared: torch.Tensor | None = None
    """The result of the objective's `prepare` for the whole mini-batch, if it has one."""

    @property
    def advantage(self) -> torch.Tensor:
        return self.advantages

    @cached_property
    def log_ratio(self) -> torch.Tensor:
        """Log importance ratio at the configured level, 0 where the mask is off."""
        return RATIOS[self.level](self.logprobs, self.old, self.mask)

    @cached_property
    def token_log_ratio(self) -> torch.Tensor:
        return token_log_ratio(self.logprobs, self.old, self.mask)

    @cached_property
    def sequence_log_ratio(self) -> torch.Tensor:
        return sequence_log_ratio(self.logprobs, self.old, self.mask)

    def named(self, names: Sequence[str]) -> dict[str, torch.Tensor | None]:
        """Tensors by name; names are from TOKEN_TENSORS."""
        return {name: getattr(self, name) for name in names}


TOKEN_TENSORS = (
    "log_ratio",
    "advantage",
    "advantages",
    "logprobs",
    "old",
    "mask",
    "token_log_ratio",
    "sequence_log_ratio",
    "sampled",
    "reference",
    "prepared",
)
"""The names that an objective's parameters may have."""


def gate(ratio: torch.Tensor, tau: torch.Tensor | float) -> torch.Tensor:
    """SAPO's f(r) = (4 / tau) sigmoid(tau (r - 1)) (arXiv 2511.20347, eq. 5), for figures and tests; training
    uses `sapo`."""
    return 4.0 / tau * torch.sigmoid(tau * (ratio - 1.0))


def gate_weight(ratio: torch.Tensor, tau: torch.Tensor | float) -> torch.Tensor:
    """f'(r) = sech^2(tau (r - 1) / 2): 1 on policy, fading to 0 on both sides."""
    probability = torch.sigmoid(tau * (ratio - 1.0))
    return 4.0 * probability * (1.0 - probability)


def temperature(advantage: torch.Tensor, *, tau_pos: float, tau_neg: float) -> torch.Tensor:
    """tau_pos where the advantage is positive, else tau_neg."""
    positive, other = advantage.new_tensor(tau_pos), advantage.new_tensor(tau_neg)
    return torch.where(advantage > 0, positive, other)


def sapo(log_ratio: torch.Tensor, advantage: torch.Tensor, *, tau_pos: float, tau_neg: float) -> torch.Tensor:
    """-(f(r) - f(1)) A, written as -(2 / tau) tanh(tau (r - 1) / 2) A.

    The constant f(1) = 2 / tau differs by the advantage's sign; without it the loss is 0 on policy.
    """
    tau = temperature(advantage, tau_pos=tau_pos, tau_neg=tau_neg)
    return -2.0 / tau * torch.tanh(0.5 * tau * (log_ratio.exp() - 1.0)) * advantage


def clip(log_ratio: torch.Tensor, advantage: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A): GRPO and DAPO on token ratios, GSPO on sequence ratios."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - low, 1.0 + high) * advantage)


def cispo(log_ratio: torch.Tensor, advantage: torch.Tensor, *, cap: float) -> torch.Tensor:
    """-sg(min(r, cap)) A log pi, with log pi_old subtracted, which changes the value and not the gradient."""
    return -log_ratio.exp().clamp(max=cap).detach() * advantage * log_ratio


def dppo(
    token_log_ratio: torch.Tensor,
    logprobs: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    *,
    low: float,
    high: float,
) -> torch.Tensor:
    """-r A within the trust region and 0 outside (DPPO with the binary total variation, arXiv 2602.04879): a
    token is outside where its probability has moved in its advantage's direction by more than `high` (up) or
    `low` (down)."""
    change = (logprobs.exp() - old.exp()).detach()
    outside = torch.where(advantage > 0, change > high, change < -low)
    return torch.where(outside, 0.0, -token_log_ratio.exp() * advantage)


def vespo(
    token_log_ratio: torch.Tensor,
    advantage: torch.Tensor,
    *,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
) -> torch.Tensor:
    """-sg(phi(W)) A log pi with phi(W) = W^k exp(lambda (1 - W)), where W is the product of the response's
    ratios (VESPO, arXiv 2602.10693). log pi_old is subtracted, which changes the value and not the
    gradient."""
    log_weight = token_log_ratio.detach().sum(-1, keepdim=True).clamp(-LIMIT, LIMIT)
    positive = advantage > 0
    power = torch.where(positive, advantage.new_tensor(k_pos), advantage.new_tensor(k_neg))
    decay = torch.where(positive, advantage.new_tensor(lambda_pos), advantage.new_tensor(lambda_neg))
    phi = (power * log_weight + decay * (1.0 - log_weight.exp())).exp()
    return -phi * advantage * token_log_ratio


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Unbiased, non-negative estimate of KL(policy, reference) per sampled token."""
    difference = (reference - logprobs).clamp(-20.0, 20.0)
    return difference.exp() - difference - 1.0


OBJECTIVES = {"sapo": sapo, "grpo": clip, "gspo": clip, "cispo": cispo, "dppo": dppo, "vespo": vespo}
