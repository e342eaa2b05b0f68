"""Tables of answers that are right, each beside near misses that must stay wrong."""

from __future__ import annotations

from collections.abc import Iterable


def verdicts(table: Iterable[tuple]) -> list[tuple]:
    """Rows `..., right answers, wrong answers` as one case `..., answer, 1 or 0` per answer."""
    return [
        (*row, answer, expected)
        for *row, right, wrong in table
        for expected, answers in ((1, right), (0, wrong))
        for answer in answers
    ]
