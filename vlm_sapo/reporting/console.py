"""Console output of a run: a progress bar with the main metrics, or plain lines without a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

TABLE_WIDTH = 160
"""Columns of a table without a terminal."""
SPEED_WINDOW = 3600.0
"""Seconds of recent steps that the remaining time is estimated from."""
PROGRESS_LINES = 20
"""Most progress lines of a run without a terminal."""


def escape_control(text: str) -> str:
    """The text with control characters and marks of writing direction escaped, so that a response can't
    control the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class ShowProgress(Protocol):
    """Shows that `done` of the work's items are finished, with some metrics as text."""

    def __call__(self, done: int, text: str = "") -> None: ...


def duration(seconds: float) -> str:
    """A duration such as 5 min, 3 h 20 min or 2 d 4 h."""
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class Console:
    """Prints to standard output."""

    def __init__(self) -> None:
        # a notebook gets plain lines too: elsewhere each would be an output of its own
        terminal = False if RichConsole().is_jupyter else None
        self.rich = RichConsole(highlight=False, soft_wrap=True, force_jupyter=False, force_terminal=terminal)
        if not self.rich.is_terminal:
            self.rich.width = TABLE_WIDTH

    def say(self, text: str) -> None:
        self._print(escape(escape_control(text)))

    def warn(self, text: str) -> None:
        """One line that is marked as a warning."""
        self._print(f"[bold yellow]warning:[/] {escape(escape_control(text))}")

    def _print(self, content: str | Table) -> None:
        with suppress(OSError):  # a closed terminal or a full disk must not end the run
            self.rich.print(content)

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        """A table: first and last column left-aligned, the others right-aligned; only the last one wraps."""
        table = Table(box=None, pad_edge=False, padding=(0, 2))
        last = len(header) - 1
        for number, name in enumerate(header):
            table.add_column(name, justify="left" if number in (0, last) else "right", no_wrap=number < last)
        for row in rows:
            table.add_row(*(escape(escape_control(cell)) for cell in row))
        self._print(table)

    @contextmanager
    def progress(
        self, name: str, total: int, start: int = 0, lines: int = PROGRESS_LINES
    ) -> Iterator[ShowProgress]:
        """Yields a function `(done, text="")` that shows progress: a bar on a terminal, elsewhere about
        `lines` lines."""
        if not self.rich.is_terminal:
            start_time = time.perf_counter()

            def show(done: int, text: str = "") -> None:
                rate = (time.perf_counter() - start_time) / max(done - start, 1)
                self._line(name, done, total, text, lines, left=rate * (total - done))

            yield show
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.rich, speed_estimate_period=SPEED_WINDOW) as bar:
            task = bar.add_task(name, total=total, completed=start, text="")

            def move(done: int, text: str = "") -> None:
                bar.update(task, completed=done, text=text)

            yield move

    def _line(self, name: str, done: int, total: int, text: str, lines: int, left: float) -> None:
        stride = max(1, total // lines)
        if text and (done % stride == 0 or done in (1, total)):
            self.say(f"{name} {done}/{total}  {text}" + (f"  {duration(left)} left" if left >= 60 else ""))

    def samples(self, records: Iterable[dict]) -> None:
        """Some problems with the model's first response, for people to read."""
        for record in records:
            mark = "right" if record["scores"][0] >= 1 else "wrong"
            problem, response = " ".join(record["problem"].split()), " ".join(record["responses"][0].split())
            self.say(f"    {problem[:100]} -> {response[:160]}  ({mark}; gold: {record['answer'][:40]})")


class SilentConsole(Console):
    """For all processes but the main one: prints nothing."""

    def _print(self, content: str | Table) -> None:
        pass

    @contextmanager
    def progress(
        self, name: str, total: int, start: int = 0, lines: int = PROGRESS_LINES
    ) -> Iterator[ShowProgress]:
        yield _show_nothing


def _show_nothing(done: int, text: str = "") -> None:
    pass
