"""What tells that a file or a model is another one under the same name."""

from __future__ import annotations

from pathlib import Path

from vlm_sapo.plugins import locate


def stamp(path: str | Path | None) -> list[int]:
    """Size in bytes and time of a file; empty for none, or for what is no file."""
    if not path or not Path(path).is_file():
        return []
    return [Path(path).stat().st_size, Path(path).stat().st_mtime_ns]


def weights(model: str | None) -> list[list]:
    """Names and stamps of the files that hold a local model's weights; empty for a hub id."""
    if model is None or not locate(model).is_dir():
        return []
    return [[file.name, *stamp(file)] for file in sorted(locate(model).glob("*.safetensors"))]
