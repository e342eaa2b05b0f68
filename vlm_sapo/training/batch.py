"""A step's groups to one batch, to mini-batches (one optimizer update each) and to micro-batches (one pass
through the model each).

[N] responses, [T] tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn.utils.rnn import pad_sequence

from vlm_sapo.distributed import World
from vlm_sapo.models.experts import ExpertRoutes
from vlm_sapo.models.packing import GroupSlice, Layout
from vlm_sapo.types import Group


@dataclass(frozen=True)
class MicroBatch:
    """N responses that go through the model at once."""

    groups: list[GroupSlice]
    """Prompts with the responses that are here, N in all."""
    rows: torch.Tensor
    """[N] int64, the row of each response in its mini-batch."""
    mask: torch.Tensor
    """[N, T] bool, on the tokens that count."""
    advantages: torch.Tensor
    """[N, T] float32."""
    sampled: torch.Tensor
    """[N, T] float32, the engine's log-probs; 0 where the mask is off."""
    old: torch.Tensor | None = None
    """[N, T] float32, log-probs before the update. None where the pass that updates gives its own."""
    reference: torch.Tensor | None = None
    """[N, T] float32, log-probs of the reference model, where there is one."""
    prepared: torch.Tensor | None = None
    """[N, T], what the objective prepared for the mini-batch, where it does."""
    routes: ExpertRoutes | None = None
    """The experts before the update, or the engine's, where they are known."""

    def to(self, device: torch.device) -> MicroBatch:
        names = ("mask", "advantages", "sampled", "old", "reference", "prepared")
        tensors = {name: vars(self)[name] for name in names}
        return replace(self, **{name: item.to(device) for name, item in tensors.items() if item is not None})


@dataclass(frozen=True)
class Batch:
    """This process's responses of a step, or of a mini-batch of it. A later stage returns a new one."""

    groups: tuple[Group, ...]
    mask: torch.Tensor
    """[N, T] bool, true on the tokens that count: the policy's, in a response that isn't left out."""
    sampled: torch.Tensor
    """[N, T] float32, the engine's log-probs; 0 where the mask is off."""
    num_sequences: int
    """Responses that count, of all processes: with `num_tokens` the denominators of the loss."""
    num_tokens: int
    rewards: torch.Tensor | None = None
    """[N] float64; None for demonstrations."""
    on_policy: torch.Tensor | None = None
    """[N] bool, set with `old`: the pass that updates gives these rows' old log-probs itself, since it runs
    on the weights that sampled them."""
    old: torch.Tensor | None = None
    """[N, T] float32, log-probs before the update; the engine's where `on_policy`."""
    reference: torch.Tensor | None = None
    """[N, T] float32, log-probs of the reference model, where there is one."""
    advantages: torch.Tensor | None = None
    """[N, T] float64; may hold anything where the mask is off."""
    routes: ExpertRoutes | None = None
    """The experts before the update, where `score` recorded or an engine reported them."""
    prepared: torch.Tensor | None = None
    """[N, T], what the objective prepared for the mini-batch, where it does."""
    keep_zero_advantages: bool = False
    """Whether groups without an advantage go through the model as well, as a KL term needs."""
    rewards_decide: bool = True
    """Whether a group whose rewards are all equal will have no advantage."""
    counts: tuple[tuple[int, int], ...] = ()
    """Responses and tokens that count in each mini-batch, of all processes."""

    @cached_property
    def sizes(self) -> list[int]:
        """Responses of each group."""
        return [len(group.responses) for group in self.groups]

    @cached_property
    def trained(self) -> list[bool]:
        """Which groups go through the model: those with a token that counts and, once there are advantages,
        with one that isn't zero."""
        rows = self.mask.any(1)
        parts = rows.split(self.sizes)
        if self.advantages is not None and not self.keep_zero_advantages:
            parts = (self.mask & (self.advantages != 0)).any(1).split(self.sizes)
        elif self.rewards_decide and not self.keep_zero_advantages:
            parts = [part & (not group.zero_variance) for part, group in zip(parts, self.groups, strict=True)]
        return [bool(part.any()) for part in parts]

    @property
    def trained_mask(self) -> torch.Tensor:
        """[N, T] bool, true on the tokens that count of the groups that go through the model."""
        rows = torch.tensor(self.trained).repeat_interleave(torch.tensor(self.sizes))
        return self.mask & rows[:, None]

    def replace(self, **fields: object) -> Batch:
        """The same with fields that a stage computed."""
        return replace(self, **fields)

    def mean_advantages(self) -> list[list[float]]:
        """By group, the advantage of each response; where it differs by token, the mean."""
        means = []
        for values, mask in zip(self.advantages, self.mask, strict=True):
            own = values[mask] if mask.any() else values[:1]
            means.append(float(own[0]) if bool((own == own[0]).all()) else float(own.mean()))
        return [part.tolist() for part in torch.tensor(means, dtype=torch.float64).split(self.sizes)]

    def split(self) -> list[Batch]:
        """The mini-batches, of equally many groups, in order; each with the denominators of its update."""
        size = len(self.groups) // len(self.counts)
        starts = [sum(self.sizes[: index * size]) for index in range(len(self.counts) + 1)]
        parts = []
        for index, counts in enumerate(self.counts):
            part = self._rows(slice(starts[index], starts[index + 1]))
            groups = self.groups[index * size : (index + 1) * size]
            sequences, tokens = (max(count, 1) for count in counts)
            parts.append(
                replace(part, groups=groups, num_sequences=sequences, num_tokens=tokens, counts=(counts,))
            )
        return parts

    def _rows(self, rows: slice) -> Batch:
        tensors = {name: item[rows] for name, item in vars(self).items() if isinstance(item, torch.Tensor)}
        return replace(self, **tensors, routes=None if self.routes is None else self.routes[rows])

    def fit(self, budget: int, layout: Layout) -> list[MicroBatch]:
        """Micro-batches of at most `budget` tokens, of the groups that are trained."""
        starts = torch.tensor([0, *self.sizes]).cumsum(0).tolist()
        slices, indices = [], []
        for start, group, trained in zip(starts, self.groups, self.trained, strict=False):
            rows = [row for row in range(len(group.responses)) if trained and self.mask[start + row].any()]
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
        """The engine's, where it reported them, else those of the pass that gave the old log-probs."""
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
        """A micro-batch that adds nothing to loss and gradient, for processes that must run equally many."""
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
    """One batch of all groups, in the order of their mini-batches.

    With `mask_truncated`, responses that hit the length limit leave both the loss and the denominators, which
    are counted over all processes of `world`.
    """
    world = world or World()
    responses = [response for group in groups for response in group.responses]
    left_out = [mask_truncated and response.finish == "length" for response in responses]
    masks = [response.mask & (not out) for response, out in zip(responses, left_out, strict=True)]
    mask = pad_sequence(masks, batch_first=True)
    parts = mask.split(_responses_by_minibatch(groups, minibatches))
    counts = [(int(part.any(1).sum()), int(part.sum())) for part in parts]
    by_minibatch = zip(*world.all_gather(counts), strict=True)
    totals = tuple((sum(item[0] for item in ours), sum(item[1] for item in ours)) for ours in by_minibatch)
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
    )


def _responses_by_minibatch(groups: Sequence[Group], minibatches: int) -> list[int]:
    size = len(groups) // minibatches
    return [
        sum(len(group.responses) for group in groups[index * size : (index + 1) * size])
        for index in range(minibatches)
    ]
