"""Who may read the weights that are written."""

from __future__ import annotations

import stat
from pathlib import Path


def use_umask(folder: Path) -> None:
    """Gives the weights in a folder the mode of any other new file. safetensors writes through a temporary
    file, which only its owner can read, so that a serving account could not load them."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)
