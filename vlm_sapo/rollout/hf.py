"""The embedded engine: samples from the policy's own modules.

Images are encoded and prompts prefilled once; all branches of a prompt share that (models/decoding.py), and
finished branches are dropped from the batch. [B] prompts, [G] branches of each, [A] branches in the
batch, [V] vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

from vlm_sapo.models import lora as adapters
from vlm_sapo.models.decoding import Branch, BranchGrid, DecodeState, Recorder, prefill
from vlm_sapo.models.device import out_of_memory, release_memory, shortage_reason
from vlm_sapo.models.experts import ExpertRecorder, NullRecorder
from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.engine import RolloutError, call, continue_response
from vlm_sapo.types import Context, Response, Sampling

T = TypeVar("T")
GPU_STRIDE = 16
"""On a GPU, tokens between two checks for finished branches: each check waits for the device."""


class HfEngine:
    """Generates for `prompts_per_batch` prompts at a time, or for as many as have `sequences_per_batch`
    responses together; for one at least. Adapters are inlined meanwhile. `autocast` is the trainer's
    precision context; `with_full_params` runs work with the full parameters of a sharded model; with
    `experts` responses carry the experts of their tokens.

    The responses to a prompt depend on the seed and the prompt's slot alone, not on how prompts are batched.
    """

    in_background = False
    shares_weights = True

    def __init__(
        self,
        vlm: VLM,
        *,
        prompts_per_batch: int | None = None,
        sequences_per_batch: int | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        with_full_params: Callable[[Callable[[], T]], T] = call,
        warn: Callable[[str], None] = print,
        experts: bool = False,
    ):
        assert (prompts_per_batch is None) != (sequences_per_batch is None), "one of the two"
        self.vlm, self.autocast = vlm, autocast
        self.prompts_per_batch, self.sequences_per_batch = prompts_per_batch, sequences_per_batch
        self.with_full_params, self.warn, self.records_experts = with_full_params, warn, experts

    def problems_at_once(self, samples: int) -> int:
        """Prompts of a batch, with so many responses to each."""
        if self.sequences_per_batch is not None:
            return max(1, self.sequences_per_batch // samples)
        return self.prompts_per_batch

    def sync(self, vlm: VLM) -> None:
        """Copies nothing: the engine and the policy share their modules."""
        self.vlm = vlm

    def close(self) -> None:
        pass

    def generate(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Response]]:
        """See RolloutEngine."""
        return self.with_full_params(lambda: self._generate_all(contexts, sampling))

    @torch.no_grad()
    def _generate_all(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Response]]:
        training = self.vlm.training
        self.vlm.eval()  # gradient checkpointing in training mode would switch the cache off
        try:
            with self.autocast():  # first, since it decides in which dtype adapters are inlined
                inlined = adapters.inlined(self.vlm.language, self._dtype())
                with inlined, self.vlm.weights_fixed():
                    return self._generate_batches(contexts, sampling)
        finally:
            self.vlm.train(training)

    def _dtype(self) -> torch.dtype:
        """What the language model's linear layers compute in."""
        kind = self.vlm.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.vlm.model.dtype

    def _generate_batches(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Response]]:
        groups: list[list[Response]] = []
        while len(groups) < len(contexts):
            width = max(len(item.responses) or sampling.group for item in contexts[len(groups) :])
            numbers = range(len(contexts))[len(groups) :][: self.problems_at_once(width)]
            batch = [contexts[number] for number in numbers]
            try:
                finished = self._generate(batch, [sampling.seed_of(number) for number in numbers], sampling)
                for context, responses in zip(batch, finished, strict=True):
                    context.report(responses)
                groups += finished
                continue
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = shortage_reason(error)
            self._shrink(batch, width, reason)
        return groups

    def _shrink(self, contexts: Sequence[Context], width: int, reason: str) -> None:
        """Halves the batch, for the rest of the run. `width` is the number of responses to each prompt."""
        release_memory()
        if len(contexts) == 1:
            raise RolloutError(
                f"the responses to {contexts[0].prompt.example.label} do not fit into memory ({reason}); "
                "lower rollout.group, rollout.max_tokens or model.max_pixels"
            )
        prompts = len(contexts) // 2
        if self.sequences_per_batch is None:
            remedy, self.prompts_per_batch = f"rollout.prompts_per_batch={prompts}", prompts
        else:
            self.sequences_per_batch = prompts * width
            remedy = f"rollout.sequences_per_batch={prompts * width} (without rollout.prompts_per_batch)"
        self.warn(
            f"out of memory with {len(contexts)} prompts per batch, {width} responses to each ({reason}); "
            f"continuing with {prompts}: set {remedy}"
        )

    def _generate(
        self, contexts: Sequence[Context], seeds: Sequence[int], sampling: Sampling
    ) -> list[list[Response]]:
        recorder = (
            ExpertRecorder(self.vlm.routers, sampling.max_tokens) if self.records_experts else NullRecorder()
        )
        grid = BranchGrid.of(contexts, sampling.group)
        logits, state = prefill(self.vlm, grid, recorder)
        groups: list[list[Response]] = [[] for _ in contexts]
        numbers = [_uniforms(sampling, seed) for seed in seeds]
        uniforms = torch.stack([numbers[item.context][item.number] for item in grid.branches])
        ids, logprobs = self._decode(logits, state, grid, uniforms, sampling, recorder)
        for context, response in self._responses(grid, ids, logprobs, recorder):
            groups[context].append(response)
        return groups

    @torch.inference_mode()
    def _decode(
        self,
        logits: torch.Tensor,
        state: DecodeState,
        grid: BranchGrid,
        uniforms: torch.Tensor,
        sampling: Sampling,
        recorder: Recorder,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples a turn of every branch from the first logits [rows, V] of the grid's rows and random
        numbers [B * G, max_tokens]. Returns ids, -1 outside the turn, and log-probs, both
        [B * G, max_tokens]."""
        device = self.vlm.device
        logits = logits[grid.sources.to(device)]
        stops = torch.tensor(self.vlm.stops, device=device)
        uniforms = uniforms.to(device)
        ids = torch.full(uniforms.shape, -1, device=device)
        logprobs = torch.zeros(uniforms.shape, device=device)
        branch = torch.arange(len(uniforms), device=device)  # [A] which response each row of the batch is
        start = torch.tensor([0 if item.so_far is None else len(item.so_far.ids) for item in grid.branches])
        position = torch.stack([_next_position(grid, item) for item in grid.branches]).to(device)
        running = torch.tensor([not item.filler for item in grid.branches], device=device)
        ends = torch.tensor([sampling.limit(before) for before in start.tolist()])
        steps = int((ends - start).max())
        last, start = ends.to(device) - 1, start.to(device)
        stride = GPU_STRIDE if device.type == "cuda" else 1
        for step in range(steps):
            index = torch.minimum(start + step, last)
            tokens, sampled = sample(cut(logits, sampling), uniforms[branch, index], sampling.temperature)
            ids[branch, index] = torch.where(running, tokens, ids[branch, index])
            logprobs[branch, index] = torch.where(running, sampled, logprobs[branch, index])
            running = running & ~torch.isin(tokens, stops) & (start + step < last)
            if step == steps - 1:
                break
            if step % stride == 0:
                if not running.any():
                    break
                remaining = state.compact(running)
                if len(remaining) < len(running):
                    branch, running, tokens, position, start, last, index = (
                        values[remaining]
                        for values in (branch, running, tokens, position, start, last, index)
                    )
            with recorder.decode(branch, index):
                logits = state.step(tokens, position + step)
        return ids.cpu(), logprobs.cpu()

    def _responses(
        self, grid: BranchGrid, ids: torch.Tensor, logprobs: torch.Tensor, recorder: Recorder
    ) -> Iterator[tuple[int, Response]]:
        """The responses, each with the index of its context; a sampled turn follows the response so far."""
        rows = [row[row >= 0] for row in ids]
        texts = self.vlm.tokenizer.batch_decode(rows, skip_special_tokens=True)
        for index, (branch, row, text) in enumerate(zip(grid.branches, rows, texts, strict=True)):
            if branch.filler:
                continue
            prompt = grid.contexts[branch.context].prompt
            start = 0 if branch.so_far is None else len(branch.so_far.ids)
            response = Response.sampled(
                (branch.so_far or prompt).positions,
                row.clone(),
                logprobs[index, start : start + len(row)].clone(),
                text=prompt.opening + text,
                finish="stop" if int(row[-1]) in self.vlm.stops else "length",
                experts=recorder.experts(index, start + len(row)),
                version=self.vlm.version,
            )
            yield branch.context, continue_response(self.vlm, prompt, branch.so_far, response)


def _next_position(grid: BranchGrid, branch: Branch) -> torch.Tensor:
    """Rotary position of the next token of a branch."""
    return (branch.so_far or grid.contexts[branch.context].prompt).positions.max() + 1


def cut(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits [A, V] with the tokens that top_p, top_k and min_p exclude at minus infinity."""
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
    """Samples by inverting the CDF: ids [A] and log-probs [A] from logits [A, V] and uniforms [A] in [0, 1).

    Sums are in float64, so that a vocabulary of 150,000 leaves no gap; a banned token's interval is empty. At
    temperature 0 the likeliest id, with log-prob 0.
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniforms, dtype=logits.dtype)
    logprobs = (logits / temperature).log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[-1] - 1)
    return ids[:, 0], logprobs.gather(-1, ids)[:, 0]


def _uniforms(sampling: Sampling, seed: int) -> torch.Tensor:
    """Random numbers of a prompt's group, [G, max_tokens]: one for each token index of a response, so that a
    continued response gets the same tokens as an uninterrupted one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sampling.group, sampling.max_tokens, generator=generator, dtype=torch.float64)
