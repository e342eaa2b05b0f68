"""The built-in tools that look at an image."""

from __future__ import annotations

import math

from PIL import ImageDraw
from PIL.Image import Image, Resampling

from vlm_sapo.environments.values import Box, Point


def zoom(image: Image, box: Box) -> Image:
    """Shows a part of an image enlarged to the size of the whole image, in all detail that it has.

    Args:
        image: the image to look at
        box: the part to enlarge
    """
    part = crop(image, box)
    scale = min(image.width / part.width, image.height / part.height)
    size = (max(1, round(part.width * scale)), max(1, round(part.height * scale)))
    return part.resize(size, Resampling.LANCZOS)


def crop(image: Image, box: Box) -> Image:
    """Cuts a part out of an image.

    Args:
        image: the image to cut
        box: the part to cut out
    """
    return _rgb(image).crop(
        (math.floor(box.left), math.floor(box.top), math.ceil(box.right), math.ceil(box.bottom))
    )


def rotate(image: Image, degrees: float) -> Image:
    """Turns an image clockwise; corners that become free are white.

    Args:
        image: the image to turn
        degrees: by how much, 90 for a quarter turn
    """
    return _rgb(image).rotate(-degrees, Resampling.BICUBIC, expand=True, fillcolor=(255, 255, 255))


def draw_box(image: Image, box: Box) -> Image:
    """Marks a part of an image with a red frame.

    Args:
        image: the image to mark
        box: the part to mark
    """
    marked = _rgb(image).copy()
    width = max(2, round(min(marked.size) / 200))
    ImageDraw.Draw(marked).rectangle(tuple(box), outline=(255, 0, 0), width=width)
    return marked


def measure(image: Image, start: Point, end: Point) -> str:
    """Measures the line between two points of an image.

    Args:
        image: the image to measure in
        start: one end of the line
        end: its other end
    """
    across, down = end.x - start.x, end.y - start.y
    angle = math.degrees(math.atan2(-down, across))
    return (
        f"length {math.hypot(across, down):.1f} pixels of {image.width}x{image.height}, "
        f"{angle:.1f} degrees from the right, counterclockwise"
    )


def _rgb(image: Image) -> Image:
    return image if image.mode == "RGB" else image.convert("RGB")
