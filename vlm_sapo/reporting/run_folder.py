"""The files of a run's folder: `config.yaml`, the logs, `summary.json`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from vlm_sapo.distributed import deferring_signals

EVALUATIONS = "evaluations.jsonl"
LOGS = ("metrics.jsonl", "histograms.jsonl", "rollouts.jsonl", "traces.jsonl", EVALUATIONS)
MEASURED = ("rows", "settings")
"""Hashes in an evaluation's record: of its rows, and of how responses are sampled and graded."""
RUN_FILES = (
    "config.yaml",
    "environment.json",
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
"""All that a run writes; `clear` removes these."""


class Listener(Protocol):
    """Is told of what a run writes: trackers and callbacks."""

    def __call__(self, event: str, record: Mapping[str, Any]) -> None:
        """A line of the log `event`, or a complete `checkpoint` with `step` and `path`."""

    def close(self) -> None: ...


class RunFolder:
    """Reads and writes a run's files. Each line of a log is written when it is appended."""

    def __init__(self, path: Path):
        self.path = path
        self.logs = {name: Lines(path / name) for name in LOGS}
        self.listeners: list[Listener] = []

    def stored(self) -> str | None:
        """The config of an earlier run whose results are here, or None.

        Raises ValueError for a folder with files that are no run's.
        """
        stored = self.path / "config.yaml"
        if not stored.is_file() and self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(f"run.dir ({self.path}) must be empty or hold a run; choose another folder")
        return stored.read_text() if self.has_results() else None

    def begin(self, config: str) -> None:
        """Creates the folder and writes `config.yaml`."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.replace("config.yaml", config)

    def unfinish(self) -> None:
        """Removes the summary, so that a finished run can continue."""
        (self.path / "summary.json").unlink(missing_ok=True)

    def evaluations(self) -> list[dict[str, Any]]:
        """The records of `evaluations.jsonl` that can be compared: of each name those that were measured as
        its last one was."""
        records = self.read(EVALUATIONS)
        last = {record["name"]: record for record in records}
        alike = [record for record in records if measured_alike(record, last[record["name"]])]
        return list({(record["name"], record["step"]): record for record in alike}.values())

    def best(self, count: int, name: str) -> list[int]:
        """The `count` steps with the best pass@1 in the evaluation `name`, of equal ones the later."""
        records = [record for record in self.evaluations() if record["name"] == name]
        order = sorted(records, key=lambda record: (-record["pass@1"], -record["step"]))
        return [record["step"] for record in order[:count]]

    def steps(self) -> int:
        """The last logged step."""
        return max((record["step"] for record in self.read("metrics.jsonl")), default=0)

    def has_results(self) -> bool:
        """Whether a run has written checkpoints or logs here."""
        return (self.path / "checkpoints").is_dir() or any(self.read(name) for name in LOGS)

    def clear(self) -> None:
        """Removes the files of a run and nothing else."""
        for name in RUN_FILES:
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def append(self, name: str, record: dict[str, Any], after: Lines | None = None) -> None:
        """Appends a line to a log; it reaches the disk after the lines of the file `after`. While the disk is
        full, lines are kept and written with a later one."""
        self.logs[name].add(json.dumps(record, ensure_ascii=False) + "\n", after=after)
        self.announce(name, record)

    def announce(self, event: str, record: Mapping[str, Any]) -> None:
        """Tells the listeners."""
        for listener in self.listeners:
            listener(event, record)

    def close(self) -> None:
        """Closes the listeners."""
        for listener in self.listeners:
            listener.close()

    def flush(self) -> None:
        """Syncs all logs to disk. Raises OSError if that fails."""
        for log in self.logs.values():
            log.flush()

    def read(self, name: str) -> list[dict[str, Any]]:
        """The records of a log, without a last line that was written only in part."""
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
        """Drops what was logged after `step`, before the run resumes from there."""
        for name in (name for name in LOGS if (self.path / name).is_file()):
            records = [record for record in self.read(name) if record["step"] <= step]
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            self.replace(name, text)

    def replace(self, name: str, text: str) -> None:
        """Writes a file atomically."""
        replace(self.path / name, text)

    def summary(self) -> dict[str, Any] | None:
        """The contents of `summary.json`, which a finished run has, or None."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else None


def measured_alike(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two evaluations are of the same rows with the same settings, as far as their records say:
    earlier versions wrote nothing about it."""
    return all(
        first.get(key) is None or second.get(key) is None or first[key] == second[key] for key in MEASURED
    )


class ReadOnlyRunFolder(RunFolder):
    """The folder for all processes but the main one, which alone writes: writing does nothing."""

    def flush(self) -> None:
        pass

    def append(self, name: str, record: dict[str, Any], after: Lines | None = None) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def replace(self, name: str, text: str) -> None:
        pass


ENCODING_ERRORS = "backslashreplace"
"""A lone surrogate, which UTF-8 can't encode, becomes an escape that JSON can read."""


def replace(path: Path, text: str) -> None:
    """Writes a file atomically and syncs it to disk."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8", errors=ENCODING_ERRORS) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Lines:
    """Appends whole lines to a file. While the disk is full, lines are kept and written with a later one."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[str] = []
        self.earlier: list[Lines] = []
        """Files whose lines must be on disk before the waiting lines are written."""

    def add(self, *lines: str, after: Lines | None = None) -> None:
        """Appends lines that end in a line feed; they reach the disk after those of the file `after`."""
        self.waiting += lines
        self.earlier += [after] if after else []
        with suppress(OSError):
            self.write()

    def write(self) -> None:
        """Writes all waiting lines or none. Raises OSError if that fails."""
        with deferring_signals():  # a signal must not leave half a line, or write one twice
            self._write()

    def _write(self) -> None:
        for other in self.earlier:
            other.flush()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with self.path.open("a", encoding="utf-8", errors=ENCODING_ERRORS) as file:
                file.writelines(self.waiting)
        except OSError:
            if self.path.is_file():
                os.truncate(self.path, before)
            raise
        self.waiting, self.earlier = [], []

    def flush(self) -> None:
        """Syncs all lines to disk. Raises OSError if that fails."""
        self.write()
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
