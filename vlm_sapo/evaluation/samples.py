"""What tells that a file or a model is another one under the same name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vlm_sapo.plugins import locate
from vlm_sapo.reporting.run_folder import Lines
from vlm_sapo.reporting.run_folder import replace as replace_file


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


@dataclass
class SampleFile:
    """`samples.jsonl` of a folder: a line per problem, written as batches are graded. Settle it in the end.

    `done` holds the finished problems by row; a line that was cut off in writing is dropped.
    """

    folder: Path
    name: str
    """The benchmark whose samples these are; a file may hold those of several."""

    def __post_init__(self) -> None:
        self.path = self.folder / "samples.jsonl"
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        lines = list(filter(None, text.split("\n")))
        whole = [record for record in map(_parsed, lines) if record is not None]
        self.done = {record["row"]: record for record in whole if record["benchmark"] == self.name}
        if len(whole) < len(lines) or not text.endswith("\n" if text else ""):
            replace_file(self.path, "".join(map(_line, whole)))
        self.lines = Lines(self.path)

    def settle(self) -> None:
        """Puts all samples on disk. Raises OSError where that can't be done."""
        if self.lines.waiting:
            self.lines.flush()

    def add(self, records: list[dict], *, write: bool = True) -> None:
        """Keeps the records of a batch, and writes them."""
        if write:
            self.lines.add(*map(_line, records))
        self.done |= {record["row"]: record for record in records}


def _parsed(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
