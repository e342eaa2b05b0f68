"""Decodes the images of rows: paths, bytes, data URLs and PIL images. models/encode.py resizes them."""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are read. Pillow knows more, and starts other programs for some."""
MAX_PIXELS = 90_000_000
"""Pixels of the largest image that is decoded: 270 MB as RGB."""


def decode(value: Any, folder: Path, *, anywhere: bool = True) -> Image.Image:
    """The image behind `value`: a PIL image, bytes, a `{bytes, path}` mapping, a data URL, or a path.

    Paths are relative to `folder`, and must stay in it unless they may lead `anywhere`. The camera's
    orientation is applied, and transparency becomes white: black lines on a transparent background would
    otherwise become black on black. Raises ValueError with one sentence.
    """
    if isinstance(value, Image.Image):
        return _upright(value)
    if isinstance(value, Mapping):
        return decode(value.get("bytes") or value.get("path"), folder, anywhere=anywhere)
    if isinstance(value, bytes | bytearray):
        return _open(io.BytesIO(value), f"{len(value)} bytes")
    if isinstance(value, str) and value.startswith("data:"):
        return _open(io.BytesIO(_data_url(value)), "the data URL")
    if isinstance(value, str) and "://" in value:
        raise ValueError(f"{value} is an address; download the image and give its path")
    if isinstance(value, str | Path) and str(value):
        return _open(_path(value, folder, anywhere), str(folder / value))
    raise ValueError(f"a {type(value).__name__} is no image; give a path, bytes, a data URL or a PIL image")


def _path(value: str | Path, folder: Path, anywhere: bool) -> Path:
    path = folder / value
    if not anywhere and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(
            f"{value} leads out of {folder}, the folder of the data file; set data.pictures_anywhere=true if "
            "you trust these rows"
        )
    try:
        exists = path.is_file()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ValueError(f"{str(value)[:100]!r} is no path of a file ({error})") from error
    if not exists:
        raise ValueError(f"{path} does not exist; paths are relative to the data file")
    return path


def _open(source: Any, name: str) -> Image.Image:
    try:
        with Image.open(source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                limit = MAX_PIXELS // 10**6
                raise ValueError(f"it has {width}x{height} pixels, and {limit} million are the most")
            if image.format != "MPO" and _has_frames(image):  # phones put a preview behind the image
                raise ValueError("it has several frames or pages; save the one to use as a file of its own")
            image.load()
            return _upright(image)
    except Exception as error:  # a damaged file makes Pillow's readers raise whatever they trip over
        reason = f"it is none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name} cannot be read as an image ({reason}); replace or remove it") from error


def _has_frames(image: Image.Image) -> bool:
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def _upright(image: Image.Image) -> Image.Image:
    # Metadata that cannot be read fails in many ways inside Pillow, and leaves the image as it is.
    with suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would cut 16 bits off at 255 instead of scaling them
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits per pixel, whose range nobody knows; save it with 8 or 16")
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _data_url(url: str) -> bytes:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise ValueError(f"a data URL must be base64; this one starts with {header[:40]}")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ValueError(f"the data URL is not valid base64 ({error})") from error
