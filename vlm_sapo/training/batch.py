"""A step's groups to one batch, to mini-batches (one optimizer update each) and to micro-batches (one pass
through the model each).

[N] responses, [T] tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from vlm_sapo.distributed import World
from vlm_sapo.models.experts import ExpertRoutes
from vlm_sapo.models.packing import GroupSlice, Layout
from vlm_sapo.types import Group, Origin


@dataclass(frozen=True)
class MicroBatch:
    """N responses of one pass through the model."""

    groups: list[GroupSlice]
    """Prompts with those of their responses that are in this micro-batch, N in all."""
    rows: torch.Tensor
    """[N] int64, the row of each response in its mini-batch."""
    mask: torch.Tensor
    """[N, T] bool, True on the tokens with a loss."""
    advantages: torch.Tensor
    """[N, T] float32."""
    sampled: torch.Tensor
    """[N, T] float32, the engine's log-probs; 0 where the mask is off."""
    old: torch.Tensor | None = None
    """[N, T] float32, log-probs before the update; None if the update's own pass gives them."""
    reference: torch.Tensor | None = None
    """[N, T] float32, log-probs of the reference model, if there is one."""
    prepared: torch.Tensor | None = None
    """[N, T], from the objective's `prepare` for the whole mini-batch, if it has one."""
    routes: ExpertRoutes | None = None
    """MoE experts of the engine, or of the pass before the update, if recorded."""

    def to(self, device: torch.device) -> MicroBatch:
        names = ("mask", "advantages", "sampled", "old", "reference", "prepared")
        tensors = {name: vars(self)[name] for name in names}
        return replace(self, **{name: item.to(device) for name, item in tensors.items() if item is not None})


