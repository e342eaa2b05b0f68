"""Rows that a Python program passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

from vlm_sapo.data.formats import Row
from vlm_sapo.data.rows import undecoded


def usable_rows(rows: Any, argument: str) -> Sequence[Row]:
    """Rows as `argument` of a function: a list of mappings, a `datasets.Dataset`, whose images stay encoded
    until a row is read, or anything else with a length and mappings by index. Raises ValueError
    otherwise."""
    import datasets

    kind = type(rows).__name__
    if isinstance(rows, Mapping):
        raise ValueError(f"{argument} ({kind}) must be one list of rows; pass one of {', '.join(rows)}")
    if not isinstance(rows, Sized):
        raise ValueError(f"{argument} ({kind}) must have a length; pass list(...) of it")
    if not len(rows):
        raise ValueError(f"{argument} must have rows; it is empty")
    if isinstance(rows, datasets.Dataset) and rows.format["type"] != "custom":  # with_transform
        rows = undecoded(rows.with_format(None))
    try:
        first = rows[0]
    except (LookupError, TypeError) as error:
        raise ValueError(
            f"{argument} ({kind}) must have rows by number; pass a list of mappings, as "
            "df.to_dict('records') makes of a pandas table"
        ) from error
    if not isinstance(first, Mapping):
        raise ValueError(
            f"{argument} must have mappings such as {{'problem': ..., 'answer': ..., 'images': [...]}} as "
            f"rows; its first is {type(first).__name__}"
        )
    if isinstance(rows, list):
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"{argument} must have mappings as rows; row {number} is {type(row).__name__}"
                )
    return rows
