"""Turns whatever a row holds for a picture into a decoded PIL image, or says what is wrong with it."""

from __future__ import annotations

import base64
import binascii
import io
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def decode(value: Any, folder: Path) -> Image.Image:
    """The picture behind `value`: a PIL image, bytes, a `{bytes, path}` mapping, a data URL, or a path.

    Paths are relative to `folder`. The camera's orientation is applied, and transparency laid on white: black
    lines on nothing would otherwise become black on black. Raises ValueError with one sentence.
    """
    if isinstance(value, Image.Image):
        return _upright(value)
    if isinstance(value, Mapping):
        return decode(value.get("bytes") or value.get("path"), folder)
    if isinstance(value, bytes | bytearray):
        return _open(io.BytesIO(value), f"{len(value)} bytes")
    if isinstance(value, str) and value.startswith("data:"):
        return _open(io.BytesIO(_data_url(value)), "the data URL")
    if isinstance(value, str) and "://" in value:
        raise ValueError(f"{value} is an address; download the picture and give its path")
    if isinstance(value, str | Path) and str(value):
        path = folder / value
        if not path.is_file():
            raise ValueError(f"{path} does not exist; paths are relative to the data file")
        return _open(path, str(path))
    raise ValueError(f"a {type(value).__name__} is no picture; give a path, bytes, a data URL or a PIL image")


def _open(source: Any, name: str) -> Image.Image:
    try:
        with Image.open(source) as picture:
            picture.load()
            return _upright(picture)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as a picture ({error}); replace or remove it") from error


def _upright(picture: Image.Image) -> Image.Image:
    # Metadata that cannot be read fails in many ways inside Pillow, and leaves the picture as it is.
    with suppress(struct.error, AttributeError, TypeError, ValueError, KeyError, SyntaxError):
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # Pillow would cut 16 bits off at 255 instead of scaling them
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if not picture.has_transparency_data:
        return picture
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _data_url(url: str) -> bytes:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise ValueError(f"a data URL must be base64; this one starts with {header[:40]}")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ValueError(f"the data URL is not valid base64 ({error})") from error
