"""The rows and the reward that eval/speed.py and eval/memory.py train on."""

from __future__ import annotations

import numpy as np
from PIL import Image


def rows(count: int, side: int, images: int) -> list[dict]:
    """Noise images with a short question."""
    generator = np.random.default_rng(0)

    def noise() -> Image.Image:
        return Image.fromarray(generator.integers(0, 255, (side, side, 3), dtype=np.uint8))

    return [
        {
            "problem": "how many circles are there? " * 3,
            "answer": "1",
            "images": [noise() for _ in range(images)],
        }
        for _ in range(count)
    ]


def reward(response, example) -> float:
    """A number that differs within every group."""
    return float(sum(map(ord, response)) % 7)
