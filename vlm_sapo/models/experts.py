"""MoE routers: recording which experts they select, and replaying recorded ones.

[L] tokens of a pass, its rows flattened, [P] tokens of a prompt, [R] of a response, [K] response tokens in
all, [S] of them sampled, [N, T] responses by tokens, [M] MoE layers, [E] experts, [k] experts per token.

The experts of a response token are those at the position that predicts it, so that they are aligned with its
log-prob; the last token of a response predicts nothing.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from vlm_sapo.types import Prompt

if TYPE_CHECKING:
    from vlm_sapo.models.packing import Inputs, Sizes

Output = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What a router returns: logits [L, E], weights [L, k] and indices [L, k] of the experts."""


class Routers:
    """The routers of a model; false for a dense model, which has none.

    Forward hooks record each router's top-k experts in the active ExpertTrace and, under replay, replace
    them. `layers` are the indices of the decoder layers that have a router. `recomputing` passes the trace on
    to the recomputation of a checkpointed layer in the backward pass.
    """

    def __init__(self, model: nn.Module):
        self.active: ExpertTrace | None = None
        self.layers: list[int] = []
        for name, module in model.named_modules():
            children = dict(module.named_children())
            if {"gate", "experts"} <= children.keys():
                index, layer = len(self.layers), int(re.search(r"layers\.(\d+)\.", name)[1])
                children["gate"].register_forward_hook(
                    lambda _, inputs, output, index=index: self.active and self.active(index, output)
                )
                self.layers.append(layer)

    def __bool__(self) -> bool:
        return bool(self.layers)

    @contextmanager
    def recording(self, trace: ExpertTrace | None) -> Iterator[None]:
        """Makes the trace the active one within the block."""
        before, self.active = self.active, trace
        try:
            yield
        finally:
            self.active = before

    def recomputing(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """The contexts of a checkpointed layer and of its recomputation (`context_fn` of torch's
        checkpoint)."""
        return nullcontext(), self.recording(self.active and self.active.for_recomputation())

    def watch(self, inputs: Inputs, replayed: ExpertRoutes | None, *, gradient: bool) -> RoutedPass | None:
        """Records a training pass, with the replayed routes if any; None for a dense model."""
        return RoutedPass(inputs, replayed, gradient=gradient) if self else None


class ExpertTrace:
    """Records the experts that each router selects for the tokens of a pass, or of several in turn."""

    def __init__(self):
        self.by_layer: dict[int, list[torch.Tensor]] = {}

    def __call__(self, layer: int, output: Output) -> Output | None:
        logits, _, experts = output
        narrow = experts.to(torch.uint8 if logits.shape[-1] <= 256 else torch.int16)
        self.by_layer.setdefault(layer, []).append(narrow)
        return None

    def experts(self) -> torch.Tensor:
        """[L, M, k] uint8, or int16 for more than 256 experts."""
        return torch.stack([torch.cat(self.by_layer[layer]) for layer in sorted(self.by_layer)], dim=1)


@dataclass(frozen=True)
class ExpertRoutes:
    """The experts that were selected for N responses and their prompts."""

    responses: torch.Tensor
    """[N, T, M, k] uint8 or int16."""
    prompts: dict[Prompt, torch.Tensor]
    """[P, M, k] by prompt."""

    def __getitem__(self, rows) -> ExpertRoutes:
        """The routes of some responses; `rows` is any index into the first dimension."""
        return ExpertRoutes(self.responses[rows], self.prompts)

    def of_prompt(self, prompt: Prompt, other: Prompt, width: int) -> ExpertRoutes:
        """The routes of one prompt, for a copy of it, and of its responses' first `width` tokens."""
        prompts = {other: self.prompts[prompt]} if prompt in self.prompts else {}
        return ExpertRoutes(self.responses[:, :width], prompts)

    def padded(self, width: int) -> ExpertRoutes:
        """With `width` tokens for each response."""
        return ExpertRoutes(
            pad(self.responses, (0, 0, 0, 0, 0, width - self.responses.shape[1])), self.prompts
        )

    @classmethod
    def reported(cls, rows: list[tuple[Prompt, torch.Tensor]]) -> ExpertRoutes:
        """From pairs of a prompt and the experts [P + R - 1, M, k] that an engine reported for it and one
        response."""
        responses = [experts[len(prompt.ids) - 1 :] for prompt, experts in rows]
        prompts = {prompt: experts[: len(prompt.ids)] for prompt, experts in rows}
        return cls(pad_sequence(responses, batch_first=True), prompts)

    @classmethod
    def scatter(
        cls, parts: list[tuple[torch.Tensor, ExpertRoutes]], mask: torch.Tensor
    ) -> ExpertRoutes | None:
        """Merges parts, given as (rows, routes): `rows` [n] are the responses' indices in `mask` [N, T],
        or -1 to leave one out. None without parts."""
        if not parts:
            return None
        first = parts[0][1].responses
        responses = first.new_zeros(*mask.shape, *first.shape[2:])
        for rows, routes in parts:
            real = rows.cpu() >= 0
            responses[rows.cpu()[real], : routes.responses.shape[1]] = routes.responses[real]
        return cls(responses, {prompt: own for _, part in parts for prompt, own in part.prompts.items()})

    @classmethod
    def join(cls, parts: list[tuple[int, ExpertRoutes | None]]) -> ExpertRoutes | None:
        """Concatenates batches, given as (rows, routes): zeros for a batch without routes, None if no batch
        has any."""
        known = [routes for _, routes in parts if routes is not None]
        if not known:
            return None
        empty = known[0].responses[:0]
        responses = [
            empty.new_zeros(count, *empty.shape[1:]) if routes is None else routes.responses
            for count, routes in parts
        ]
        prompts = {prompt: own for routes in known for prompt, own in routes.prompts.items()}
        return cls(torch.cat(responses), prompts)

    def of(self, where: torch.Tensor) -> torch.Tensor:
        """[tokens, M, k] at the positions that predict the tokens at `where`, [N, T] bool."""
        return self.responses[:, : where.shape[1]][where.cpu()]

    def laid_out(self, inputs: Inputs) -> torch.Tensor:
        """[L, M, k] int16 for the rows of a pass; -1 where there is no route: on padding and after the last
        prediction."""
        size = (inputs.ids.numel(), *self.responses.shape[2:])
        laid = torch.full(size, -1, dtype=torch.int16, device=inputs.ids.device)
        laid[inputs.predicting] = self.of(inputs.response_mask).to(laid)
        # Set last: branches of a packed row share the prompt's last token, which has one set of experts.
        laid[inputs.prompting] = torch.cat([self.prompts[prompt] for prompt in inputs.prompts]).to(laid)
        return laid


@dataclass(frozen=True)
class ExpertUsage:
    """How N responses used the experts: float32 sums over their tokens."""

    probabilities: torch.Tensor
    """[N, M, E] of the routers; with their gradient if the loss needs it."""
    counts: torch.Tensor
    """[N, M, E] tokens for which an expert is in the router's top k, also if replay used other experts."""
    entropy: torch.Tensor
    """[N] entropy of the routers' distributions, mean over the layers."""
    changed: torch.Tensor | None
    """[N] share of the layers whose top-k experts differ from before; None if those aren't known."""

    def to_cpu(self, rows: torch.Tensor) -> ExpertUsage:
        """The usage of some responses, [N] bool, in host memory and without gradients."""
        fields = {
            name: None if value is None else value.detach()[rows].cpu() for name, value in vars(self).items()
        }
        return ExpertUsage(**fields)


class RoutedPass(ExpertTrace):
    """Records the routers in one training pass and, under replay, makes them use the `replayed` experts.

    The weights of replayed experts come from the current router, normalised over them, so that gradients
    reach the router. With `gradient` they also flow through the usage (for a balance loss).
    """

    def __init__(self, inputs: Inputs, replayed: ExpertRoutes | None, *, gradient: bool):
        super().__init__()
        self.inputs, self.gradient = inputs, gradient
        self.replayed = None if replayed is None else replayed.laid_out(inputs)
        self.row = inputs.sampled_mask.nonzero()[:, 0]  # [S] row of each sampled token's response
        self.sums: dict[int, tuple[torch.Tensor, ...]] = {}

    def for_recomputation(self) -> RoutedPass:
        """A copy for the recomputation, which must replay the same experts; its records are dropped."""
        other = copy.copy(self)
        other.by_layer, other.sums = {}, {}
        return other

    def __call__(self, layer: int, output: Output) -> Output | None:
        super().__call__(layer, output)
        logits, weights, experts = output
        self.sums[layer] = self._sum(logits, experts)
        if self.replayed is None:
            return None
        replayed = self.replayed[:, layer].long()
        replayed = torch.where(replayed < 0, experts, replayed)
        return logits, gate_weights(logits, replayed).to(weights.dtype), replayed

    def _sum(self, logits: torch.Tensor, experts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Probabilities [N, E], counts [N, E] and entropies [N] of a layer, summed by response."""
        before, responses = self.inputs.scoring, len(self.inputs.response_mask)
        with torch.set_grad_enabled(self.gradient and torch.is_grad_enabled()):
            probabilities = logits[before].softmax(-1, dtype=torch.float32)  # [S, E]
            empty = probabilities.new_zeros(responses, logits.shape[-1])
            sums = empty.index_add(0, self.row, probabilities)
        with torch.no_grad():
            counts = empty.index_add(
                0, self.row, torch.zeros_like(probabilities).scatter(1, experts[before], 1)
            )
            entropies = torch.special.entr(probabilities).sum(-1)
            return sums, counts, empty[:, 0].index_add(0, self.row, entropies)

    def routes(self) -> ExpertRoutes:
        """The experts of this pass, in host memory."""
        experts, where = self.experts(), self.inputs.response_mask
        responses = experts.new_zeros(*where.shape, *experts.shape[1:])
        responses[where] = experts[self.inputs.predicting]
        sizes = [len(prompt.ids) for prompt in self.inputs.prompts]
        prompts = experts[self.inputs.prompting].cpu().split(sizes)
        return ExpertRoutes(responses.cpu(), dict(zip(self.inputs.prompts, prompts, strict=True)))

    def usage(self, before: ExpertRoutes | None) -> ExpertUsage:
        """How the experts were used, and which selections changed since `before`."""
        sums, counts, entropies = zip(*(self.sums[layer] for layer in sorted(self.sums)), strict=True)
        changed = None
        if before is not None:
            now = self.experts()[self.inputs.scoring]
            then = before.of(self.inputs.sampled_mask).to(now)
            other = (now.sort(-1).values != then.sort(-1).values).any(-1).float().mean(-1)  # [S]
            changed = other.new_zeros(len(self.inputs.response_mask)).index_add(0, self.row, other)
        return ExpertUsage(
            torch.stack(sums, 1), torch.stack(counts, 1), torch.stack(entropies).mean(0), changed
        )


def gate_weights(logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Weights [L, k] float32 of the experts [L, k]: the router's probabilities, normalised over them."""
    probabilities = logits.softmax(-1, dtype=torch.float32).gather(-1, experts)
    return probabilities / probabilities.sum(-1, keepdim=True)


class ExpertRecorder:
    """Records the experts during generation, for prompts and for branches of at most `longest` tokens."""

    def __init__(self, routers: Routers, longest: int):
        self.routers, self.longest = routers, longest

    @contextmanager
    def prefill(
        self, sizes: list[Sizes], sources: list[int], where: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Records the prefill in the block: prompts and their responses so far, of these sizes. Each response
        counts as a row, and so does a prompt without any; `sources` are the branches' rows. `where` are the
        tokens' indices in the flattened input, None if it has no padding."""
        trace = ExpertTrace()
        with self.routers.recording(trace):
            yield
        experts = trace.experts() if where is None else trace.experts()[where]
        pieces = iter(experts.split([length for prompt, lengths in sizes for length in (prompt, *lengths)]))
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        for _, lengths in sizes:
            prompt = next(pieces)
            rows += [(prompt.cpu(), next(pieces)) for _ in lengths] or [(prompt.cpu(), prompt[:0])]
        self.prompts = [rows[source][0] for source in sources]
        self.responses = experts.new_zeros(len(sources), self.longest, *experts.shape[1:])
        for branch, source in enumerate(sources):
            self.responses[branch, : len(rows[source][1])] = rows[source][1]

    @contextmanager
    def decode(self, branch: torch.Tensor, steps: torch.Tensor) -> Iterator[None]:
        """Records a decoding step in the block: one token per branch [A], at index `steps` [A] of its
        response."""
        trace = ExpertTrace()
        with self.routers.recording(trace):
            yield
        self.responses[branch, steps] = trace.experts()

    def experts(self, branch: int, length: int) -> torch.Tensor:
        """[P + R - 1, M, k] of a branch's prompt and its response of R = `length` tokens."""
        response = self.responses[branch, : length - 1].cpu()
        return torch.cat([self.prompts[branch], response])


class NullRecorder:
    """Stands in for ExpertRecorder where experts aren't recorded."""

    def prefill(
        self, sizes: list[Sizes], sources: list[int], where: torch.Tensor | None = None
    ) -> AbstractContextManager:
        return nullcontext()

    def decode(self, branch: torch.Tensor, steps: torch.Tensor) -> AbstractContextManager:
        return nullcontext()

    def experts(self, branch: int, length: int) -> None:
        return None
