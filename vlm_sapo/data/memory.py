"""Rows that a Python program passes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

from PIL.Image import Image

from vlm_sapo.data.formats import Row

HASHED_ROWS = 256
"""Most rows that a fingerprint covers, evenly spaced."""


def check_rows(rows: Any, argument: str) -> Sequence[Row]:
    """Rows as `argument` of a function: a list of mappings, a `datasets.Dataset`, or anything else with a
    length and mappings by index. Raises ValueError otherwise."""
    kind = type(rows).__name__
    if isinstance(rows, Mapping):
        raise ValueError(f"{argument} ({kind}) must be one list of rows; pass one of {', '.join(rows)}")
    if not isinstance(rows, Sized):
        raise ValueError(f"{argument} ({kind}) must have a length; pass list(...) of it")
    if not len(rows):
        raise ValueError(f"{argument} must have rows; it is empty")
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
    return rows


def fingerprint(rows: Sequence[Row]) -> str:
    """A hash of the number of rows and of up to HASHED_ROWS of them, with the pixels of their images."""
    total = hashlib.sha256(str(len(rows)).encode())
    count = min(HASHED_ROWS, len(rows))
    for number in range(count):
        row = rows[number * len(rows) // count]
        total.update(json.dumps(_plain(row), sort_keys=True, default=repr).encode())
    return total.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """A value with hashes in place of images and bytes."""
    if isinstance(value, Image):
        return [value.mode, *value.size, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
