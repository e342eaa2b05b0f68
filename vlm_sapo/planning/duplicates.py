"""Finds pictures that are the same, or nearly, across sets of rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_sapo.planning.inspect import Inspected

BITS = 4
"""Perceptual hashes may differ in so many of 64 bits. On real geometry, charts, cells and receipts all pairs
within 4 bits were the same drawing, and pairs from 5 bits on were not."""
ALIKE = 0.9
"""Least correlation of the grey thumbnails."""
CHUNK = 512


def matches(one: Sequence[Inspected], other: Sequence[Inspected]) -> list[tuple[Inspected, Inspected, str]]:
    """Pairs of rows, one of each set, that share a picture: `same` pixels, or `near` duplicates such as
    another size, compression or border. Within one set (`one is other`) each pair is given once."""
    left = [(row, mark) for row in one for mark in row.prints if not mark.blank]
    right = [(row, mark) for row in other for mark in row.prints if not mark.blank]
    if not left or not right:
        return []
    hashes = np.array([mark.perceptual for _, mark in right], dtype=np.uint64)
    found: dict[tuple[int, int], tuple[Inspected, Inspected, str]] = {}
    for start in range(0, len(left), CHUNK):
        part = np.array([mark.perceptual for _, mark in left[start : start + CHUNK]], dtype=np.uint64)
        close = np.bitwise_count(part[:, None] ^ hashes) <= BITS
        for i, j in zip(*close.nonzero(), strict=True):
            (row, mark), (match, twin) = left[start + i], right[j]
            if one is other and row.index >= match.index:
                continue
            same = mark.exact == twin.exact
            if same or float(mark.thumbnail @ twin.thumbnail) >= ALIKE:
                pair = (row.index, match.index)
                if same or pair not in found:
                    found[pair] = (row, match, "same" if same else "near")
    return list(found.values())
