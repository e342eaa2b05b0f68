"""What a run prints: a progress bar with the numbers that matter, or plain lines where there is no
terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

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

WIDTH = 160
"""Of tables where there is no terminal."""
SPEED = 3600.0
"""Seconds whose steps tell how much time is left."""
LINES = 20
"""Lines that a run without a terminal prints at most for its steps."""


def visible(text: str) -> str:
    """The text with control characters, and what turns the writing around, as codes: a response must not
    command the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def duration(seconds: float) -> str:
    """Such as 5 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class Console:
    """Prints to standard output; `progress` shows a bar on a terminal and a line now and then elsewhere."""

    def __init__(self) -> None:
        self.rich = RichConsole(highlight=False, soft_wrap=True)
        if not self.rich.is_terminal:
            self.rich.width = WIDTH

    def say(self, text: str) -> None:
        """One line."""
        self._print(escape(visible(text)))

    def warn(self, text: str) -> None:
        """One line that stands out."""
        self._print(f"[bold yellow]warning:[/] {escape(visible(text))}")

    def _print(self, what: str | Table) -> None:
        """A run outlives whoever listened, and the disk that its output goes to."""
        with suppress(OSError):
            self.rich.print(what)

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        """A table, the first column on the left, the others on the right but the last, which may wrap."""
        table = Table(box=None, pad_edge=False, padding=(0, 2))
        last = len(header) - 1
        for number, name in enumerate(header):
            table.add_column(name, justify="left" if number in (0, last) else "right", no_wrap=number < last)
        for row in rows:
            table.add_row(*(escape(visible(cell)) for cell in row))
        self._print(table)

    @contextmanager
    def progress(self, name: str, total: int, start: int = 0, lines: int = LINES) -> Iterator[Progress]:
        """Yields a function `(done, text)` that shows how far the work is; without a terminal in about so
        many lines."""
        if not self.rich.is_terminal:
            begun = time.perf_counter()

            def show(done: int, text: str = "") -> None:
                rate = (time.perf_counter() - begun) / max(done - start, 1)
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
        with Progress(*columns, console=self.rich, speed_estimate_period=SPEED) as bar:
            task = bar.add_task(name, total=total, completed=start, text="")
            yield lambda done, text="": bar.update(task, completed=done, text=text)

    def _line(self, name: str, done: int, total: int, text: str, lines: int, left: float) -> None:
        stride = max(1, total // lines)
        if text and (done % stride == 0 or done in (1, total)):
            self.say(f"{name} {done}/{total}  {text}" + (f"  {duration(left)} left" if left >= 60 else ""))

    def samples(self, records: Iterable[dict]) -> None:
        """Problems with the model's response, so that a person sees what it says."""
        for record in records:
            mark = "right" if record["scores"][0] >= 1 else "wrong"
            problem, response = " ".join(record["problem"].split()), " ".join(record["responses"][0].split())
            self.say(f"    {problem[:100]} -> {response[:160]}  ({mark}; gold: {record['answer'][:40]})")


class SilentConsole(Console):
    """Of the processes beside the main one, which says it all."""

    def say(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        """Nothing."""

    @contextmanager
    def progress(self, name: str, total: int, start: int = 0, lines: int = LINES) -> Iterator[Progress]:
        """Nothing."""
        yield lambda done, text="": None
