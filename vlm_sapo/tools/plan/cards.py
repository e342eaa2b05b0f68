"""Public figures of graphics cards, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True)
class Card:
    """One kind of card. Rates per second."""

    name: str
    size: int
    """The GB in its name."""
    memory: float
    """Bytes that a program sees."""
    operations: float
    """Peak of dense bfloat16 matrix products with float32 sums."""
    bandwidth: float
    """Bytes of its memory, read or written."""
    link: float
    """Bytes to the other cards of its machine, in one direction: NVLink, or PCIe where there is none."""


# NVIDIA's data sheets and architecture white papers of each card; `memory` is what nvidia-smi shows, with ECC
# where it is on by default. An H100 "80 GB" shows 81,559 MiB, of which 79.2 GiB (85.0e9 bytes) can be used.
CARDS = (
    Card("RTX 4080", 16, 16.7e9, 97.5e12, 0.717e12, 25e9),
    Card("RTX 3090", 24, 25.4e9, 71e12, 0.936e12, 25e9),
    Card("L4", 24, 23.6e9, 121e12, 0.300e12, 25e9),
    Card("A10", 24, 23.6e9, 125e12, 0.600e12, 25e9),
    Card("RTX 4090", 24, 25.4e9, 165e12, 1.008e12, 25e9),
    Card("RTX 5090", 32, 33.7e9, 209.5e12, 1.792e12, 50e9),
    Card("A100-40GB", 40, 42.3e9, 312e12, 1.555e12, 300e9),
    Card("A6000", 48, 50.9e9, 155e12, 0.768e12, 25e9),
    Card("L40S", 48, 47.7e9, 362e12, 0.864e12, 25e9),
    Card("A100", 80, 85.0e9, 312e12, 2.039e12, 300e9),
    Card("H100", 80, 85.0e9, 989e12, 3.35e12, 450e9),
    Card("H200", 141, 150.1e9, 989e12, 4.8e12, 450e9),
    Card("B200", 180, 191.5e9, 2250e12, 8.0e12, 900e9),
)
"""By size; of several of one size the last is taken where none is named."""


def find_card(name: str) -> Card:
    """The card of this name, whatever its case. Raises ValueError for an unknown one."""
    for card in CARDS:
        if card.name.lower() == name.lower():
            return card
    raise ValueError(f"--card ({name}) must be one of {', '.join(card.name for card in CARDS)}")


def card_of(memory: float) -> Card:
    """The card whose size is nearest to so many bytes."""
    return min(reversed(CARDS), key=lambda card: abs(card.size * GB - memory))


def visible_memory(size: float) -> float:
    """Bytes that a program sees on a card of so many bytes by its name; the same for an unknown card."""
    card = card_of(size)
    return card.memory if card.size * GB == size else size
