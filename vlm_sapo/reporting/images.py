"""Saves small copies of images, for people who look at a run's samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

MAX_SIDE = 384
"""Pixels of the longer side."""


def save_images(folder: Path, images: Sequence[Image.Image]) -> list[str]:
    """Writes the images into `folder/pictures`, equal ones once. Returns their paths relative to `folder`."""
    names = []
    for image in images:
        name = f"pictures/{hashlib.sha1(image.tobytes()).hexdigest()[:16]}.jpg"
        names.append(name)
        if not (folder / name).exists():
            small = image.convert("RGB")
            small.thumbnail((MAX_SIDE, MAX_SIDE))
            try:
                (folder / "pictures").mkdir(parents=True, exist_ok=True)
                small.save(folder / name, quality=85)
            except OSError:  # such as a full disk: a copy for viewing is no reason to stop a run
                (folder / name).unlink(missing_ok=True)
    return names
