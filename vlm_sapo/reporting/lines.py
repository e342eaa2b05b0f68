"""A file of lines that is only ever appended to, and outlives a full disk."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from vlm_sapo.distributed import shielded

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
