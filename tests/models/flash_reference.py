"""The kernels of models/flash.py by their definition, in the tensors' own type: what a GPU's must compute.

The causal diagonal ends with the last query and the last key of a sequence, as FlashAttention has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from vlm_sapo.models import flash


@dataclass
class FlashReference:
    """Replaces the calls' forward and backward. `called` lists (causal, sequences) of each forward call."""

    called: list[tuple[bool, int]] = field(default_factory=list)

    def install(self, monkeypatch) -> None:
        monkeypatch.setattr(flash.Call, "forward", lambda call, tensors: self.forward(call, tensors))
        monkeypatch.setattr(flash.Call, "backward", lambda call, *args: self.backward(call, *args))

    def forward(self, call: flash.Call, tensors) -> tuple[torch.Tensor, torch.Tensor]:
        self._check(call, tensors)
        self.called.append((call.causal, len(call.queries.offsets) - 1))
        pieces = list(_sequences(call, *tensors))
        outputs, totals = [], []
        for query, key, value in pieces:
            scores = _scores(call, query, key)
            totals.append(scores.logsumexp(-1))
            outputs.append((scores.softmax(-1) @ _of(value, query)).transpose(0, 1).to(tensors[0].dtype))
        return torch.cat(outputs), torch.cat(totals, dim=1)

    def backward(self, call: flash.Call, gradient, tensors, output, logsumexp):
        self._check(call, tensors)
        gradients: list[tuple[torch.Tensor, ...]] = []
        gradient_parts = _split(gradient, call.queries)
        output_parts = _split(output, call.queries)
        total_parts = [part.T for part in _split(logsumexp.T, call.queries)]
        for index, (query, key, value) in enumerate(_sequences(call, *tensors)):
            upstream, out = (_wide(part[index]) for part in (gradient_parts, output_parts))
            weights = (_scores(call, query, key) - total_parts[index][..., None]).exp()
            by_weight = upstream @ _of(value, query).transpose(-1, -2)
            by_score = weights * (by_weight - (upstream * out).sum(-1, keepdim=True)) * _scale(call, query)
            gradients.append(
                (
                    by_score @ _of(key, query),
                    _fold(by_score.transpose(-1, -2) @ query, key),
                    _fold(weights.transpose(-1, -2) @ upstream, value),
                )
            )
        dtype = tensors[0].dtype
        return tuple(
            torch.cat([p.transpose(0, 1) for p in parts]).to(dtype) for parts in zip(*gradients, strict=True)
        )

    @staticmethod
    def _check(call: flash.Call, tensors) -> None:
        """What the real kernels require."""
        query, key, value = tensors
        assert query.dtype == key.dtype == value.dtype
        assert query.shape[1] % key.shape[1] == 0 and key.shape == value.shape
        assert all(tensor.stride(-1) == 1 for tensor in tensors)
        for lengths, rows in ((call.queries, query), (call.keys, key)):
            assert lengths.offsets.dtype == torch.int32 and isinstance(lengths.longest, int)
            assert lengths.offsets.device == rows.device
            assert int(lengths.offsets[-1]) == len(rows)
            assert int(lengths.offsets.diff().max()) <= lengths.longest


def _wide(rows: torch.Tensor) -> torch.Tensor:
    """[S, H, D] to [H, S, D], in float32 at least."""
    rows = rows.transpose(0, 1)
    return rows if rows.dtype == torch.float64 else rows.float()


def _split(rows: torch.Tensor, lengths: flash.Lengths) -> tuple[torch.Tensor, ...]:
    return rows.split(lengths.offsets.diff().tolist())


def _sequences(call: flash.Call, query, key, value) -> Iterator[tuple[torch.Tensor, ...]]:
    parts = (_split(query, call.queries), _split(key, call.keys), _split(value, call.keys))
    for sequence in zip(*parts, strict=True):
        yield tuple(_wide(part) for part in sequence)


def _of(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A key or value for each query head."""
    return key.repeat_interleave(len(query) // len(key), dim=0)


def _fold(gradient: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The sum over the query heads that share a key head."""
    return gradient.unflatten(0, (len(key), -1)).sum(1)


def _scale(call: flash.Call, query: torch.Tensor) -> float:
    return query.shape[-1] ** -0.5 if call.scale is None else call.scale


def _scores(call: flash.Call, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    scores = query @ _of(key, query).transpose(-1, -2) * _scale(call, query)
    if not call.causal:
        return scores
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    return scores.masked_fill(~seen, float("-inf"))
