"""What eval/speed.py trains on."""

from __future__ import annotations

import numpy as np
from PIL import Image


def rows(count: int, side: int, pictures: int) -> list[dict]:
    """Noise pictures with a short question."""
    generator = np.random.default_rng(0)

    def draw() -> Image.Image:
        return Image.fromarray(generator.integers(0, 255, (side, side, 3), dtype=np.uint8))

    return [
        {
            "problem": "how many circles are there? " * 3,
            "answer": "1",
            "images": [draw() for _ in range(pictures)],
        }
        for _ in range(count)
    ]


def reward(response, example) -> float:
    """Something that differs within every group."""
    return float(sum(map(ord, response)) % 7)
