"""Finds pictures that are the same, or nearly, across sets of rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_sapo.evaluation.preflight import Inspected, Print

BITS = 4
"""Perceptual hashes may differ in so many of 64 bits. On real geometry, charts, cells and receipts all pairs
within 4 bits were the same drawing, and pairs from 5 bits on were not."""
ALIKE = 0.9
"""Least correlation of the grey thumbnails."""


def matches(one: Sequence[Inspected], other: Sequence[Inspected]) -> list[tuple[Inspected, Inspected, str]]:
    """For every row of `one` that shares a picture with `other` the first such pair: with the `same` pixels,
    else a `near` duplicate such as another size, compression or border."""
    right = [(row, mark) for row in other for mark in row.prints if not mark.blank]
    exact = {mark.exact: row for row, mark in reversed(right)}
    hashes = np.array([mark.perceptual for _, mark in right], dtype=np.uint64)
    found = []
    for row in one:
        marks = [mark for mark in row.prints if not mark.blank]
        same = next((exact[mark.exact] for mark in marks if mark.exact in exact), None)
        twin = same or next(filter(None, (_near(mark, right, hashes) for mark in marks)), None)
        if twin is not None:
            found.append((row, twin, "same" if same else "near"))
    return found


def _near(mark: Print, right: Sequence[tuple[Inspected, Print]], hashes: np.ndarray) -> Inspected | None:
    """The first row with nearly the same picture."""
    close = np.bitwise_count(hashes ^ np.uint64(mark.perceptual)) <= BITS
    for place in close.nonzero()[0]:
        row, twin = right[place]
        if float(mark.thumbnail @ twin.thumbnail) >= ALIKE:
            return row
    return None
