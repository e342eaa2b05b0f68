"""The memory of a GPU, put together from what a model holds and what its passes need. Bytes, unless said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

GB = 10**9
CONTEXT = 1.0 * GB
"""What CUDA and the libraries take. That a card of N GB has about 7 % more than N * 10^9 bytes is left for
what the allocator loses."""
ASLEEP = 1.0 * GB
"""What a sleeping engine keeps."""
ENGINE_WORK = 2.0 * GB
"""What an engine needs beside weights, keys and values."""
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of an element in NF4 with twice quantized constants."""
BLOCK = 256
"""Elements that share a constant in an optimizer of 8 bits."""
SMALL = 4096
"""Elements of a parameter whose moments such an optimizer holds in 32 bits."""
REDUCED = 4
"""Bytes of an element while sharded gradients are summed."""


@dataclass(frozen=True)
class Gpus:
    """`nodes` machines with `each` GPUs of `memory` bytes."""

    nodes: int
    each: int
    memory: int

    @property
    def count(self) -> int:
        return self.nodes * self.each


@dataclass(frozen=True)
class Held:
    """One parameter of a model."""

    unit: str
    """Where it is gathered: `root`, a decoder layer's or vision block's name, or `whole` if it isn't
    sharded."""
    numel: int
    size: float
    """Bytes of an element."""
    trained: bool
    adapted: bool = False
    """Whether it has an adapter."""


def weights(held: Iterable[Held], shards: int = 1) -> float:
    """The parameters of one GPU."""
    return sum(item.numel * item.size / (1 if item.unit == "whole" else shards) for item in held)


def gradients(held: Iterable[Held], shards: int = 1) -> float:
    """The gradients of one GPU, each of its parameter's type."""
    return weights((item for item in held if item.trained), shards)


def optimizer(held: Iterable[Held], kind: str, shards: int = 1) -> float:
    """AdamW's two moments on one GPU, of the parameters' type or of 8 bits."""
    if kind == "adamw":
        return 2 * gradients(held, shards)
    return sum(
        2 * item.numel / shards * (REDUCED if item.numel < SMALL else 1 + 4 / BLOCK)
        for item in held
        if item.trained
    )


def gathered(held: Sequence[Held], size: float) -> float:
    """What a pass gathers of a sharded model with elements of `size` bytes: the root for the whole pass; of
    the layers one, the next, and the buffer that it arrives in. Backwards also a layer's whole gradient,
    twice as it is summed, and the root's."""

    def largest(items: Iterable[Held]) -> int:
        units: dict[str, int] = {}
        for item in items:
            if item.unit not in ("root", "whole"):
                units[item.unit] = units.get(item.unit, 0) + item.numel
        return max(units.values(), default=0)

    trained = [item for item in held if item.trained]
    root, own = (sum(item.numel for item in items if item.unit == "root") for items in (held, trained))
    forward = size * (root + 3 * largest(held))
    return forward + (size + REDUCED) * own + (size + 2 * REDUCED) * largest(trained)


def whole(held: Iterable[Held], size: float) -> float:
    """A sharded model gathered at once."""
    return sum(item.numel for item in held if item.unit != "whole") * size


@dataclass(frozen=True)
class Row:
    """What one thing takes in each phase."""

    name: str
    training: float = 0.0
    generating: float = 0.0
    sync: float = 0.0
    note: str = ""

    @staticmethod
    def always(name: str, size: float, note: str = "") -> Row:
        return Row(name, size, size, size, note)


PHASES = ("training", "generating", "sync")


@dataclass(frozen=True)
class Estimate:
    """All rows of a GPU, and what lies in the host memory of a node."""

    gpus: Gpus
    rows: tuple[Row, ...]
    host: tuple[tuple[str, float], ...]
    short: str = ""
    """What is wrong beside the sums."""

    @property
    def totals(self) -> dict[str, float]:
        return {phase: sum(vars(row)[phase] for row in self.rows) for phase in PHASES}

    @property
    def peak(self) -> float:
        return max(self.totals.values())

    @property
    def fits(self) -> bool:
        return self.fits_within(1.0)

    def fits_within(self, share: float) -> bool:
        """Whether it takes at most this share of the memory."""
        return self.peak <= share * self.gpus.memory and not self.short
