"""The processes of a run, and what they tell each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = timedelta(days=2)
"""How long a process waits for the others: one may write a large checkpoint or grade a difficult answer."""


class ElsewhereError(RuntimeError):
    """Another process failed, and says why itself."""


class Interrupted(Exception):
    """The run was asked to stop, and did so between two steps."""

    def __init__(self, reason: str, *, alarm: bool = False):
        super().__init__(f"stopped: {reason}")
        self.alarm = alarm
        """Whether an alarm asked for it, and not a signal."""


class Shield:
    """Keeps signals from ending a block halfway; what they ask for happens at its end."""

    def __init__(self) -> None:
        self.depth = 0
        self.barriering: Interrupted | None = None

    def raises(self, error: Interrupted) -> None:
        """Raises the error, at once or when the block ends. In the main thread alone."""
        if not self.depth:
            raise error
        self.barriering = error

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Only the main thread gets signals, and only it needs this."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.depth += 1
        try:
            yield
        except BaseException:
            self.barriering = None  # the block's own failure comes first; who was asked to stop remembers it
            raise
        finally:
            self.depth -= 1
        if self.barriering is not None and not self.depth:
            error, self.barriering = self.barriering, None
            raise error


shielded = Shield()


class World:
    """All processes of a run, or the only one. Where a method says so, all processes must call it, in the
    same order; one that fails instead calls `fail_everywhere`, which raises ElsewhereError in the others.

    What is told goes from host to host, beside the traffic between devices.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        self.size, self.rank, self._group = 1, 0, None
        self._known: BaseException | None = None
        if dist.is_initialized():
            self.size, self.rank = dist.get_world_size(), dist.get_rank()
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def is_local(self, place: int) -> bool:
        """Whether the prompt at this place of a step is this process's."""
        return place % self.size == self.rank

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, by rank. All call it."""
        if self.size == 1:
            return [value]
        return [told for told, _ in self._exchange(value, None)]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, in the main one, and nothing in the others. All call it."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        self.barrier()
        found: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(value, found, dst=0, group=self._group)
        return found or []

    def on_main(self, work: Callable[[], T]) -> T:
        """What the main process's `work` gives; the others don't run theirs. All call it."""
        try:
            value = work() if self.main else None
        except Exception as error:
            self.fail_everywhere(error)
            raise
        return self.all_gather(value)[0]

    def barrier(self) -> None:
        """Until all are here. All call it."""
        self.all_gather(None)

    def fail_everywhere(self, error: BaseException) -> None:
        """Says that this process failed, unless it or the others know already."""
        if self.size > 1 and error is not self._known:
            self._known = error
            self._exchange(None, f"{error}")

    def _exchange(self, value: Any, error: str | None) -> Sequence[tuple[Any, str | None]]:
        import torch.distributed as dist

        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, (value, error), group=self._group)
        failed = [f"process {rank}: {reason}" for rank, (_, reason) in enumerate(told) if reason is not None]
        if failed and error is None:
            self._known = ElsewhereError("; ".join(failed))
            raise self._known
        return told
