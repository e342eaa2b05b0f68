"""A tool of your own: the model names an image and a part of it, and gets both as an image and as pixels.

rollout:
  environment: {tools: [zoom, docs/examples/tool.py:brighten], format: hermes}
"""

from PIL import ImageEnhance
from PIL.Image import Image

from vlm_sapo.environments import Box


def brighten(image: Image, box: Box, factor: float = 2.0) -> Image:
    """Shows a part of an image brighter.

    Args:
        image: the image to look at
        box: the part to show
        factor: how much brighter
    """
    return ImageEnhance.Brightness(image.convert("RGB").crop(tuple(map(round, box)))).enhance(factor)
