"""The head: float32 logits of hidden states, and log-probs and entropies with a backward pass of their own.

[N] tokens, [C] tokens of a chunk, [H] hidden size, [V] vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from vlm_sapo.models.device import HALF_PRECISION

WEIGHT_ROWS = 2**14
"""Vocabulary rows of the weight's gradient that are added at once where it has another dtype than the
operands: 64 MB at a hidden size of 2048 in half precision."""


def is_plain(head: nn.Module) -> bool:
    """Whether a head is nothing but a product with its weight: a Linear without bias, adapter, quantization
    and hooks."""
    hooks = (
        head._forward_pre_hooks,
        head._forward_hooks,
        head._backward_pre_hooks,
        head._backward_hooks,
    )
    return type(head) is nn.Linear and head.bias is None and not any(hooks)


def operand_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype in which the head's weight and the hidden states are multiplied: autocast's, or the
    weight's."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Hidden states [N, H] times a weight [V, H], both in `operand_dtype`: [N, V] in float32 (float64 for
    float64).

    Products of half-precision numbers are summed in float32; the sum isn't rounded to half precision, where
    the distance of two neighbours is .125 for logits of 16 to 32 in bfloat16. Not differentiable in half
    precision.
    """
    if hidden.dtype not in HALF_PRECISION:
        return nn.functional.linear(hidden, weight)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    # Kernels of the CPU only return what they were given. The second product subtracts the rounded first one
    # before it is rounded itself: what rounding took. Twice the time of one product, and a fraction of a
    # float32 one's.
    rounded = torch.mm(hidden, weight.T)
    lost = torch.addmm(rounded, hidden, weight.T, beta=-1)
    return rounded.float().add_(lost)


def ban(logits: torch.Tensor, banned: Sequence[int]) -> torch.Tensor:
    """Sets the banned tokens' logits [..., V] to minus infinity, in place. A list as an index would be copied
    to the device for each call, which waits for it."""
    for token in banned:
        logits[..., token] = float("-inf")
    return logits


def soft_cap(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Logits x as cap * tanh(x / cap), where x is overwritten; as they are without a cap."""
    return logits if cap is None else logits.div_(cap).tanh_().mul(cap)


def score_tokens(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    banned: Sequence[int],
    temperature: float,
    chunk: int,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [N] of target tokens [N] from hidden states [N, H] and the head's weight
    [V, H], with the logits of `chunk` tokens in memory at once; `cap` as in `soft_cap`. Entropies have no
    gradient."""
    hidden = hidden.to(operand_dtype(weight))
    return _TokenScores.apply(hidden, weight, targets, chunk, (tuple(banned), temperature, cap))


class _TokenScores(torch.autograd.Function):
    """Keeps the normalizer of each token, so that the backward pass makes the logits once more and turns them
    into their own gradient, (target - softmax) * gradient / temperature, in place.

    The weight's gradient is summed over chunks in the weight's dtype.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, options):
        operand = weight.to(hidden.dtype)
        logprobs, entropies, normalizers = (
            torch.empty(len(hidden), dtype=_wide(hidden), device=hidden.device) for _ in range(3)
        )
        for rows in _chunks(len(hidden), chunk):
            logits = _scaled_logits(hidden[rows], operand, *options)
            logprobs[rows], entropies[rows], normalizers[rows] = _scores(logits, targets[rows], options[0])
            del logits  # before the next chunk's
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.chunk, ctx.options = chunk, options
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        hidden, weight, targets, normalizers = ctx.saved_tensors
        banned, temperature, cap = ctx.options
        hidden_needed, weight_needed, *_ = ctx.needs_input_grad
        operand = weight.to(hidden.dtype)
        hidden_gradient = torch.empty_like(hidden) if hidden_needed else None
        weight_gradient = None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(len(hidden), ctx.chunk):
                logits = _scaled_logits(hidden[rows], operand, *ctx.options)
                bend = None if cap is None else _bend(logits, cap / temperature, banned)
                slope = gradient[rows] / temperature
                logits = _to_gradient(logits, normalizers[rows], targets[rows], banned, slope)
                if bend is not None:
                    logits.mul_(bend)
                logits = logits.to(hidden.dtype)
                if hidden_needed:
                    torch.mm(logits, operand, out=hidden_gradient[rows])
                if rows.stop >= len(hidden):
                    del operand  # a cast one, before the weight's gradient may be at its first chunk
                if weight_needed:
                    weight_gradient = _add_product(weight_gradient, logits, hidden[rows], weight)
                del logits  # before the next chunk's
        if weight_needed and weight_gradient is None:  # no tokens
            weight_gradient = torch.zeros_like(weight)
        return hidden_gradient, weight_gradient, None, None, None


def _chunks(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, tokens, chunk))


def _wide(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of `product`."""
    return torch.float32 if hidden.dtype in HALF_PRECISION else hidden.dtype


def _scaled_logits(
    hidden: torch.Tensor, weight: torch.Tensor, banned: Sequence[int], temperature: float, cap: float | None
) -> torch.Tensor:
    """[C, V], capped and divided by the temperature."""
    logits = soft_cap(product(hidden, weight), cap)
    return ban(logits if temperature == 1 else logits.div_(temperature), banned)


def _bend(logits: torch.Tensor, cap: float, banned: Sequence[int]) -> torch.Tensor:
    """Derivatives [C, V] of `soft_cap` by its result: 1 - (logits / cap)^2; 0 where it is minus infinity."""
    bend = (logits / cap).square_().neg_().add_(1)
    for token in banned:
        bend[:, token] = 0.0
    return bend


def _scores(
    logits: torch.Tensor, targets: torch.Tensor, banned: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, entropies and normalizers [C] of logits [C, V], which are overwritten."""
    peak = logits.amax(-1)
    logits.sub_(peak[:, None])
    log_sum = logits.exp().sum(-1).log()
    logprobs = logits.gather(-1, targets[:, None])[:, 0] - log_sum
    probabilities = (logits - log_sum[:, None]).exp_()
    for token in banned:  # 0 * -inf
        logits[:, token] = 0.0
    return logprobs, log_sum - probabilities.mul_(logits).sum(-1), peak + log_sum


def _to_gradient(
    logits: torch.Tensor,
    normalizers: torch.Tensor,
    targets: torch.Tensor,
    banned: Sequence[int],
    slope: torch.Tensor,
) -> torch.Tensor:
    """Overwrites logits [C, V] with (target - softmax) * slope, for slopes [C]."""
    logits.sub_(normalizers[:, None]).exp_().mul_(-slope[:, None])
    logits.scatter_add_(-1, targets[:, None], slope[:, None])
    for token in banned:  # also where it is a target
        logits[:, token] = 0.0
    return logits


def _add_product(
    total: torch.Tensor | None, logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Adds logits [C, V] transposed times hidden [C, H] to a total [V, H] in the weight's dtype, or starts
    one."""
    if weight.dtype == hidden.dtype:
        return logits.T @ hidden if total is None else total.addmm_(logits.T, hidden)
    total = torch.zeros_like(weight) if total is None else total
    for part, columns in zip(total.split(WEIGHT_ROWS), logits.split(WEIGHT_ROWS, dim=1), strict=True):
        part.add_(columns.T @ hidden)
    return total