@dataclass(frozen=True)
class Batch:
    """This process's responses of a step, or of one of its mini-batches. Later stages return a new batch."""

    groups: tuple[Group, ...]
    mask: torch.Tensor
    """[N, T] bool, True on the tokens with a loss: the policy's, except in excluded responses."""
    sampled: torch.Tensor
    """[N, T] float32, the engine's log-probs; 0 where the mask is off."""
    num_sequences: int
    """Responses with a loss, over all processes; with `num_tokens` the denominators of the loss."""
    num_tokens: int
    rewards: torch.Tensor | None = None
    """[N] float64; None for demonstrations."""
    on_policy: torch.Tensor | None = None
    """[N] bool, set with `old`: rows whose old log-probs the update's own pass gives, since it runs on the
    weights that sampled them."""
    old: torch.Tensor | None = None
    """[N, T] float32, log-probs before the update; the engine's where `on_policy`."""
    reference: torch.Tensor | None = None
    """[N, T] float32, log-probs of the reference model, if there is one."""
    advantages: torch.Tensor | None = None
    """[N, T] float64; may hold anything where the mask is off."""
    routes: ExpertRoutes | None = None
    """MoE experts before the update, if `score` recorded or an engine reported them."""
    prepared: torch.Tensor | None = None
    """[N, T], from the objective's `prepare` for the whole mini-batch, if it has one."""
    keep_zero_advantages: bool = False
    """Whether groups without an advantage are trained on too, as a KL term needs."""
    rewards_decide: bool = True
    """Whether equal rewards in a group mean zero advantages."""
    counts: tuple[tuple[int, int], ...] = ()
    """Responses and tokens with a loss in each mini-batch, over all processes."""
    group_counts: tuple[int, ...] = ()
    """Groups of this process in each mini-batch."""
    assigned: tuple[bool, ...] | None = None
    """Which groups this process trains on, once groups are assigned to processes: a part of a group can't
    say whether the group has a signal."""
    origins: tuple[Origin, ...] = ()
    """By response, once groups are assigned to processes."""

    @cached_property
    def sizes(self) -> list[int]:
        """Responses of each group."""
        return [len(group.responses) for group in self.groups]

    @cached_property
    def trained(self) -> list[bool]:
        """Which groups go through the model: those with a loss and, once there are advantages, with one that
        isn't zero."""
        if self.assigned is not None:
            return list(self.assigned)
        rows = self.mask.any(1)
        parts = rows.split(self.sizes)
        if self.advantages is not None and not self.keep_zero_advantages:
            parts = (self.mask & (self.advantages != 0)).any(1).split(self.sizes)
        elif self.rewards_decide and not self.keep_zero_advantages:
            parts = [part & (not group.zero_variance) for part, group in zip(parts, self.groups, strict=True)]
        return [bool(part.any()) for part in parts]

    @property
    def trained_mask(self) -> torch.Tensor:
        """[N, T] bool, True on the tokens with a loss in the groups that go through the model."""
        rows = torch.tensor(self.trained).repeat_interleave(torch.tensor(self.sizes))
        return self.mask & rows[:, None]

    def replace(self, **fields: object) -> Batch:
        """A copy with the fields that a stage computed."""
        return replace(self, **fields)

    def mean_advantages(self) -> list[list[float]]:
        """By group, each response's advantage: its mean over tokens."""
        means = []
        for values, mask in zip(self.advantages, self.mask, strict=True):
            own = values[mask] if mask.any() else values[:1]
            means.append(float(own[0]) if bool((own == own[0]).all()) else float(own.mean()))
        return [part.tolist() for part in torch.tensor(means, dtype=torch.float64).split(self.sizes)]

    def split(self) -> list[Batch]:
        """The mini-batches, in order, each with the denominators of its update."""
        parts, first, row = [], 0, 0
        for size, counts in zip(self.group_counts, self.counts, strict=True):
            groups = slice(first, first + size)
            rows = slice(row, row + sum(self.sizes[groups]))
            sequences, tokens = (max(count, 1) for count in counts)
            parts.append(
                replace(
                    self._rows(rows),
                    groups=self.groups[groups],
                    num_sequences=sequences,
                    num_tokens=tokens,
                    counts=(counts,),
                    group_counts=(size,),
                    assigned=None if self.assigned is None else self.assigned[groups],
                    origins=self.origins[rows],
                )
            )
            first, row = groups.stop, rows.stop
        return parts

    def remaining(self, rows: Mapping[int, Sequence[int]]) -> Batch:
        """The same responses, of which this process trains on these, by index of the group."""
        flags = [
            not trained or row in rows.get(index, ())
            for index, (trained, size) in enumerate(zip(self.trained, self.sizes, strict=True))
            for row in range(size)
        ]
        return replace(
            self,
            mask=self.mask & torch.tensor(flags)[:, None],
            assigned=tuple(index in rows for index in range(len(self.groups))),
        )

    def part(self, index: int, rows: Sequence[int]) -> Batch:
        """Some of the responses of one group, to be trained on by another process: without what training
        doesn't read."""
        group, first = self.groups[index], sum(self.sizes[:index])
        lean = group.for_training(rows)
        indices = torch.tensor([first + row for row in rows])
        width = max(len(response.ids) for response in lean.responses)
        part = self._rows(indices)
        tensors = {name: item[:, :width] for name, item in part.tensors().items() if item.dim() == 2}
        return replace(
            part,
            **tensors,
            groups=(lean,),
            routes=None if part.routes is None else part.routes.of_prompt(group.prompt, lean.prompt, width),
            group_counts=(1,),
            assigned=(True,),
            origins=tuple(self.origins[row] for row in indices),
        )

    def join(self, parts: Sequence[Batch], *, group_counts: Sequence[int]) -> Batch:
        """This batch with the groups of `parts` instead, `group_counts` of them in each mini-batch."""
        width = max(part.mask.shape[1] for part in parts)
        tensors = {}
        for name in self.tensors():
            items = [part.tensors()[name] for part in parts]
            padded = [pad(item, (0, width - item.shape[1])) if item.dim() == 2 else item for item in items]
            tensors[name] = torch.cat(padded)
        return replace(
            self,
            **tensors,
            groups=tuple(group for part in parts for group in part.groups),
            routes=ExpertRoutes.join(
                [(len(part.mask), part.routes and part.routes.padded(width)) for part in parts]
            ),
            group_counts=tuple(group_counts),
            assigned=tuple(flag for part in parts for flag in part.trained),
            origins=tuple(origin for part in parts for origin in part.origins),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields with a row for each response, by name; not the routes."""
        return {name: item for name, item in vars(self).items() if isinstance(item, torch.Tensor)}

    def _rows(self, rows: slice | torch.Tensor) -> Batch:
        tensors = {name: item[rows] for name, item in self.tensors().items()}
        return replace(self, **tensors, routes=None if self.routes is None else self.routes[rows])

    def fit(self, budget: int, layout: Layout) -> list[MicroBatch]:
        """Micro-batches of at most `budget` tokens, of the groups that are trained."""
        starts = torch.tensor([0, *self.sizes]).cumsum(0).tolist()
        counts = self.mask.any(1).tolist()
        slices, indices = [], []
        for start, group, trained in zip(starts, self.groups, self.trained, strict=False):
            rows = [row for row in range(len(group.responses)) if trained and counts[start + row]]
            if rows:
                slices.append(GroupSlice(group.prompt, tuple(group.responses[row] for row in rows)))
                indices.append([start + row for row in rows])
        micros = []
        for parts in layout.pack([item.sizes for item in slices], budget):
            groups = [
                GroupSlice(slices[group].prompt, tuple(slices[group].responses[row] for row in rows))
                for group, rows in parts
            ]
            micros.append(self._micro(groups, [indices[group][row] for group, rows in parts for row in rows]))
        return micros

    def _micro(self, groups: list[GroupSlice], rows: list[int]) -> MicroBatch:
        index = torch.tensor(rows)
        width = max(len(response.ids) for group in groups for response in group.responses)

        def cut(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values[index][:, :width]

        own = self.on_policy is None or bool(self.on_policy[index].all())
        mask, sampled, advantages = cut(self.mask), cut(self.sampled), cut(self.advantages)
        if advantages is None:
            advantages = torch.zeros_like(sampled)
        return MicroBatch(
            groups=groups,
            rows=index,
            mask=mask,
            advantages=torch.where(mask, advantages, 0.0).float(),
            sampled=sampled,
            old=None if own else cut(self.old),
            reference=cut(self.reference),
            prepared=cut(self.prepared),
            routes=self._routes(groups, index, on_policy=own),
        )

    def _routes(
        self, groups: list[GroupSlice], index: torch.Tensor, *, on_policy: bool
    ) -> ExpertRoutes | None:
        """The engine's experts if it reported them, else those of the pass that gave the old log-probs."""
        reported = [
            (group.prompt, response.experts)
            for group in groups
            for response in group.responses
            if response.experts is not None
        ]
        if reported:
            return ExpertRoutes.reported(reported)
        return None if self.routes is None or on_policy else self.routes[index]

    def idle(self) -> MicroBatch:
        """A micro-batch without loss and gradient, for processes that must run equally many passes."""
        shortest = min(self.groups, key=lambda group: len(group.prompt.ids))
        first = shortest.responses[0]
        response = replace(
            first,
            ids=first.ids[:1],
            mask=first.mask[:1],
            logprobs=first.logprobs[:1],
            positions=first.positions[:, :1],
            experts=None,
        )
        nothing = torch.zeros(1, 1)
        return MicroBatch(
            groups=[GroupSlice(shortest.prompt, (response,))],
            rows=torch.tensor([-1]),
            mask=nothing.bool(),
            advantages=nothing,
            sampled=nothing,
            reference=None if self.reference is None else nothing,
            prepared=None if self.prepared is None else nothing.to(self.prepared.dtype),
        )


def collate(
    groups: Sequence[Group],
    *,
    minibatches: int,
    mask_truncated: bool = False,
    keep_zero_advantages: bool = False,
    rewards_decide: bool = True,
    world: World | None = None,
) -> Batch:
    """Joins groups into a batch, in the order of their mini-batches.

    With `mask_truncated`, responses at the length limit are excluded from the loss and from its denominators,
    which are counted over all processes of `world`.
    """
    world = world or World()
    responses = [response for group in groups for response in group.responses]
    excluded = [mask_truncated and response.finish == "length" for response in responses]
    masks = [response.mask & (not skip) for response, skip in zip(responses, excluded, strict=True)]
    mask = pad_sequence(masks, batch_first=True)
    totals = _count(mask.split(_responses_by_minibatch(groups, minibatches)), world)
    rewards = [reward.total for group in groups for reward in group.rewards]
    return Batch(
        groups=tuple(groups),
        mask=mask,
        sampled=pad_sequence([response.logprobs for response in responses], batch_first=True),
        num_sequences=max(sum(sequences for sequences, _ in totals), 1),
        num_tokens=max(sum(tokens for _, tokens in totals), 1),
        rewards=torch.tensor(rewards, dtype=torch.float64) if rewards else None,
        keep_zero_advantages=keep_zero_advantages,
        rewards_decide=rewards_decide,
        counts=totals,
        group_counts=(len(groups) // minibatches,) * minibatches,
    )


def _count(masks: Sequence[torch.Tensor], world: World) -> tuple[tuple[int, int], ...]:
    """Responses and tokens with a loss in each mini-batch, over all processes."""
    counts = [(int(mask.any(1).sum()), int(mask.sum())) for mask in masks]
    by_minibatch = zip(*world.all_gather(counts), strict=True)
    return tuple((sum(item[0] for item in parts), sum(item[1] for item in parts)) for parts in by_minibatch)


def _responses_by_minibatch(groups: Sequence[Group], minibatches: int) -> list[int]:
    size = len(groups) // minibatches
    return [
        sum(len(group.responses) for group in groups[index * size : (index + 1) * size])
        for index in range(minibatches)
    ]
