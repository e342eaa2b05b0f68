"""AdamW for weights in bfloat16, which would round the small updates of reinforcement learning away.

A bfloat16 has 8 significant bits: an update changes a weight only if it is more than about 1/512 of it, and
at a learning rate of 1e-6 hardly any is. Rounded at random instead, up or down with the probability that
makes the expectation exact, the updates add up: Zamirai et al., arXiv 2010.06192; torchao's
`bf16_stochastic_round`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vlm_sapo.models.weights import own_rows

CHUNK_ELEMENTS = 2**23
"""Elements that are updated at a time, which bounds the temporary tensors (about 200 MB)."""
DROPPED_BITS = 16
"""Bits of a float32 that a bfloat16 lacks."""
GOLDEN_RATIO = 0x9E3779B1


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (as torch.optim.AdamW) with moments in float32, that computes in float32 and rounds new bfloat16
    weights stochastically; weights in float32 are not rounded.

    The random bits are a hash of seed, step, the parameter's number and the element's index in the full
    parameter. So processes with copies round alike, shards of any number as the whole, and a resumed run as
    one that was not interrupted.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        seed: int = 0,
    ):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, number, group)
                number += 1

    def _update(self, parameter: nn.Parameter, number: int, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        state["step"] += 1
        step = int(state["step"])
        key = random_key(self.seed, step, number)
        first = first_element(parameter)
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        for start, (weight, *chunks) in _chunks(*tensors):
            updated = adamw(weight.float(), *chunks, step=step, group=group)
            if weight.dtype == torch.bfloat16:
                bits = random_bits(first + start, len(weight), key, weight.device)
                updated = round_stochastically(updated, bits)
            weight.copy_(updated)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would convert the moments to the weights' dtype."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, state in state_dict["state"].items():
            parameter = parameters[number]
            self.state[parameter] = {
                name: value.float() if name == "step" else value.to(parameter.device, torch.float32)
                for name, value in state.items()
            }


def adamw(
    weight: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    group: dict[str, Any],
) -> torch.Tensor:
    """The weight [n] in float32 after AdamW's update number `step` (from 1); changes the moments in place."""
    (beta1, beta2), rate = group["betas"], group["lr"]
    grad = grad.float()
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    scale = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    return weight.mul(1 - rate * group["weight_decay"]).addcdiv_(
        exp_avg, scale, value=-rate / (1 - beta1**step)
    )


def round_stochastically(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Float32 values whose lower half is zero, so that bfloat16 holds them: the two nearest, the one above
    with a probability that grows from 0 to 1 between them. `bits` are random integers from 0 to 65535, int32.
    """
    return values.view(torch.int32).add(bits).bitwise_and_(-(1 << DROPPED_BITS)).view(torch.float32)


def random_key(seed: int, step: int, number: int) -> int:
    """An integer of 32 bits (signed) for a step's update of one parameter."""
    digest = hashlib.blake2b(f"{seed} {step} {number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


def random_bits(first: int, count: int, key: int, device: torch.device) -> torch.Tensor:
    """[count] int32 from 0 to 65535 for elements first, first + 1, ...: the elements' indices and the key,
    mixed by the finalizer of MurmurHash3 (public domain), in integers of 32 bits that wrap around."""
    bits = torch.arange(count, dtype=torch.int32, device=device).mul_(_signed(GOLDEN_RATIO))
    bits.add_(_signed(first * GOLDEN_RATIO)).bitwise_xor_(key)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits.bitwise_xor_(_shifted(bits, shift)).mul_(_signed(factor))
    return bits.bitwise_xor_(_shifted(bits, 16)).bitwise_and_((1 << DROPPED_BITS) - 1)


def _shifted(bits: torch.Tensor, count: int) -> torch.Tensor:
    """A logical shift to the right; that of signed integers copies the sign."""
    return bits.bitwise_right_shift(count).bitwise_and_((1 << (32 - count)) - 1)


def _signed(value: int) -> int:
    """The lower 32 bits as a signed integer."""
    return (value + 2**31) % 2**32 - 2**31


def first_element(parameter: torch.Tensor) -> int:
    """Index, in the full parameter, of the first element of this process's shard."""
    if not isinstance(parameter, DTensor):
        return 0
    return int(own_rows(parameter).start) * (parameter.numel() // parameter.shape[0])


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Views of the same elements of this process's part of all tensors, with the index of the first in it."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    flat = [tensor.view(-1) for tensor in local]
    for start in range(0, flat[0].numel(), CHUNK_ELEMENTS):
        yield start, [tensor[start : start + CHUNK_ELEMENTS] for tensor in flat]
