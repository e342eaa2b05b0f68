"""The samples file of an evaluation, and stamps that show whether a file or a model has changed."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from vlm_sapo.plugins import locate
from vlm_sapo.reporting.run_folder import Lines
from vlm_sapo.reporting.run_folder import replace as replace_file


def stamp(path: str | Path | None) -> list[int]:
    """Size in bytes and modification time of a file; empty unless it is a file."""
    if not path or not Path(path).is_file():
        return []
    return [Path(path).stat().st_size, Path(path).stat().st_mtime_ns]


def weights(model: str | None) -> list[list]:
    """Names and stamps of a local model's weight files; empty for a hub id."""
    if model is None or not locate(model).is_dir():
        return []
    return [[file.name, *stamp(file)] for file in sorted(locate(model).glob("*.safetensors"))]


SAMPLES = "samples.jsonl"


@dataclass
class SampleFile:
    """`samples.jsonl` of a folder: a line per problem, appended as batches are graded. Flush it at the end.

    `done` has the finished problems by row; an incomplete last line is dropped.
    """

    folder: Path
    name: str
    """The benchmark whose samples these are; a file may have those of several."""

    def __post_init__(self) -> None:
        self.path = self.folder / SAMPLES
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        lines = list(filter(None, text.split("\n")))
        complete = _complete(lines)
        self.done = {record["row"]: record for record in complete if record["benchmark"] == self.name}
        if len(complete) < len(lines) or not text.endswith("\n" if text else ""):
            replace_file(self.path, "".join(map(_line, complete)))
        self.lines = Lines(self.path)

    def flush(self) -> None:
        """Waits until all samples are on disk. Raises OSError if that fails."""
        if self.lines.waiting:
            self.lines.flush()

    def add(self, records: list[dict], *, write: bool = True) -> None:
        """Adds the records of a batch, and writes them unless another process does."""
        if write:
            self.lines.add(*map(_line, records))
        self.done |= {record["row"]: record for record in records}


def drop_samples(folder: Path, evaluations: Container[str]) -> None:
    """Removes the samples of all but these evaluations from the folder's file."""
    path = folder / SAMPLES
    records = _complete(path.read_text(encoding="utf-8", errors="replace").split("\n"))
    replace_file(path, "".join(_line(record) for record in records if record["benchmark"] in evaluations))


def _complete(lines: Iterable[str]) -> list[dict]:
    """The records of the lines that are whole."""
    return [record for record in map(_parse, filter(None, lines)) if record is not None]


def _parse(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
