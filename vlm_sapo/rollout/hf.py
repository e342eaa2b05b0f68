"""The embedded engine: samples from the policy's own modules.

Pictures are encoded and the prompts prefilled once, in packed rows; all branches of a prompt then decode from
its keys and values, which are never copied, and leave the batch as they end. [B] prompts, [A] branches in the
batch, [V] vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlm_sapo.models.attention import Branched, Prefix, Segments
from vlm_sapo.models.routing import Journal, NoJournal
from vlm_sapo.models.vlm import VLM
from vlm_sapo.types import Completion, Prompt, Sampling

T = TypeVar("T")
GPU_STRIDE = 16
"""Tokens between two looks at which branches have ended, on a GPU, where a look waits for the device."""


def run(work: Callable[[], T]) -> T:
    """Just so."""
    return work()


class HfEngine:
    """Generates for `prompts_per_batch` prompts at a time; `autocast` is the trainer's precision context, and
    `alone` runs work with the whole model, which several processes may share. With `experts` completions tell
    the experts of their tokens, which a mixture has.

    The draws of a prompt depend on the seed and the prompt's place alone, not on how prompts are batched.
    """

    def __init__(
        self,
        vlm: VLM,
        *,
        prompts_per_batch: int,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        alone: Callable[[Callable[[], T]], T] = run,
        experts: bool = False,
    ):
        self.vlm, self.prompts_per_batch, self.autocast = vlm, prompts_per_batch, autocast
        self.alone, self.experts = alone, experts

    def sync(self, vlm: VLM) -> None:
        """Nothing to copy: the engine and the policy share their modules."""
        self.vlm = vlm

    def close(self) -> None:
        """Nothing is held."""

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """See RolloutEngine."""
        return self.alone(lambda: self._generate_all(prompts, sampling))

    @torch.no_grad()
    def _generate_all(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Completion]]:
        uniforms = [_uniforms(sampling, number) for number in range(len(prompts))]
        training = self.vlm.training
        self.vlm.eval()  # gradient checkpointing in training mode would switch the cache off
        groups: list[list[Completion]] = []
        with self.autocast():
            for start in range(0, len(prompts), self.prompts_per_batch):
                chosen = slice(start, start + self.prompts_per_batch)
                groups += self._generate(prompts[chosen], torch.stack(uniforms[chosen]), sampling)
        self.vlm.train(training)
        return groups

    def _generate(self, prompts: list[Prompt], uniforms: torch.Tensor, sampling: Sampling):
        journal = (
            Journal(self.vlm.routers, sampling.group, sampling.max_tokens) if self.experts else NoJournal()
        )
        logits, prefix = self._prefill(prompts, journal)
        starts = torch.stack([prompt.positions.max() + 1 for prompt in prompts])
        ids, logprobs = self._decode(logits, prefix, starts, uniforms, sampling, journal)
        completions = self._complete(prompts, ids.cpu(), logprobs.cpu(), sampling.group, journal)
        return [completions[start : start + sampling.group] for start in range(0, len(ids), sampling.group)]

    @torch.inference_mode()
    def _decode(self, logits, prefix: Prefix, starts, uniforms, sampling: Sampling, journal):
        """Ids, -1 behind the end, and log-probs, both [B * G, max_tokens], from first logits [B, V], first
        positions [B] and random numbers [B, G, max_tokens]."""
        group, device = uniforms.shape[1], self.vlm.device
        stops = torch.tensor(self.vlm.stops, device=device)
        uniforms = uniforms.flatten(0, 1).to(device)
        ids = torch.full(uniforms.shape, -1, device=device)
        logprobs = torch.zeros(uniforms.shape, device=device)
        logits = logits.repeat_interleave(group, 0)
        position = starts.repeat_interleave(group).to(device)
        branch = torch.arange(len(uniforms), device=device)  # [A] which response each place of the batch is
        running = torch.ones_like(branch, dtype=torch.bool)
        cache = DynamicCache(config=self.vlm.model.config.get_text_config())
        stride, last = GPU_STRIDE if device.type == "cuda" else 1, uniforms.shape[1] - 1
        for step in range(last + 1):
            tokens, drawn = sample(cut(logits, sampling), uniforms[branch, step], sampling.temperature)
            ids[branch, step] = torch.where(running, tokens, -1)
            logprobs[branch, step] = torch.where(running, drawn, 0.0)
            running = running & ~torch.isin(tokens, stops)
            if step == last:
                break
            if step % stride == 0:
                if not running.any():
                    break
                kept, rows = compact(running.view(len(prefix.padding), -1))
                if len(kept) < len(running):
                    branch, running, tokens, position = (x[kept] for x in (branch, running, tokens, position))
                    if step:
                        cache.batch_select_indices(kept)
                    prefix = prefix if len(rows) == len(prefix.padding) else prefix.select(rows)
            with journal.decode(branch, step):
                hidden = self.vlm.hidden(
                    ids=tokens[:, None],
                    positions=(position + step).expand(3, -1)[:, :, None],
                    cache=cache,
                    prefix=prefix,
                )
            logits = self.vlm.logits(hidden[:, -1])
        return ids, logprobs

    def _prefill(self, prompts: list[Prompt], journal: Journal | NoJournal) -> tuple[torch.Tensor, Prefix]:
        """The first logits [B, V], and the keys and values that branches decode from."""
        lengths = [len(prompt.ids) for prompt in prompts]
        ends = torch.tensor(lengths).cumsum(0)
        starts = (ends - torch.tensor(lengths)).tolist()
        cache = DynamicCache(config=self.vlm.model.config.get_text_config())
        device = self.vlm.device
        with journal.prefill(lengths):
            hidden = self.vlm.hidden(
                ids=torch.cat([prompt.ids for prompt in prompts])[None].to(device),
                positions=torch.cat([prompt.positions for prompt in prompts], dim=1)[:, None].to(device),
                features=self.vlm.vision(prompts),
                cache=cache,
                segments=Segments(tuple(Branched(*place, ()) for place in zip(starts, lengths, strict=True))),
            )
        keys, values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
        return self.vlm.logits(hidden[0, ends - 1]), Prefix.from_row(keys, values, lengths)

    def _complete(
        self, prompts: list[Prompt], ids: torch.Tensor, logprobs: torch.Tensor, group: int, journal
    ):
        lengths = (ids >= 0).sum(1).tolist()
        rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        texts = self.vlm.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [
            Completion(
                ids=row.clone(),
                logprobs=logprobs[index, : len(row)].clone(),
                text=prompts[index // group].opening + texts[index],
                finish="stop" if int(row[-1]) in self.vlm.stops else "length",
                experts=journal.experts(index, len(row)),
            )
            for index, row in enumerate(rows)
        ]


def compact(running: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest grid that holds what is running in a [B, G] grid of branches.

    Returns the places that stay (flat, in the new grid's order) and the rows they lie in. Prompts with fewer
    running branches than others keep ended ones as filling.
    """
    rows = running.any(1).nonzero()[:, 0]
    order = running[rows].int().argsort(dim=1, descending=True, stable=True)
    columns = order[:, : int(running.sum(1).max())]
    return (rows[:, None] * running.shape[1] + columns).flatten(), rows


def cut(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits [A, V] with the tokens that top_p, top_k and min_p leave out at minus infinity."""
    if sampling.temperature == 0 or (sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 0, 0.0):
        return logits
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p > 0 else []
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k > 0 else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return LogitsProcessorList(warpers)(None, logits) * sampling.temperature


def sample(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF draw: ids [A] and their log-probs [A] from logits [A, V] and uniforms [A] in [0, 1).

    Summed in float64, so that a vocabulary of 150,000 leaves no gap; a banned token's interval is empty. At
    temperature 0 the likeliest id, which is certain.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniforms, dtype=logits.dtype)
    logprobs = (logits / temperature).log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[-1] - 1)
    return ids[:, 0], logprobs.gather(-1, ids)[:, 0]


def _uniforms(sampling: Sampling, number: int) -> torch.Tensor:
    """The random numbers of one prompt's group, [G, max_tokens]."""
    generator = torch.Generator().manual_seed(sampling.seed_of(number))
    return torch.rand(sampling.group, sampling.max_tokens, generator=generator, dtype=torch.float64)
