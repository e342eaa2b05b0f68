"""The rows, the reward and the environment that eval/speed.py and eval/memory.py train on."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vlm_sapo.environments.environment import Observation


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


class Cropper:
    """Answers every turn but the last with a quarter of the image."""

    def __init__(self, turns: int):
        self.left = turns

    def reset(self, example) -> None:
        image = example.images[0]
        self.crop = image.crop((0, 0, image.width // 2, image.height // 2))

    def step(self, response) -> Observation:
        self.left -= 1
        if not self.left:
            return Observation(done=True)
        return Observation("<tool_response>\n<image>\n</tool_response>", (self.crop,))
