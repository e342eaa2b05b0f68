"""The files of a run's folder: `config.yaml, metrics.jsonl, rollouts.jsonl, evaluations.jsonl,
summary.json`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

LOGS = ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl")
WRITTEN = ("config.yaml", *LOGS, "summary.json", "curves.png", "checkpoints", "evaluations", "final")


class RunFolder:
    """Reads and appends to a run's files. A line is flushed as it is written."""

    def __init__(self, path: Path):
        self.path = path

    def open(self, config: str, *, overwrite: bool) -> None:
        """Makes the folder, or checks that what is there belongs to the same config.

        Raises ValueError when the folder holds a run of another config, or something that is no run.
        """
        stored = self.path / "config.yaml"
        if overwrite:
            self.clear()
        elif not stored.is_file() and self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(f"run.dir ({self.path}) must be empty or hold a run; choose another folder")
        elif self.has_results() and stored.read_text() != config:
            lines = set(config.splitlines()) ^ set(stored.read_text().splitlines())
            raise ValueError(
                f"run.dir ({self.path}) holds a run with another config, which differs in: "
                f"{'; '.join(sorted(line.strip() for line in lines)[:8])}. Choose another run.dir, "
                "or start anew with run.overwrite=true"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        stored.write_text(config)

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

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Adds one line to a log."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def read(self, name: str) -> list[dict[str, Any]]:
        """The records of a log; a last line that was cut off in writing is left out."""
        path = self.path / name
        if not path.is_file():
            return []
        records = []
        for line in path.read_text(encoding="utf-8").split("\n"):
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
        temporary = self.path / f".{name}.partial"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path / name)

    def summary(self) -> dict[str, Any] | None:
        """What a finished run wrote last, or None."""
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else None


class OthersFolder(RunFolder):
    """The same folder for a process that isn't the main one, which alone writes."""

    def open(self, config: str, *, overwrite: bool) -> None:
        """Nothing: the main process has."""

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Nothing: the main process does."""

    def rewind(self, step: int) -> None:
        """Nothing: the main process does."""

    def replace(self, name: str, text: str) -> None:
        """Nothing: the main process does."""
