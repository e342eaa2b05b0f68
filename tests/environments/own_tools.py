"""Tools for tests: ten lines that work, and what tools do wrong."""

import time

from PIL import Image as pillow
from PIL.Image import Image

from vlm_sapo.environments import Box, Point


def brightness(image: Image, box: Box | None = None, scale: float = 1.0) -> float:
    """Says how bright an image, or a part of it, is.

    Args:
        image: the image to look at
        box: the part to look at, all of it if left out
        scale: by what to multiply
    """
    part = image if box is None else image.crop(tuple(map(int, box)))
    return scale * part.convert("L").getpixel((0, 0))


def locate(point: Point, label: str) -> list:
    """Says where a point is.

    Args:
        point: the point
        label: its name
    """
    return [label, list(point)]


def misbehave(how: str) -> object:
    """Does something wrong.

    Args:
        how: what
    """
    if how == "raise":
        raise RuntimeError("no luck\nwith this")
    if how == "hang":
        time.sleep(60)
    if how == "exit":
        raise SystemExit(3)
    return {
        "pixel": pillow.new("RGB", (1, 1)),
        "line": pillow.new("RGB", (1, 900)),
        "huge": pillow.new("1", (20_000, 20_000)),
        "ten": [pillow.new("RGB", (32, 32), (number, 0, 0)) for number in range(10)],
        "long": "word " * 200_000,
        "nonsense": object(),
        "nothing": None,
    }[how]


def forgetful(image: Image) -> Image:
    """Forgets to return what it made.

    Args:
        image: the image
    """
    image.rotate(90)


def undescribed(image: Image, key: int) -> str:
    """Has no descriptions."""
    return ""


def unhinted(image, key: int) -> str:
    """Has no hint.

    Args:
        image: one
        key: a key
    """
    return ""


def undocumented(key: int) -> str:
    return ""


def strange(key: object) -> str:
    """Takes what JSON has not.

    Args:
        key: anything
    """
    return ""
