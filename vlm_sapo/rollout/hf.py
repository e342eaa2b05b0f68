"""The embedded engine: samples from the policy's own modules.

Pictures are encoded and prompts prefilled once; all branches of a prompt then go on from there
(models/decoding.py) and leave the batch as they end. [B] prompts, [G] branches of each, [A] branches in the
batch, [V] vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlm_sapo.models.decoding import DecodeState, prefill
from vlm_sapo.models.experts import ExpertRecorder, NullRecorder
from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.engine import RolloutError
from vlm_sapo.types import Prompt, Response, Sampling

T = TypeVar("T")
GPU_STRIDE = 16
"""Tokens between two looks at which branches have ended, on a GPU, where a look waits for the device."""


def run(work: Callable[[], T]) -> T:
    """Just so."""
    return work()


class HfEngine:
    """Generates for `prompts_per_batch` prompts at a time; `autocast` is the trainer's precision context, and
    `with_full_params` runs work with the whole model, which several processes may share. With `experts`
    responses tell the experts of their tokens, which a mixture has.

    The draws of a prompt depend on the seed and the prompt's place alone, not on how prompts are batched.
    """

    def __init__(
        self,
        vlm: VLM,
        *,
        prompts_per_batch: int,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        with_full_params: Callable[[Callable[[], T]], T] = run,
        warn: Callable[[str], None] = print,
        experts: bool = False,
    ):
        self.vlm, self.prompts_per_batch, self.autocast = vlm, prompts_per_batch, autocast
        self.with_full_params, self.warn, self.experts = with_full_params, warn, experts

    def sync(self, vlm: VLM) -> None:
        """Nothing to copy: the engine and the policy share their modules."""
        self.vlm = vlm

    def close(self) -> None:
        """Nothing is held."""

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Response]]:
        """See RolloutEngine."""
        return self.with_full_params(lambda: self._generate_all(prompts, sampling))

    @torch.no_grad()
    def _generate_all(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Response]]:
        training = self.vlm.training
        self.vlm.eval()  # gradient checkpointing in training mode would switch the cache off
        try:
            with self.autocast():
                return self._generate_batches(prompts, sampling)
        finally:
            self.vlm.train(training)

    def _generate_batches(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Response]]:
        uniforms = [_uniforms(sampling, number) for number in range(len(prompts))]
        groups: list[list[Response]] = []
        while len(groups) < len(prompts):
            chosen = slice(len(groups), len(groups) + self.prompts_per_batch)
            try:
                groups += self._generate(prompts[chosen], torch.stack(uniforms[chosen]), sampling)
                continue
            except torch.OutOfMemoryError as error:
                reason = str(error).partition(". ")[0]
            self._shrink(prompts[chosen], reason)
        return groups

    def _shrink(self, prompts: list[Prompt], reason: str) -> None:
        """Fewer prompts at the same time, for the rest of the run."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(prompts) == 1:
            raise RolloutError(
                f"the responses to {prompts[0].example.label} do not fit into memory ({reason}); lower "
                "rollout.group, rollout.max_tokens or model.max_pixels"
            )
        self.prompts_per_batch = len(prompts) // 2
        self.warn(
            f"out of memory while {len(prompts)} prompts were answered ({reason}); goes on with "
            f"{self.prompts_per_batch} at a time: set rollout.prompts_per_batch={self.prompts_per_batch}"
        )

    def _generate(self, prompts: list[Prompt], uniforms: torch.Tensor, sampling: Sampling):
        recorder = (
            ExpertRecorder(self.vlm.routers, sampling.group, sampling.max_tokens)
            if self.experts
            else NullRecorder()
        )
        logits, branches = prefill(self.vlm, prompts, sampling.group, recorder)
        starts = torch.stack([prompt.positions.max() + 1 for prompt in prompts])
        ids, logprobs = self._decode(logits, branches, starts, uniforms, sampling, recorder)
        completions = self._complete(prompts, ids.cpu(), logprobs.cpu(), sampling.group, recorder)
        return [completions[start : start + sampling.group] for start in range(0, len(ids), sampling.group)]

    @torch.inference_mode()
    def _decode(self, logits, branches: DecodeState, starts, uniforms, sampling: Sampling, recorder):
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
                kept = branches.compact(running)
                branch, running, tokens, position = (x[kept] for x in (branch, running, tokens, position))
            with recorder.decode(branch, step):
                logits = branches.step(tokens, position + step)
        return ids, logprobs

    def _complete(
        self, prompts: list[Prompt], ids: torch.Tensor, logprobs: torch.Tensor, group: int, recorder
    ):
        lengths = (ids >= 0).sum(1).tolist()
        rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        texts = self.vlm.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [
            Response(
                ids=row.clone(),
                logprobs=logprobs[index, : len(row)].clone(),
                text=prompts[index // group].opening + texts[index],
                finish="stop" if int(row[-1]) in self.vlm.stops else "length",
                experts=recorder.experts(index, len(row)),
            )
            for index, row in enumerate(rows)
        ]


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
