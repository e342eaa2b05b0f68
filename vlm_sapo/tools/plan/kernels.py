"""What a GPU's kernels of linear attention allocate, on tensors without values, after the source of
flash-linear-attention 0.6.0. transformers' own code runs chunk by chunk and keeps all that it computes.

[B] sequences, [T] tokens, [N] chunks; queries and keys have [H] heads of size [K], values [E] heads of size
[V].
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

OPERATION = "torch_chunk_gated_delta_rule"
"""transformers' name of the function that the kernel replaces, in the module of each family."""
CHUNK = 64
"""Tokens of a chunk."""


class GatedDeltaRule(torch.autograd.Function):
    """The kernel's tensors, in its order."""

    @staticmethod
    def forward(ctx: Any, query, key, value, gate, beta, state):
        """query, key [B, T, H, K], value [B, T, E, V], gate, beta [B, T, E], state [B, E, K, V] or None; to
        the output [B, T, E, V] and the state after it."""
        normed = [torch.empty_like(tensor) for tensor in (query, key)]
        norms = [torch.empty(tensor.shape[:-1], dtype=torch.float32) for tensor in (query, key)]
        sums = torch.empty(gate.shape, dtype=torch.float32)
        _, _, weights = _intra(key, value)
        _states(key, value)
        after = torch.empty(_state_shape(key, value), dtype=torch.float32)
        ctx.save_for_backward(*normed, *norms, value, sums, beta, weights, state)
        return torch.empty_like(value), after

    @staticmethod
    def backward(ctx: Any, output, after):
        """The gradients of all inputs. What the kernel holds at once gets a name, so that it counts until it
        is deleted."""
        query, key, _, _, value, sums, beta, weights, state = ctx.saved_tensors
        projected, updated, _ = _intra(key, value, weights)
        _, values = _states(key, value)
        local, summed = torch.empty_like(output), torch.empty_like(output)
        of_states = key.new_empty(_chunked_shape(key, value))
        first = None if state is None else torch.empty(state.shape, dtype=torch.float32)
        wide = (*value.shape[:3], key.shape[-1])
        queries, keys, further = key.new_empty(wide), key.new_empty(wide), key.new_empty(wide)
        gates, further_gates = torch.empty_like(sums), torch.empty_like(sums)
        of_values, of_beta = torch.empty_like(value), torch.empty_like(beta)
        own = torch.empty_like(projected)
        del projected, updated, values, local, summed, of_states, further, further_gates, own
        gradients = [torch.empty_like(query), torch.empty_like(key)]
        del queries, keys
        return *gradients, of_values, gates, of_beta, first


def chunk_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' function of this name, without values."""
    return GatedDeltaRule.apply(query, key, value, g, beta, initial_state)


@contextmanager
def gpu_kernels(model: nn.Module) -> Iterator[None]:
    """Inside, a model's linear attention allocates what a GPU's kernels do."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    homes = {kind.__module__ for kind in kinds if OPERATION in vars(sys.modules[kind.__module__])}
    before = {home: vars(sys.modules[home])[OPERATION] for home in homes}
    for home in homes:
        setattr(sys.modules[home], OPERATION, chunk_gated_delta_rule)
    try:
        yield
    finally:
        for home, function in before.items():
            setattr(sys.modules[home], OPERATION, function)


def _intra(key: torch.Tensor, value: torch.Tensor, weights: torch.Tensor | None = None):
    """Keys [B, T, E, K] and values as the state sees them, and the weights [B, T, E, CHUNK] within chunks."""
    heads = value.shape[:3]
    if weights is None:
        weights = key.new_empty(*heads, CHUNK)
    return key.new_empty(*heads, key.shape[-1]), torch.empty_like(value), weights


def _states(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state before each chunk, and new values."""
    return key.new_empty(_chunked_shape(key, value)), torch.empty_like(value)


def _state_shape(key: torch.Tensor, value: torch.Tensor) -> tuple[int, ...]:
    return value.shape[0], value.shape[2], key.shape[-1], value.shape[-1]


def _chunked_shape(key: torch.Tensor, value: torch.Tensor) -> tuple[int, ...]:
    sequences, heads, *sizes = _state_shape(key, value)
    return sequences, -(-value.shape[1] // CHUNK), heads, *sizes
