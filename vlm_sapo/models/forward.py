"""The training pass: log-probs and entropies of response tokens, and of nothing else.

[K] response tokens, [C] tokens of a chunk, [N, T] responses by tokens, [H] hidden size, [V] vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlm_sapo.models.experts import RoutedPass
from vlm_sapo.models.packing import Inputs
from vlm_sapo.models.vlm import VLM

CHUNK_LOGITS = 2**26
"""Logits that exist at once: 256 MB in float32. A chunk has as many tokens as fit, whatever the lengths."""


class Pass(nn.Module):
    """Runs laid-out responses through the model."""

    def __init__(self, vlm: VLM, temperature: float = 1.0):
        super().__init__()
        self.vlm, self.temperature = vlm, temperature

    def forward(self, inputs: Inputs, routed: RoutedPass | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [N, T] float32 of the response tokens, 0 where the mask is off; `routed`
        is told what the routers do, and may tell them what to do."""
        with self.vlm.routers.recording(routed):
            hidden = self.vlm.hidden(
                ids=inputs.ids,
                positions=inputs.positions,
                mask=inputs.mask,
                segments=inputs.segments,
                features=self.vlm.vision(inputs.prompts),
            )
        logprobs, entropies = self.score(hidden.flatten(0, 1)[inputs.predicting], inputs.targets)
        where = inputs.response_mask
        empty = logprobs.new_zeros(where.shape)
        return empty.masked_scatter(where, logprobs), empty.masked_scatter(where, entropies)

    def score(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[K, H] hidden states and [K] targets to [K] log-probs and entropies; logits are made again in the
        backward pass."""
        size = max(1, CHUNK_LOGITS // self.vlm.vocabulary)
        scored = [
            checkpoint(self._score_chunk, *chunk, use_reentrant=False)
            for chunk in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        logprobs, entropies = zip(*scored, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _score_chunk(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.vlm.logits(hidden) / self.temperature  # [C, V]
        normalizer = logits.logsumexp(-1)
        with torch.no_grad():
            entropy = normalizer - ((logits - normalizer[:, None]).exp() * logits.clamp(min=-1e4)).sum(-1)
        return logits.gather(-1, targets[:, None])[:, 0] - normalizer, entropy
