"""FlashAttention over packed sequences, by the kernels that torch brings.

`torch.nn.attention.varlen` wraps the same two operations. It is not used: its log-sum-exp has no gradient,
torch 2.11's takes no grouped heads, and newer ones may choose cuDNN, which builds a graph for every new
number of sequences and longest length: with images of all sizes, in almost every call.

[L] tokens of a packed row, [Q] queries and [K] keys of a call, [H] query heads, [G] key heads, [D] head size,
[N] sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from vlm_sapo.models.device import HALF_PRECISION, HALF_PRECISION_CAPABILITY

LARGEST_HEAD = 256
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query [Q, H, D], key and value [K, G, D], or their gradients."""


def runs_on(tensor: torch.Tensor) -> bool:
    """Whether the kernels take this tensor: half precision and heads of at most LARGEST_HEAD, on a GPU of
    compute capability 8.0 or newer."""
    if not tensor.is_cuda or tensor.dtype not in HALF_PRECISION or tensor.shape[-1] > LARGEST_HEAD:
        return False
    return _capability(tensor.device) >= HALF_PRECISION_CAPABILITY


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True)
class Lengths:
    """Lengths of N sequences that lie one after another."""

    offsets: torch.Tensor
    """[N + 1] int32, where each sequence starts, and the end."""
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Lengths:
        return cls(torch.tensor([0, *lengths]).cumsum(0).int().to(device), max(lengths))


@dataclass(frozen=True)
class Call:
    """One call of the kernel: each sequence of queries attends to the sequence of keys with its number."""

    queries: Lengths
    keys: Lengths
    causal: bool
    scale: float | None

    def forward(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """The output [Q, H, D] and its log-sum-exp [H, Q] float32."""
        output, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
            *tensors,
            self.queries.offsets,
            self.keys.offsets,
            self.queries.longest,
            self.keys.longest,
            0.0,  # dropout
            self.causal,
            False,  # no mask for debugging
            scale=self.scale,
        )
        return output, logsumexp

    def backward(
        self, gradient: torch.Tensor, tensors: Tensors, output: torch.Tensor, logsumexp: torch.Tensor
    ) -> Tensors:
        """Gradients of query, key and value, given that of the output [Q, H, D]. With the output and
        log-sum-exp of an attention over more keys than this call's, the part that these keys cause."""
        return torch.ops.aten._flash_attention_backward(
            gradient,
            *tensors,
            output,
            logsumexp,
            self.queries.offsets,
            self.keys.offsets,
            self.queries.longest,
            self.keys.longest,
            0.0,
            self.causal,
            gradient.new_zeros(2, dtype=torch.uint64),  # random state of the dropout
            gradient.new_empty(0),
            scale=self.scale,
        )


@dataclass(frozen=True)
class PackedRow:
    """A packed row of sequences that each attend to themselves, and branches to the prompt of their group."""

    sequences: Lengths
    causal: bool
    pieces: tuple[int, ...] = ()
    """Tokens of each group's prompt and of all its branches, in turn; empty without branches."""
    branches: Lengths | None = None
    """All branches of each group that has some, and its prompt."""
    prompts: Lengths | None = None

    @classmethod
    def of_groups(cls, groups: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> PackedRow:
        """From each group's length of the prompt and lengths of its branches."""
        sequences = Lengths.of([size for prompt, own in groups for size in (prompt, *own)], device)
        branched = [(prompt, sum(own)) for prompt, own in groups if own]
        if not branched:
            return cls(sequences, causal=True)
        prompts, branches = (Lengths.of(sizes, device) for sizes in zip(*branched, strict=True))
        # with a longest query of 1 the kernel swaps heads and queries, and the log-sum-exp's order with them
        branches = replace(branches, longest=max(branches.longest, 2))
        pieces = tuple(size for prompt, own in groups for size in (prompt, sum(own)))
        return cls(sequences, True, pieces, branches, prompts)

    def split_branches(self, rows: torch.Tensor, *, dim: int = 0) -> list[torch.Tensor]:
        """All branches of each group that has some."""
        return [piece for piece in rows.split(self.pieces, dim=dim)[1::2] if piece.shape[dim]]

    def split_prompts(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """The prompt of each group that has branches."""
        pieces = rows.split(self.pieces)
        return [prompt for prompt, own in zip(pieces[::2], pieces[1::2], strict=True) if len(own)]

    def to_prompts(self, tensors: Tensors) -> Tensors:
        """The tensors of a call in which branches attend to their prompts."""
        query, key, value = tensors
        return (
            torch.cat(self.split_branches(query)),
            torch.cat(self.split_prompts(key)),
            torch.cat(self.split_prompts(value)),
        )


class PackedAttention(torch.autograd.Function):
    """Attention of a packed row: query [L, H, D], key and value [L, G, D] to [L, H, D].

    A group's branches attend to their prompt as one sequence, so that its keys are read as they lie in the
    row. That result is merged with the branches' attention to themselves by the log-sum-exp of both.
    """

    @staticmethod
    def forward(ctx, query, key, value, row: PackedRow, scale: float | None) -> torch.Tensor:
        tensors = query, key, value
        output, logsumexp = Call(row.sequences, row.sequences, row.causal, scale).forward(tensors)
        if row.branches is not None:
            call = Call(row.branches, row.prompts, False, scale)
            _merge(row, output, logsumexp, *call.forward(row.to_prompts(tensors)))
        ctx.save_for_backward(*tensors, output, logsumexp)
        ctx.row, ctx.scale = row, scale
        return output

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        *tensors, output, logsumexp = ctx.saved_tensors
        row, scale, gradient = ctx.row, ctx.scale, gradient.contiguous()
        call = Call(row.sequences, row.sequences, row.causal, scale)
        query, key, value = call.backward(gradient, tuple(tensors), output, logsumexp)
        if row.branches is not None:
            parts = Call(row.branches, row.prompts, False, scale).backward(
                torch.cat(row.split_branches(gradient)),
                row.to_prompts(tuple(tensors)),
                torch.cat(row.split_branches(output)),
                torch.cat(row.split_branches(logsumexp, dim=1), dim=1),
            )
            _add(row.split_branches(query), parts[0])
            _add(row.split_prompts(key), parts[1])
            _add(row.split_prompts(value), parts[2])
        return query, key, value, None, None


def _merge(
    row: PackedRow,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    prompt_output: torch.Tensor,
    prompt_logsumexp: torch.Tensor,
) -> None:
    """Adds to the branches' attention to themselves, in place, that to their prompt."""
    own_logsumexp = torch.cat(row.split_branches(logsumexp, dim=1), dim=1)
    share = (own_logsumexp - prompt_logsumexp).sigmoid().T[..., None]  # of the branch's own keys
    own = torch.cat(row.split_branches(output))
    merged = torch.lerp(prompt_output.to(share.dtype), own.to(share.dtype), share).to(output.dtype)
    total = torch.logaddexp(own_logsumexp, prompt_logsumexp)
    _copy(row.split_branches(output), merged, dim=0)
    _copy(row.split_branches(logsumexp, dim=1), total, dim=1)


def _copy(targets: Sequence[torch.Tensor], source: torch.Tensor, *, dim: int) -> None:
    sizes = [target.shape[dim] for target in targets]
    for target, part in zip(targets, source.split(sizes, dim=dim), strict=True):
        target.copy_(part)


def _add(targets: Sequence[torch.Tensor], parts: torch.Tensor) -> None:
    for target, part in zip(targets, parts.split([len(target) for target in targets]), strict=True):
        target += part
