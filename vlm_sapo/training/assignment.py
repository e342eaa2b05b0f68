"""Which process trains on which responses: groups move, so that each process has about as many tokens.

The process that sampled a group is its home. Groups without a signal are left out of the update and lengths
differ, so processes that train on their own groups wait for the busiest one. A mini-batch keeps its
responses; only the process that computes their share of the gradient changes, and gradients are summed over
processes.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vlm_sapo.distributed import World
from vlm_sapo.models.packing import Layout
from vlm_sapo.training.batch import Batch

TOLERANCE = 1.05
"""Tokens of the busiest process over the mean below which nothing more is moved."""
PRECISION = 0.01
"""Of the limit that is searched for, as a share of the mean."""


@dataclass(frozen=True)
class GroupCost:
    """The tokens that go through the model for a group's responses."""

    home: int
    """The process that sampled it."""
    index: int
    """Its index in its home's mini-batch."""
    once: int
    """Tokens for each process that has responses of it: a shared prompt's."""
    responses: Mapping[int, int]
    """Tokens for each response that is trained on, by its index in the group."""

    def total(self, rows: Sequence[int] | None = None) -> int:
        """Tokens of a process with these responses, by default all."""
        return self.once + sum(self.responses[row] for row in (self.responses if rows is None else rows))


@dataclass(frozen=True)
class Assignment:
    """The processes that train on the responses of a mini-batch."""

    groups: Sequence[GroupCost]
    rows: list[dict[int, list[int]]]
    """By process: by index in `groups`, the responses that it trains on."""

    def of(self, process: int) -> Iterator[tuple[GroupCost, list[int]]]:
        """The groups and responses of a process."""
        return ((self.groups[index], rows) for index, rows in sorted(self.rows[process].items()))

    @property
    def loads(self) -> list[int]:
        """Tokens of each process; those of a prompt count for each process that has responses to it."""
        processes = range(len(self.rows))
        return [sum(group.total(rows) for group, rows in self.of(process)) for process in processes]

    @property
    def has_moves(self) -> bool:
        processes = range(len(self.rows))
        return any(group.home != process for process in processes for group, _ in self.of(process))


def assign(groups: Sequence[GroupCost], hosts: Sequence[str]) -> Assignment:
    """Assigns the responses of a mini-batch to processes; `hosts` has the host of each process.

    Looks for the lowest limit of tokens under which all fit, longest processing time first. A group stays at
    home while there is room, else moves, within its host if possible; one that fits nowhere is split. The
    same arguments give the same result, so that all processes agree.
    """
    best = Assignment(groups, [{} for _ in hosts])
    for index, group in enumerate(groups):
        best.rows[group.home][index] = list(group.responses)
    mean = sum(best.loads) / len(hosts)
    low, high = TOLERANCE * mean, float(max(best.loads))
    limit = low
    while limit < high and high - low >= PRECISION * mean:
        packing = _Packing(groups, hosts, limit)
        if packing.pack():
            best, high = Assignment(groups, packing.rows), limit
        else:
            low = limit
        limit = (low + high) / 2
    return best


class _Packing:
    """An attempt to assign groups with at most `limit` tokens for each process."""

    def __init__(self, groups: Sequence[GroupCost], hosts: Sequence[str], limit: float):
        self.groups, self.hosts = groups, hosts
        self.free = [limit] * len(hosts)
        self.rows: list[dict[int, list[int]]] = [{} for _ in hosts]

    def pack(self) -> bool:
        """Whether all responses fit."""
        waiting = []
        for index in sorted(range(len(self.groups)), key=lambda index: -self.groups[index].total()):
            group = self.groups[index]
            rows = sorted(group.responses, key=lambda row: (-group.responses[row], row))
            if self._room(group.home, index) >= self._tokens(index, rows):
                self._add(group.home, index, rows)
            elif self.rows[group.home]:
                waiting.append((index, rows))
            else:  # larger than the limit: a part stays
                waiting.append((index, self._add_what_fits(group.home, index, rows)))
        waiting.sort(key=lambda item: -self.groups[item[0]].total(item[1]))
        return all(self._move(index, rows) for index, rows in waiting)

    def _move(self, index: int, rows: list[int]) -> bool:
        """Assigns responses of a group, longest first, to processes with room; returns whether all fit."""
        host, processes = self.hosts[self.groups[index].home], range(len(self.hosts))
        while rows:
            room = [self._room(process, index) for process in processes]
            tokens = self._tokens(index, rows)
            if max(room) >= tokens:
                fitting = [process for process in processes if room[process] >= tokens]
                process = max(fitting, key=lambda process: (self.hosts[process] == host, self.free[process]))
                self._add(process, index, rows)
                return True
            others = self._add_what_fits(room.index(max(room)), index, rows)
            if len(others) == len(rows):
                return False
            rows = others
        return True

    def _room(self, process: int, index: int) -> float:
        """Tokens of a group's responses for which a process has room."""
        return self.free[process] - (0 if index in self.rows[process] else self.groups[index].once)

    def _tokens(self, index: int, rows: list[int]) -> int:
        """Tokens of some of a group's responses."""
        return sum(self.groups[index].responses[row] for row in rows)

    def _add(self, process: int, index: int, rows: list[int]) -> None:
        self.free[process] = self._room(process, index) - self._tokens(index, rows)
        self.rows[process][index] = sorted([*self.rows[process].get(index, ()), *rows])

    def _add_what_fits(self, process: int, index: int, rows: list[int]) -> list[int]:
        """Assigns those of the responses that fit, in this order; returns the others."""
        room, part = self._room(process, index), []
        for row in rows:
            if self.groups[index].responses[row] <= room:
                room -= self.groups[index].responses[row]
                part.append(row)
        if part:
            self._add(process, index, part)
        return [row for row in rows if row not in part]


