"""Renders collected data as one HTML file that needs no network."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

MAX_IMAGE_BYTES = 2_000_000
"""Larger files are left out; the images of a run are small."""
MAX_TOTAL_BYTES = 40_000_000
"""Files beyond these are left out, so that a browser can open the page."""


class EmbeddedImages:
    """Image files as data URLs, each file once."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.bytes = 0
        self._indices: dict[Path, int | None] = {}

    def add(self, folder: Path, names: Sequence[str]) -> list[int | None]:
        """Indices in `urls` of files in a folder; None for a file that is missing, outside the folder, or too
        large."""
        paths = [(folder / name).resolve() for name in names]
        return [self._add(path) if path.is_relative_to(folder.resolve()) else None for path in paths]

    def _add(self, path: Path) -> int | None:
        if path not in self._indices:
            size = path.stat().st_size if path.is_file() else MAX_IMAGE_BYTES
            usable = size < MAX_IMAGE_BYTES and self.bytes + size <= MAX_TOTAL_BYTES
            self._indices[path] = len(self.urls) if usable else None
            if usable:
                self.bytes += size
                encoded = base64.b64encode(path.read_bytes()).decode()
                self.urls.append(f"data:image/jpeg;base64,{encoded}")
        return self._indices[path]


def render(data: dict[str, Any], *, refresh: int = 0) -> str:
    """The page of `data` (of runs, of evaluations or of a comparison) as HTML; it reloads itself every
    `refresh` seconds, if not 0. A page without runs has no charts, so the chart library (5 MB) is left out.
    """
    folder = files("vlm_sapo.tools.report")
    text = folder.joinpath("page.html").read_text(encoding="utf-8")
    for name in ("page.css", "page.js"):
        text = text.replace(f"/*{name}*/", folder.joinpath(name).read_text(encoding="utf-8"))
    json_text = json.dumps(_json_safe(data) | {"refresh": refresh}, ensure_ascii=False, allow_nan=False)
    # a response's text must not be able to close the script element that contains it
    json_text = json_text.replace("<", "\\u003c")
    before, rest = text.split("/*data*/")
    between, after = rest.split("/*plotly*/")
    return "".join((before, json_text, between, get_plotlyjs() if "runs" in data else "", after))


def _json_safe(value: Any) -> Any:
    """The value with None for numbers that JSON doesn't have, and with lone surrogates escaped."""
    if isinstance(value, dict):
        return {name: _json_safe(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
