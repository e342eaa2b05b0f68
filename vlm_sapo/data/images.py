"""Decodes the images of rows: paths, bytes, data URLs and PIL images. models/encode.py resizes them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm_sapo.types import one_line

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are read. Pillow knows more, and starts other programs for some."""
MAX_PIXELS = 90_000_000
"""Pixels of the largest image that is decoded: 270 MB as RGB."""
KEYS = ("bytes", "path", "url", "image_url", "image", "base64", "data", "source")
"""Keys under which a mapping may hold its image; the first that has a value counts."""
BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]+")
SHORTEST_BASE64 = 60
BASE64_HEADER = 32
"""Characters of base64 that hold the first bytes of an image."""
SIGNATURE = re.compile(
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8|RIFF.{4}WEBP|BM|II\*\0|MM\0\*|.{4}ftypavi[fs]", re.DOTALL
)
"""How files of these formats begin."""
DATA_URL = re.compile(r"data:|image/[a-z+.-]+;base64,")
LONGEST_SCHEME = 20
"""Characters within which an address has its `://`."""
LONGEST_PATH = 300
"""Characters of a path in a message."""

_READING = Lock()
"""Several rows may share a PIL image, which reads its file when it is first used."""


def decode(value: Any, folder: Path, *, anywhere: bool = True) -> Image.Image:
    """The image behind `value`: a PIL image, bytes, base64, a data URL, a path, or a mapping with such.

    Paths are relative to `folder`, and must stay in it unless they may lead `anywhere`. The camera's
    orientation is applied, and transparency becomes white: black lines on a transparent background would
    otherwise become black on black. Raises ValueError with one sentence.
    """
    if isinstance(value, Image.Image):
        with _READING:
            return _upright(value)
    if isinstance(value, Mapping):
        inner = next((value[key] for key in KEYS if value.get(key)), None)
        return decode(inner, folder, anywhere=anywhere)
    if isinstance(value, bytes | bytearray):
        return _open(io.BytesIO(value), f"{len(value)} bytes")
    if isinstance(value, str) and value.startswith(("b'", 'b"')):  # bytes that were written by str()
        value = value[2:-1]
    if isinstance(value, str):  # Qwen's way to write a path
        value = value.removeprefix("file://")
    if isinstance(value, str) and DATA_URL.match(value):
        return _open(io.BytesIO(_data_url(value)), "the data URL")
    if isinstance(value, str) and "://" in value[:LONGEST_SCHEME]:
        raise ValueError(f"{one_line(value)} is an address; download the image and give its path")
    if isinstance(value, str) and _is_base64(value):
        return _open(io.BytesIO(_from_base64(value, "the value")), "the base64 text")
    if isinstance(value, str | Path) and str(value):
        return _open(_path(value, folder, anywhere), one_line(folder / value, LONGEST_PATH))
    raise ValueError(f"a {type(value).__name__} is no image; give a path, bytes, base64 or a PIL image")


def _path(value: str | Path, folder: Path, anywhere: bool) -> Path:
    path = folder / value
    if "\\" in str(value) and not os.path.exists(path):  # written on Windows
        path = folder / str(value).replace("\\", "/")
    if not anywhere and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(
            f"{one_line(value)} leads out of {folder}, the folder of the data file; set "
            "data.pictures_anywhere=true if you trust these rows"
        )
    try:
        exists = path.is_file()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ValueError(f"{one_line(value)!r} is no path of a file ({one_line(error)})") from error
    if not exists:
        raise ValueError(
            f"{one_line(path, LONGEST_PATH)} does not exist; paths are relative to the data file"
        )
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


def pixel_digest(image: Image.Image) -> str:
    """What two RGB images have in common only if size and pixels are the same, whatever their file format."""
    return hashlib.sha1(str(image.size).encode() + image.tobytes()).hexdigest()


def is_blank(image: Image.Image) -> bool:
    """Whether an RGB image has one colour only."""
    return all(low == high for low, high in image.getextrema())


def is_path(value: Any) -> bool:
    """Whether an image's value is the path of its file."""
    return isinstance(value, str | Path) and not (DATA_URL.match(str(value)) or _is_base64(str(value)))


def _is_base64(text: str) -> bool:
    """Whether a text is an image in base64 and not a path: a path with a dot cannot be."""
    if len(text) < SHORTEST_BASE64 or not BASE64.fullmatch(text):
        return False
    header = re.sub(r"\s", "", text[: 2 * BASE64_HEADER])[:BASE64_HEADER]
    return SIGNATURE.match(base64.b64decode(header, altchars=_alphabet(text))) is not None


def _data_url(url: str) -> bytes:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise ValueError(f"a data URL must be base64; this one starts with {header[:40]}")
    return _from_base64(payload, "the data URL")


def _from_base64(text: str, name: str) -> bytes:
    """Decodes base64 of either alphabet, in one line or several, with or without its padding."""
    text = re.sub(r"\s", "", text).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=_alphabet(text), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name} is not valid base64 ({error})") from error


def _alphabet(text: str) -> bytes:
    return b"-_" if "-" in text or "_" in text else b"+/"
