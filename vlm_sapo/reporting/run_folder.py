"""The files of a run's folder: `config.yaml`, the logs, `summary.json`."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm_sapo.distributed import shielded
from vlm_sapo.reporting.trackers import Trackers

LOGS = ("metrics.jsonl", "histograms.jsonl", "rollouts.jsonl", "traces.jsonl", "evaluations.jsonl")
WRITTEN = (
    "config.yaml",
    *LOGS,
    "summary.json",
    "curves.png",
    "checkpoints",
    "evaluations",
    "final",
    "bad_updates",
    "pictures",
    "tensorboard",
    "wandb",
    "trackers.json",
)


class RunFolder:
    """Reads and appends to a run's files. A line is flushed as it is written."""

    def __init__(self, path: Path):
        self.path = path
        self.logs = {name: Lines(path / name) for name in LOGS}
        self.trackers: Trackers | None = None
        """Get every record that is logged."""

    def stored(self) -> str | None:
        """The config of the run that left something here, which another one would mix with; None without.

        Raises ValueError when the folder holds something that is no run.
        """
        stored = self.path / "config.yaml"
        if not stored.is_file() and self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(f"run.dir ({self.path}) must be empty or hold a run; choose another folder")
        return stored.read_text() if self.has_results() else None

    def begin(self, config: str) -> None:
        """Makes the folder, with this config."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.replace("config.yaml", config)

    def unfinish(self) -> None:
        """Lets a finished run go on."""
        (self.path / "summary.json").unlink(missing_ok=True)

    def best(self, count: int) -> list[int]:
        """The steps with the best results of the first evaluation, the later one of equals."""
        records = self.read("evaluations.jsonl")
        first = [record for record in records if record["name"] == records[0]["name"]]
        order = sorted(first, key=lambda record: (-record["pass@1"], -record["step"]))
        return [record["step"] for record in order[:count]]

    def steps(self) -> int:
        """How many steps were logged."""
        return max((record["step"] for record in self.read("metrics.jsonl")), default=0)

    def has_results(self) -> bool:
        """Whether a run left anything here that another config would mix with."""
        return (self.path / "checkpoints").is_dir() or any(self.read(name) for name in LOGS)

    def clear(self) -> None:
        """Removes what a run wrote, and nothing else."""
        for name in WRITTEN:
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def append(self, name: str, record: dict[str, Any], after: Lines | None = None) -> None:
        """Adds one line to a log, on disk later than the lines of the file `after`. While the disk is full
        lines wait for the next time."""
        self.logs[name].add(json.dumps(record, ensure_ascii=False) + "\n", after=after)
        if self.trackers is not None:
            self.trackers(name, record)

    def close(self) -> None:
        """Ends the trackers."""
        if self.trackers is not None:
            self.trackers.close()

    def settle(self) -> None:
        """Puts all that was logged on disk. Raises OSError where that can't be done."""
        for log in self.logs.values():
            log.settle()

    def read(self, name: str) -> list[dict[str, Any]]:
        """The records of a log; a last line that was cut off in writing is left out."""
        path = self.path / name
        # a process that was killed may have left half a character at the end
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        records = []
        for line in (text + "".join(self.logs[name].waiting)).split("\n"):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def rewind(self, step: int) -> None:
        """Drops what was logged after a step, before the run goes on from there."""
        for name in filter(lambda name: (self.path / name).is_file(), LOGS):
            kept = [record for record in self.read(name) if record["step"] <= step]
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
            self.replace(name, text)

    def replace(self, name: str, text: str) -> None:
        """Writes a file as a whole or not at all."""
        replace(self.path / name, text)

    def summary(self) -> dict[str, Any] | None:
        """What a finished run wrote last, or None."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else None


class OthersFolder(RunFolder):
    """The same folder for a process that isn't the main one, which alone writes."""

    def settle(self) -> None:
        """Nothing: the main process does."""

    def append(self, name: str, record: dict[str, Any], after: Lines | None = None) -> None:
        """Nothing: the main process does."""

    def rewind(self, step: int) -> None:
        """Nothing: the main process does."""

    def replace(self, name: str, text: str) -> None:
        """Nothing: the main process does."""


ERRORS = "backslashreplace"
"""Half a character, which UTF-8 can't hold, becomes an escape, which JSON can read."""


def replace(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all, and puts it on disk."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8", errors=ERRORS) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Lines:
    """Appends whole lines. While the disk is full they wait for the next time."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[str] = []
        self.first: list[Lines] = []
        """Files whose lines must be on disk before what waits here is written."""

    def add(self, *lines: str, after: Lines | None = None) -> None:
        """Lines that end in a line feed; on disk later than all of the file `after`."""
        self.waiting += lines
        self.first += [after] if after else []
        with suppress(OSError):
            self.write()

    def write(self) -> None:
        """Writes what waits, all of it or nothing. Raises OSError where that can't be done."""
        with shielded():  # a signal must not leave half a line, or write one twice
            self._write()

    def _write(self) -> None:
        for other in self.first:
            other.settle()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with self.path.open("a", encoding="utf-8", errors=ERRORS) as file:
                file.writelines(self.waiting)
        except OSError:
            if self.path.is_file():
                os.truncate(self.path, before)
            raise
        self.waiting, self.first = [], []

    def settle(self) -> None:
        """Puts everything on disk. Raises OSError where that can't be done."""
        self.write()
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