def reassign(
    batch: Batch, *, slots: Sequence[int], layout: Layout, world: World
) -> tuple[Batch, dict[str, float]]:
    """Moves responses so that each process trains on about as many tokens; returns this process's batch and
    metrics. `slots` has the slot of each group. All processes call it.

    Responses that left keep their row, with an empty mask: an idle pass needs a prompt of every mini-batch.
    Responses that came follow behind, in the same mini-batch.
    """
    owners = zip(slots, batch.groups, strict=True)
    batch = batch.replace(
        origins=tuple((slot, row) for slot, group in owners for row in range(len(group.responses)))
    )
    if world.size == 1:
        return batch, {}
    started = time.perf_counter()
    minibatches = batch.split()
    costs = [_costs(minibatch, layout, world.rank) for minibatch in minibatches]
    hosts, gathered = zip(*world.all_gather((socket.gethostname(), costs)), strict=True)
    assignments = [
        assign([group for groups in parts for group in groups], hosts)
        for parts in zip(*gathered, strict=True)
    ]
    if any(assignment.has_moves for assignment in assignments):
        batch = _move(batch, minibatches, assignments, world)
    return batch, imbalance(assignments) | {"time/assign": time.perf_counter() - started}


def _costs(minibatch: Batch, layout: Layout, process: int) -> list[GroupCost]:
    """Those of this process's groups that are trained on."""
    costs = []
    with_loss = minibatch.mask.any(1).split(minibatch.sizes)
    for index, (group, trained) in enumerate(zip(minibatch.groups, minibatch.trained, strict=True)):
        if trained:
            rows = with_loss[index].nonzero()[:, 0].tolist()
            lengths = [len(group.responses[row].ids) for row in rows]
            once, tokens = layout.costs((len(group.prompt.ids), lengths))
            costs.append(GroupCost(process, index, once, dict(zip(rows, tokens, strict=True))))
    return costs


def _move(
    batch: Batch, minibatches: Sequence[Batch], assignments: Sequence[Assignment], world: World
) -> Batch:
    """Sends and receives what is trained on elsewhere."""
    sent: dict[int, list[tuple[int, Batch]]] = {}
    parts: list[list[Batch]] = []
    for number, (minibatch, assignment) in enumerate(zip(minibatches, assignments, strict=True)):
        for process in range(world.size):
            for group, rows in assignment.of(process):
                if group.home == world.rank != process:
                    sent.setdefault(process, []).append((number, minibatch.part(group.index, rows)))
        own = {group.index: rows for group, rows in assignment.of(world.rank) if group.home == world.rank}
        parts.append([minibatch.remaining(own)])
    for _, theirs in sorted(world.exchange(sent).items()):
        for number, part in theirs:
            parts[number].append(part)
    counts = [sum(len(part.groups) for part in own) for own in parts]
    return batch.join([part for own in parts for part in own], group_counts=counts)


def imbalance(assignments: Sequence[Assignment]) -> dict[str, float]:
    """Tokens of the busiest process over the mean; processes wait for each other after every mini-batch.
    Prompts that are repeated because their group was split count as waiting. Empty without tokens."""
    busiest = sum(max(assignment.loads) for assignment in assignments)
    total = sum(group.total() for assignment in assignments for group in assignment.groups)
    return {"update/imbalance": busiest * len(assignments[0].rows) / total} if total else {}
