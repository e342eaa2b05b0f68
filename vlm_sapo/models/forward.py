"""The training pass: log-probs and entropies of the tokens that the policy sampled, and only of them.

[S] sampled tokens, [C] tokens of a chunk, [N, T] responses by tokens, [H] hidden size, [V] vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlm_sapo.models.experts import RoutedPass
from vlm_sapo.models.head import is_plain, score_tokens
from vlm_sapo.models.packing import Inputs
from vlm_sapo.models.vlm import VLM

CHUNK_LOGITS = 2**26
"""Logits in memory at once: 256 MB in float32. A chunk has as many tokens as fit."""


@dataclass(frozen=True)
class Scores:
    """Results of a pass for N responses: [N, T] float32, 0 where the policy sampled no token."""

    logprobs: torch.Tensor
    entropies: torch.Tensor


class Pass(nn.Module):
    """Runs responses in a layout's form through the model."""

    def __init__(self, vlm: VLM, temperature: float = 1.0):
        super().__init__()
        self.vlm, self.temperature = vlm, temperature

    def forward(self, inputs: Inputs, routed: RoutedPass | None = None) -> Scores:
        """Log-probs and entropies of the sampled tokens. `routed` records the MoE routers' experts, and may
        replace them (replay)."""
        with self.vlm.routers.recording(routed):
            hidden = self.vlm.hidden(
                ids=inputs.ids,
                positions=inputs.positions,
                mask=inputs.mask,
                segments=inputs.segments,
                features=self.vlm.vision(inputs.images),
            )
        logprobs, entropies = self.score(hidden.flatten(0, 1)[inputs.scoring], inputs.targets)
        where = inputs.sampled_mask
        empty = logprobs.new_zeros(where.shape)
        return Scores(empty.masked_scatter(where, logprobs), empty.masked_scatter(where, entropies))

    def score(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[S, H] hidden states and [S] targets to [S] log-probs and entropies; logits are made anew in the
        backward pass, a chunk at a time.

        Only a head that is no plain Linear (with an adapter, 4 bits, hooks) is run as a module, with
        checkpoints: autograd then keeps a chunk's logits several times, and computes the entropy twice.
        """
        size, head = max(1, CHUNK_LOGITS // self.vlm.vocabulary), self.vlm.model.lm_head
        if is_plain(head):
            options = {"banned": self.vlm.banned, "temperature": self.temperature, "chunk": size}
            return score_tokens(hidden, head.weight, targets, cap=self.vlm.logit_cap, **options)
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
