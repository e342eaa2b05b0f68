"""The embedded engine: samples from the policy's own modules.

Pictures are encoded and the prompt is prefilled once per prompt; the cache is then repeated for the G
branches, and branches leave the batch as they end. [B] prompts, [A] branches still running, [P] prompt
tokens, [V] vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from vlm_sapo.models.vlm import VLM
from vlm_sapo.types import Completion, Prompt, Sampling


@dataclass
class Branch:
    """One response in the making."""

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class HfEngine:
    """Generates for `prompts_per_batch` prompts at a time; `autocast` is the trainer's precision context.

    The draws of a prompt depend on the seed and the prompt's place alone, not on how prompts are batched.
    """

    def __init__(self, vlm: VLM, *, prompts_per_batch: int, autocast=nullcontext):
        self.vlm, self.prompts_per_batch, self.autocast = vlm, prompts_per_batch, autocast

    def sync(self, vlm: VLM) -> None:
        """Nothing to copy: the engine and the policy share their modules."""
        self.vlm = vlm

    def close(self) -> None:
        """Nothing is held."""

    @torch.no_grad()
    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """See RolloutEngine."""
        uniforms = [_uniforms(sampling, index) for index in range(len(prompts))]
        training = self.vlm.training
        self.vlm.eval()  # gradient checkpointing in training mode would switch the cache off
        groups: list[list[Completion]] = []
        context: AbstractContextManager = self.autocast()
        with context:
            for start in range(0, len(prompts), self.prompts_per_batch):
                chosen = slice(start, start + self.prompts_per_batch)
                groups += self._generate(prompts[chosen], torch.stack(uniforms[chosen]), sampling)
        self.vlm.train(training)
        return groups

    def _generate(self, prompts: list[Prompt], uniforms: torch.Tensor, sampling: Sampling):
        size, device = sampling.group, self.vlm.device
        branches = [Branch(prompt) for prompt in prompts for _ in range(size)]
        uniforms = uniforms.flatten(0, 1).to(device)  # [B * G, max_tokens]
        stops = torch.tensor(self.vlm.stops, device=device)
        logits, cache, mask, position = self._prefill(prompts)
        cache.batch_repeat_interleave(size)
        logits, mask, position = (x.repeat_interleave(size, 0) for x in (logits, mask, position))
        running = torch.arange(len(branches), device=device)
        for step in range(sampling.max_tokens):
            ids, logprobs = sample(logits / sampling.temperature, uniforms[running, step])
            for row, token, logprob in zip(running.tolist(), ids.tolist(), logprobs.tolist(), strict=True):
                branches[row].ids.append(token)
                branches[row].logprobs.append(logprob)
            alive = (~torch.isin(ids, stops)).nonzero()[:, 0]
            if len(alive) == 0 or step + 1 == sampling.max_tokens:
                break
            if len(alive) < len(ids):
                cache.batch_select_indices(alive)
                running, ids, mask, position = (x[alive] for x in (running, ids, mask, position))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            hidden = self.vlm.hidden(
                ids=ids[:, None],
                positions=(position + step).expand(3, -1)[:, :, None],
                mask=mask,
                cache=cache,
            )
            logits = self.vlm.logits(hidden[:, -1])
        completions = [self._complete(branch) for branch in branches]
        return [completions[start : start + size] for start in range(0, len(completions), size)]

    def _prefill(self, prompts: list[Prompt]):
        """First logits [B, V], the cache, the mask [B, P] and the position [B] that follows each prompt."""
        longest = max(len(prompt.ids) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        positions = torch.zeros(3, len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt.ids)
            ids[row, start:], mask[row, start:] = prompt.ids, 1
            positions[:, row, start:] = prompt.positions
        device = self.vlm.device
        cache = DynamicCache(config=self.vlm.model.config.get_text_config())
        mask = mask.to(device)
        hidden = self.vlm.hidden(
            ids=ids.to(device),
            positions=positions.to(device),
            mask=mask,
            features=self.vlm.vision(prompts),
            cache=cache,
        )
        following = torch.stack([prompt.positions.max() + 1 for prompt in prompts]).to(device)
        return self.vlm.logits(hidden[:, -1]), cache, mask, following

    def _complete(self, branch: Branch) -> Completion:
        text = self.vlm.tokenizer.decode(branch.ids, skip_special_tokens=True)
        return Completion(
            ids=torch.tensor(branch.ids),
            logprobs=torch.tensor(branch.logprobs),
            text=branch.prompt.opening + text,
            finish="stop" if branch.ids[-1] in self.vlm.stops else "length",
        )


def sample(logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF draw: ids [A] and their log-probs [A] from logits [A, V] and uniforms [A] in [0, 1).

    Summed in float64, so that a vocabulary of 150,000 leaves no gap; a banned token's interval is empty.
    """
    logprobs = logits.log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[-1] - 1)
    return ids[:, 0], logprobs.gather(-1, ids)[:, 0]


def _uniforms(sampling: Sampling, index: int) -> torch.Tensor:
    """The random numbers of one prompt's group, [G, max_tokens]."""
    generator = torch.Generator().manual_seed((sampling.seed * 1_000_003 + index) % 2**63)
    return torch.rand(sampling.group, sampling.max_tokens, generator=generator, dtype=torch.float64)
