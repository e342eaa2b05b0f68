"""Pictures on their way to the processes that grade: as sizes alone, or once per row through a file."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from vlm_sapo.types import Example, Response

Item = tuple[Response, Example]


class PictureSize(NamedTuple):
    """Stands in for a picture where a verifier needs its size alone."""

    size: tuple[int, int]


def without_pictures(item: Item) -> Item:
    """The same with picture sizes in place of pictures."""
    response, example = item
    return response, replace(example, images=tuple(PictureSize(image.size) for image in example.images))


def share_pictures(items: Sequence[Item], folder: str) -> list[Item]:
    """The same with the path of a file in place of pictures, one for all responses to a row."""
    made: dict[int, Path] = {}
    shared = []
    for response, example in items:
        if example.images and id(example) not in made:
            made[id(example)] = Path(folder) / f"{len(made)}.pickle"
            made[id(example)].write_bytes(pickle.dumps(example.images))
        images = (made[id(example)],) if example.images else ()
        shared.append((response, replace(example, images=images)))
    return shared


def with_pictures(item: Item) -> Item:
    """What `share_pictures` sent, with its pictures again."""
    response, example = item
    if example.images and isinstance(example.images[0], Path):
        return response, replace(example, images=_load(example.images[0]))
    return item


@lru_cache(maxsize=4)
def _load(path: Path) -> tuple:
    return pickle.loads(path.read_bytes())
