"""What the adapters share: optional packages, actions in a turn, images in JSON."""

from __future__ import annotations

import base64
import binascii
import importlib
import io
import json
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy
from PIL import Image

from vlm_sapo.environments.environment import check_image
from vlm_sapo.rewards.verifiers.answers import THOUGHT_END, THOUGHT_START
from vlm_sapo.types import one_line

MARKED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}|<action>(.*?)</action\s*>", re.DOTALL)
TEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|texttt)\s*\{([^{}]*)\}")
DATA_URL = re.compile(r"\s*data:[^,]{0,200},")
NO_ANSWER = "-"
"""The answer of rows that only an environment grades: the reader of rows refuses an empty one."""


def load_package(module: str, *, user: str, extra: str) -> ModuleType:
    """An optional module. Raises ValueError naming the extra that has it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing_package(module.partition(".")[0], user, extra, error) from error


def missing_package(package: str, user: str, extra: str, error: Exception) -> ValueError:
    """The error of a package that isn't installed."""
    return ValueError(
        f"{user} needs the package {package} ({one_line(error)}); install it: "
        f"pip install 'vlm-sapo[{extra}]', in the repository pip install -e '.[{extra}]'"
    )


def outside_thoughts(turn: str) -> str:
    """A turn without its thoughts."""
    ends = list(THOUGHT_END.finditer(turn))
    rest = turn[ends[-1].end() :] if ends else turn
    opened = THOUGHT_START.search(rest)
    return str(rest[: opened.start()] if opened else rest)


def marked_action(turn: str) -> str | None:
    """The last `\\boxed{...}` or `<action>...</action>` outside the thoughts; None without one."""
    matches = list(MARKED.finditer(outside_thoughts(turn)))
    if not matches:
        return None
    boxed, tagged = matches[-1].groups()
    return tagged.strip() if boxed is None else TEX_TEXT.sub(r"\1", boxed).strip()


def read_action(turn: str, names: Sequence[str]) -> tuple[str | None, str]:
    """The action of a turn, or None, and what the turn says: the marked text, else the last name of an
    action outside the thoughts. Case doesn't count."""
    known = {name.casefold(): name for name in names}
    if (text := marked_action(turn)) is None:
        longest_first = sorted(map(re.escape, known), key=len, reverse=True)
        words = re.findall(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)", outside_thoughts(turn).casefold())
        text = words[-1] if words else ""
    return known.get(text.strip("\"'`. ").casefold()), text


def read_images(value: Any, field: str) -> tuple[Image.Image, ...]:
    """The images of a value as JSON has it: base64 or a data URL, nested lists of pixels (H x W, or
    H x W x 1, 3 or 4), or a list of these. Raises ValueError naming the field."""
    if value is None or (isinstance(value, list | tuple) and not value):
        return ()
    if isinstance(value, Image.Image):
        return (value,)
    if isinstance(value, str):
        return (_from_base64(value, field),)
    if isinstance(value, list | tuple) and isinstance(value[0], str | Image.Image):
        return tuple(image for item in value for image in read_images(item, field))
    try:
        pixels = numpy.asarray(value, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{field} ({one_line(value)}) must be a base64 image, a data URL, or lists of pixels"
        ) from error
    if pixels.ndim == 4:
        return tuple(_from_pixels(each, field) for each in pixels)
    return (_from_pixels(pixels, field),)


def _from_base64(text: str, field: str) -> Image.Image:
    try:
        match = DATA_URL.match(text)
        data = base64.b64decode(text[match.end() :] if match else text, validate=False)
        image = Image.open(io.BytesIO(data))
        check_image(image)  # its size is known before its pixels are read
        image.load()
    except (binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{field} ({one_line(text)}) must be an image in base64, or a data URL with one"
        ) from error
    return image


def _from_pixels(pixels: numpy.ndarray, field: str) -> Image.Image:
    shape = " x ".join(map(str, pixels.shape))
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.size == 0 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise ValueError(f"{field} has the shape {shape}; an image is height x width x 1, 3 or 4")
    if not ((pixels >= 0) & (pixels <= 255) & (pixels == pixels.round())).all():
        raise ValueError(f"{field} must have whole numbers from 0 to 255 as pixels")
    return Image.fromarray(pixels.astype(numpy.uint8))


def as_text(value: Any) -> str:
    """A value of an observation as a model reads it: texts as they are, numbers rounded, others as JSON."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(_plain(value), ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, numpy.ndarray | numpy.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
