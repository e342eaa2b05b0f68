"""Scored groups to mini-batches (one optimizer update each) and micro-batches (one pass through the model
each)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from vlm_sapo.distributed import World
from vlm_sapo.models.experts import ExpertRoutes, Usage
from vlm_sapo.models.packing import GroupSlice, Layout
from vlm_sapo.types import Group, Prompt, Response


@dataclass
class MicroBatch:
    """N responses that go through the model at once."""

    groups: list[GroupSlice]
    """Prompts with the responses that are here, N in all."""
    advantages: torch.Tensor
    """[N, 1] float32."""
    mask: torch.Tensor
    """[N, T] bool, on response tokens."""
    sampled: torch.Tensor
    """[N, T] float32, the engine's log-probs; 0 where the mask is off."""
    old: torch.Tensor | None = None
    """[N, T] float32, log-probs before the update. None on policy: the pass's own are the old ones."""
    reference: torch.Tensor | None = None
    """[N, T] float32, log-probs of the reference model, where there is one."""
    routes: ExpertRoutes | None = None
    """The experts before the update, or the engine's, where they are known."""
    usage: Usage | None = None
    """How the last pass used the experts of a mixture."""

    def within(self, budget: int, layout: Layout) -> list[MicroBatch]:
        """The same responses in parts of at most so many tokens, or of one response."""
        count = len(self.mask)
        if layout.size(self.groups) <= budget or count == 1:
            return [self]
        return [
            part
            for half in (self._rows(0, count // 2), self._rows(count // 2, count))
            for part in half.within(budget, layout)
        ]

    def _rows(self, start: int, end: int) -> MicroBatch:
        rows = [(prompt, response) for prompt, responses in self.groups for response in responses][start:end]
        groups: list[GroupSlice] = []
        for prompt, response in rows:
            if not groups or groups[-1][0] is not prompt:
                groups.append((prompt, []))
            groups[-1][1].append(response)
        width = max(len(response) for _, response in rows)
        chosen = {
            name: value[start:end, : 1 if name == "advantages" else width]
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        if self.old is self.sampled:
            chosen["old"] = chosen["sampled"]
        routes = None if self.routes is None else self.routes[start:end]
        return MicroBatch(groups=groups, routes=routes, **chosen)

    def tensors(self) -> dict[str, Any]:
        """What the step's metrics are computed from, beside the new log-probs."""
        return {
            "responses": [response for _, responses in self.groups for response in responses],
            "old": self.old,
            "reference": self.reference,
            "advantages": self.advantages,
            "mask": self.mask,
            "sampled": None if self.old is self.sampled else self.sampled,
            "usage": self.usage,
        }


@dataclass
class MiniBatch:
    """This process's micro-batches of one optimizer update, and the denominators of all processes' loss."""

    micros: list[MicroBatch]
    num_sequences: int
    num_tokens: int
    index: int = 0

    @property
    def denominators(self) -> dict[str, int]:
        return {"num_sequences": self.num_sequences, "num_tokens": self.num_tokens}


def minibatches(
    groups: list[Group],
    advantages: list[torch.Tensor],
    *,
    count: int,
    layout: Layout,
    budget: int,
    mask_truncated: bool = False,
    keep_flat: bool = False,
    world: World | None = None,
) -> list[MiniBatch]:
    """Splits groups (with their [G] advantages) into `count` mini-batches of whole groups.

    Groups without variance stay in the denominators and reach the model only with `keep_flat`, which a KL
    term needs. With `mask_truncated`, responses that hit the length limit leave both the loss and the
    denominators. `budget` is in tokens of a micro-batch, which `layout` fills. Every process of `world` has
    equally many micro-batches of a mini-batch; where groups are wanting, ones that add nothing.
    """
    size = len(groups) // count
    batches = []
    for index in range(count):
        chosen = slice(index * size, (index + 1) * size)
        rows = [
            _Rows(group, values.tolist(), mask_truncated)
            for group, values in zip(groups[chosen], advantages[chosen], strict=True)
        ]
        counted = [completion for row in rows for completion in row.responses]
        trained = [row for row in rows if row.responses and (keep_flat or any(row.weights))]
        batches.append(
            MiniBatch(
                micros=_microbatches(trained, layout, budget),
                num_sequences=len(counted),
                num_tokens=sum(len(completion.ids) for completion in counted),
                index=index,
            )
        )
    _align(batches, groups, world or World())
    return batches


def _align(batches: list[MiniBatch], groups: list[Group], world: World) -> None:
    """Makes denominators those of all processes, and the micro-batches equally many."""
    told = world.all_gather([(len(item.micros), item.num_sequences, item.num_tokens) for item in batches])
    shortest = min(groups, key=lambda group: len(group.prompt.ids))
    for batch, counts in zip(batches, zip(*told, strict=True), strict=True):
        most, sequences, tokens = zip(*counts, strict=True)
        batch.num_sequences, batch.num_tokens = max(sum(sequences), 1), max(sum(tokens), 1)
        batch.micros += [_idle(shortest) for _ in range(max(most) - len(batch.micros))]


def _idle(group: Group) -> MicroBatch:
    """A micro-batch that adds nothing to loss and gradient."""
    nothing = torch.zeros(1, 1)
    first = group.responses[0].ids[:1]
    return MicroBatch([(group.prompt, [first])], nothing, nothing.bool(), nothing)


class _Rows:
    """A group's responses that count, with their advantages."""

    def __init__(self, group: Group, advantages: list[float], mask_truncated: bool):
        kept = [
            (completion, value)
            for completion, value in zip(group.responses, advantages, strict=True)
            if not (mask_truncated and completion.finish == "length")
        ]
        self.prompt: Prompt = group.prompt
        self.responses: list[Response] = [completion for completion, _ in kept]
        self.weights = [value for _, value in kept]


def _microbatches(rows: list[_Rows], layout: Layout, budget: int) -> list[MicroBatch]:
    sizes = [(len(row.prompt.ids), [len(item.ids) for item in row.responses]) for row in rows]
    micros = []
    for parts in layout.pack(sizes, budget):
        chosen = [(rows[group], place) for group, places in parts for place in places]
        completions = [row.responses[place] for row, place in chosen]
        lengths = torch.tensor([[len(completion.ids)] for completion in completions])
        micros.append(
            MicroBatch(
                groups=[
                    (rows[group].prompt, [rows[group].responses[place].ids for place in places])
                    for group, places in parts
                ],
                advantages=torch.tensor([[row.weights[place]] for row, place in chosen]),
                mask=torch.arange(int(lengths.max())) < lengths,
                sampled=pad_sequence([item.logprobs for item in completions], batch_first=True),
                routes=_reported([(row.prompt, row.responses[place]) for row, place in chosen]),
            )
        )
    return micros


def _reported(rows: list[tuple[Prompt, Response]]) -> ExpertRoutes | None:
    """The experts of the responses, where the engine told them."""
    known = [(prompt, item.experts) for prompt, item in rows if item.experts is not None]
    return ExpertRoutes.reported(known) if known else None
