"""Pictures on their way to the processes that grade: as sizes alone, or once per row through a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vlm_sapo.types import Example, Response

Item = tuple[Response, Example]


class PictureSize(NamedTuple):
    """Stands in for a picture where a verifier needs its size alone."""

    size: tuple[int, int]


class PictureFile(NamedTuple):
    """Stands in for a picture whose pixels lie in a file, as they are in memory."""

    path: str
    mode: str
    size: tuple[int, int]
    palette: bytes | None


def without_pictures(item: Item) -> Item:
    """The same with picture sizes in place of pictures."""
    response, example = item
    return response, replace(example, images=tuple(PictureSize(image.size) for image in example.images))


def share_pictures(items: Sequence[Item], folder: str) -> list[Item]:
    """The same with files in `folder` in place of pictures, one set for all responses to a row."""
    made: dict[int, tuple[PictureFile, ...]] = {}
    shared = []
    for response, example in items:
        if id(example) not in made:
            stem = Path(folder) / str(len(made))
            made[id(example)] = tuple(
                _write(image, f"{stem}_{number}.pixels") for number, image in enumerate(example.images)
            )
        shared.append((response, replace(example, images=made[id(example)])))
    return shared


def with_pictures(item: Item) -> Item:
    """What `share_pictures` sent, with its pictures again."""
    response, example = item
    if example.images and isinstance(example.images[0], PictureFile):
        return response, replace(example, images=_read(example.images))
    return item


def _write(image: Image.Image, path: str) -> PictureFile:
    Path(path).write_bytes(image.tobytes())
    palette = bytes(image.getpalette("RGB")) if image.mode == "P" else None
    return PictureFile(path, image.mode, image.size, palette)


@lru_cache(maxsize=4)
def _read(files: tuple[PictureFile, ...]) -> tuple[Image.Image, ...]:
    return tuple(map(_read_one, files))


def _read_one(file: PictureFile) -> Image.Image:
    image = Image.frombytes(file.mode, file.size, Path(file.path).read_bytes())
    if file.palette is not None:
        image.putpalette(file.palette)
    return image
