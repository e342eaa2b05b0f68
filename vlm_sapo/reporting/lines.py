"""A file of lines that is only ever appended to, and outlives a full disk."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


class Lines:
    """Appends whole lines. While the disk is full they wait for the next time."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[str] = []

    def add(self, *lines: str) -> None:
        """Lines that end in a line feed."""
        self.waiting += lines
        with suppress(OSError):
            self.write()

    def write(self) -> None:
        """Writes what waits, all of it or nothing. Raises OSError where that can't be done."""
        before = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(self.waiting)
        except OSError:
            if self.path.is_file():
                os.truncate(self.path, before)
            raise
        self.waiting = []

    def settle(self) -> None:
        """Puts everything on disk. Raises OSError where that can't be done."""
        self.write()
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
