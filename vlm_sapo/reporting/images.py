"""Small copies of an evaluation's pictures, for people who look at its samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

SIDE = 384
"""Longest side in pixels."""


def keep_pictures(folder: Path, pictures: Sequence[Image.Image]) -> list[str]:
    """Writes the pictures into `folder/pictures`, each once, and returns their paths relative to `folder`."""
    names = []
    for picture in pictures:
        name = f"pictures/{hashlib.sha1(picture.tobytes()).hexdigest()[:16]}.jpg"
        names.append(name)
        if not (folder / name).exists():
            small = picture.convert("RGB")
            small.thumbnail((SIDE, SIDE))
            try:
                (folder / "pictures").mkdir(parents=True, exist_ok=True)
                small.save(folder / name, quality=85)
            except OSError:  # of a full disk; they are for looking only, and the samples matter more
                (folder / name).unlink(missing_ok=True)
    return names
