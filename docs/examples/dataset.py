"""A data set of your own: bar charts that are drawn as they are asked for.

data:
  source: docs/examples/dataset.py:rows
  args: {size: 1000}
"""

import random

from PIL import Image, ImageDraw


def rows(size, split="train"):
    """`size` rows with a picture, a problem and an answer; held-out charts have other heights."""
    return [row(f"{split}-{number}") for number in range(size)]


def row(name):
    """Four bars, of which the tallest is asked for."""
    dice = random.Random(name)
    heights = dice.sample(range(10, 90, 8), 4)
    image = Image.new("RGB", (120, 100), "white")
    draw = ImageDraw.Draw(image)
    for number, height in enumerate(heights):
        left = 10 + 28 * number
        draw.rectangle((left, 98 - height, left + 20, 98), fill="steelblue")
    return {
        "id": name,
        "problem": "Which bar is the tallest, counted from the left?",
        "answer": str(1 + heights.index(max(heights))),
        "images": [image],
    }
