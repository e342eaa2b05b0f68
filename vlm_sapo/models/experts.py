"""The routers of a mixture of experts: which experts they choose, and making them use others.

[L] tokens of a pass, its rows one after the other, [P] tokens of a prompt, [R] of a response, [K] response
tokens in all, [N, T] responses by tokens, [M] layers with experts, [E] experts, [k] experts of a token.

The experts of a response token are those at the position that predicts it, so that they stand beside its
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
from torch.nn.utils.rnn import pad_sequence

from vlm_sapo.types import Prompt

if TYPE_CHECKING:
    from vlm_sapo.models.packing import Inputs, Sizes

Output = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What a router returns: logits [L, E], weights [L, k] and indices [L, k] of the experts."""


class Routers:
    """The routers of a model, each known by its layer. A dense model has none, and then this is false.

    A hook on each tells the present Trace (if there is one) what the router chose, and returns what that
    makes of it. `recomputing` hands the trace of a pass on to its recomputation in the backward pass.
    """

    def __init__(self, model: nn.Module):
        self.present: ExpertTrace | None = None
        self.layers: list[int] = []
        for name, module in model.named_modules():
            children = dict(module.named_children())
            if {"gate", "experts"} <= children.keys():
                place, layer = len(self.layers), int(re.search(r"layers\.(\d+)\.", name)[1])
                children["gate"].register_forward_hook(
                    lambda _, inputs, output, place=place: self.present and self.present(place, output)
                )
                self.layers.append(layer)

    def __bool__(self) -> bool:
        return bool(self.layers)

    @contextmanager
    def recording(self, trace: ExpertTrace | None) -> Iterator[None]:
        """The trace is the present one within the block."""
        before, self.present = self.present, trace
        try:
            yield
        finally:
            self.present = before

    def recomputing(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """The contexts of a checkpointed layer and of its recomputation (`context_fn` of torch's
        checkpoint)."""
        return nullcontext(), self.recording(self.present and self.present.again())

    def watch(self, inputs: Inputs, replayed: ExpertRoutes | None, *, gradient: bool) -> RoutedPass | None:
        """A pass that follows the given routes, or chooses by itself; None in a dense model."""
        return RoutedPass(inputs, replayed, gradient=gradient) if self else None


class ExpertTrace:
    """Records the experts that each router chooses for the tokens of one pass."""

    def __init__(self):
        self.chosen: dict[int, torch.Tensor] = {}

    def __call__(self, place: int, output: Output) -> Output | None:
        logits, _, experts = output
        self.chosen[place] = experts.to(torch.uint8 if logits.shape[-1] <= 256 else torch.int16)
        return None

    def experts(self) -> torch.Tensor:
        """[L, M, k] uint8, int16 where there are more than 256 experts."""
        return torch.stack([self.chosen[place] for place in sorted(self.chosen)], dim=1)


@dataclass(frozen=True)
class ExpertRoutes:
    """The experts that N responses and their prompts had."""

    responses: torch.Tensor
    """[N, T, M, k] uint8 or int16."""
    prompts: dict[Prompt, torch.Tensor]
    """[P, M, k] by prompt."""

    def __getitem__(self, rows) -> ExpertRoutes:
        """The routes of some responses, `rows` being any index of their tensor."""
        return ExpertRoutes(self.responses[rows], self.prompts)

    @classmethod
    def reported(cls, rows: list[tuple[Prompt, torch.Tensor]]) -> ExpertRoutes:
        """From each response's prompt and the experts [P + R - 1, M, k] that an engine reported for both."""
        responses = [experts[len(prompt.ids) - 1 :] for prompt, experts in rows]
        prompts = {prompt: experts[: len(prompt.ids)] for prompt, experts in rows}
        return cls(pad_sequence(responses, batch_first=True), prompts)

    @classmethod
    def scatter(
        cls, parts: list[tuple[torch.Tensor, ExpertRoutes]], mask: torch.Tensor
    ) -> ExpertRoutes | None:
        """Those of the rows [n] of each part, among as many and as long responses as `mask` [N, T] has; None
        where there is no part."""
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
        """Those of several batches, one after the other, of so many rows each; zeros where they aren't
        known, and None where none are."""
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
        """[tokens, M, k] of what predicts the tokens at `where`, [N, T] bool."""
        return self.responses[:, : where.shape[1]][where.cpu()]

    def laid_out(self, inputs: Inputs) -> torch.Tensor:
        """[L, M, k] int16 for the rows of a pass; -1 where nothing is known, on padding and behind the last
        prediction."""
        size = (inputs.ids.numel(), *self.responses.shape[2:])
        laid = torch.full(size, -1, dtype=torch.int16, device=inputs.ids.device)
        laid[inputs.predicting] = self.of(inputs.response_mask).to(laid)
        # Afterwards: branches of a packed row share the prompt's last token, which has one set of experts.
        laid[inputs.prompting] = torch.cat([self.prompts[prompt] for prompt in inputs.prompts]).to(laid)
        return laid


@dataclass(frozen=True)
class ExpertUsage:
    """How N responses used their experts: sums over their tokens, float32."""

    probabilities: torch.Tensor
    """[N, M, E] of the routers, in training with their gradient."""
    counts: torch.Tensor
    """[N, M, E] tokens for which an expert is among the k likeliest, whether it was used or others were."""
    entropy: torch.Tensor
    """[N] of the routers' distributions, mean over the layers."""
    changed: torch.Tensor | None
    """[N] share of the layers whose k likeliest experts are others than before; None where those aren't
    known."""

    def to_cpu(self, rows: torch.Tensor) -> ExpertUsage:
        """That of some responses, [N] bool, in host memory and without gradients."""
        kept = {
            name: None if value is None else value.detach()[rows].cpu() for name, value in vars(self).items()
        }
        return ExpertUsage(**kept)


class RoutedPass(ExpertTrace):
    """One training pass: what its routers choose, and the routes that they are made to follow instead.

    A followed expert's weight is the present router's, normalised over the followed experts, so the router
    has its gradient. `gradient` lets it also flow through the usage.
    """

    def __init__(self, inputs: Inputs, replayed: ExpertRoutes | None, *, gradient: bool):
        super().__init__()
        self.inputs, self.gradient = inputs, gradient
        self.replayed = None if replayed is None else replayed.laid_out(inputs)
        self.row = inputs.sampled_mask.nonzero()[:, 0]  # [S] the response that a sampled token is in
        self.sums: dict[int, tuple[torch.Tensor, ...]] = {}

    def again(self) -> RoutedPass:
        """The same for the recomputation, which must do the same, and whose records nobody keeps."""
        other = copy.copy(self)
        other.chosen, other.sums = {}, {}
        return other

    def __call__(self, place: int, output: Output) -> Output | None:
        super().__call__(place, output)
        logits, weights, experts = output
        self.sums[place] = self._sum(logits, experts)
        if self.replayed is None:
            return None
        followed = self.replayed[:, place].long()
        followed = torch.where(followed < 0, experts, followed)
        return logits, gate_weights(logits, followed).to(weights.dtype), followed

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
        """What the routers chose, in host memory."""
        experts, where = self.experts(), self.inputs.response_mask
        responses = experts.new_zeros(*where.shape, *experts.shape[1:])
        responses[where] = experts[self.inputs.predicting]
        sizes = [len(prompt.ids) for prompt in self.inputs.prompts]
        prompts = experts[self.inputs.prompting].cpu().split(sizes)
        return ExpertRoutes(responses.cpu(), dict(zip(self.inputs.prompts, prompts, strict=True)))

    def usage(self, before: ExpertRoutes | None) -> ExpertUsage:
        """How the experts were used, and what changed since `before`."""
        sums, counts, entropies = zip(*(self.sums[place] for place in sorted(self.sums)), strict=True)
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
    """Weights [L, k] float32 of the given experts: the router's probabilities, normalised over them."""
    chosen = logits.softmax(-1, dtype=torch.float32).gather(-1, experts)
    return chosen / chosen.sum(-1, keepdim=True)


class ExpertRecorder:
    """Records the experts of a batch that is being generated: of prompts, and of branches that are at most
    `longest` tokens long."""

    def __init__(self, routers: Routers, longest: int):
        self.routers, self.longest = routers, longest

    @contextmanager
    def prefill(
        self, sizes: list[Sizes], sources: list[int], where: torch.Tensor | None = None
    ) -> Iterator[None]:
        """The block reads prompts with their responses so far, of these sizes: a row for each response, or
        one for a prompt without. `sources` is the row of each branch. `where` are the indices of their tokens
        in the flattened rows; None where there is nothing between them."""
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
        """The block reads the tokens [A] of the branches [A], of index `steps` [A] in their responses."""
        trace = ExpertTrace()
        with self.routers.recording(trace):
            yield
        self.responses[branch, steps] = trace.experts()

    def experts(self, branch: int, length: int) -> torch.Tensor:
        """[P + R - 1, M, k] of a prompt and its response of R = `length` tokens."""
        response = self.responses[branch, : length - 1].cpu()
        return torch.cat([self.prompts[branch], response])


class NullRecorder:
    """Records nothing."""

    def prefill(
        self, sizes: list[Sizes], sources: list[int], where: torch.Tensor | None = None
    ) -> AbstractContextManager:
        return nullcontext()

    def decode(self, branch: torch.Tensor, steps: torch.Tensor) -> AbstractContextManager:
        return nullcontext()

    def experts(self, branch: int, length: int) -> None:
        return None
