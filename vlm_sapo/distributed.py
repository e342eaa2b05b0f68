"""The processes of a run: collectives over Python objects, failures in one of them, and signals."""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(days=2)
"""How long a process waits for the others: one may write a large checkpoint or grade a difficult answer."""


class ElsewhereError(RuntimeError):
    """Another process failed; that process reports why."""


class Interrupted(Exception):
    """The run was asked to stop, and stopped between two steps."""

    def __init__(self, reason: str, *, alarm: bool = False):
        super().__init__(f"stopped: {reason}")
        self.alarm = alarm
        """Whether an alarm stopped it rather than a signal."""


class SignalDeferral:
    """Delays the exception of a signal to the end of a block, so that the block runs as a whole."""

    def __init__(self) -> None:
        self.depth = 0
        self.pending: Interrupted | None = None

    def raise_or_defer(self, error: Interrupted) -> None:
        """Raises the error now, or at the end of the block that is running. For the main thread only."""
        if not self.depth:
            raise error
        self.pending = error

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Does nothing in other threads, which get no signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.depth += 1
        try:
            yield
        except BaseException:
            self.pending = None  # the block's own error comes first; Interruption remembers the signal
            raise
        finally:
            self.depth -= 1
        if self.pending is not None and not self.depth:
            error, self.pending = self.pending, None
            raise error


deferring_signals = SignalDeferral()


class World:
    """All processes of a run, or the only one. All processes must call a method that says so, in the same
    order; a process that fails calls `fail_everywhere` instead, which raises ElsewhereError in the others.

    Objects travel between hosts by gloo, separately from the traffic between devices.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        self.size, self.rank, self._group = 1, 0, None
        self._reported: BaseException | None = None
        if dist.is_initialized():
            self.size, self.rank = dist.get_world_size(), dist.get_rank()
            self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def is_local(self, slot: int) -> bool:
        """Whether this slot of a step belongs to this process."""
        return slot % self.size == self.rank

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, by rank. All call it."""
        if self.size == 1:
            return [value]
        return [theirs for theirs, _ in self._exchange(value, None)]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, in the main process; an empty list in the others. All call
        it."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        self.barrier()
        values: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def exchange(self, values: Mapping[int, Any]) -> dict[int, Any]:
        """Sends a value to each of some other processes; returns the values sent to this one, by sender. No
        value passes through a third process. All call it."""
        if self.size == 1:
            return {}
        import torch
        import torch.distributed as dist

        packed = {rank: torch.frombuffer(pack(value), dtype=torch.uint8) for rank, value in values.items()}
        sizes = self.all_gather({rank: len(content) for rank, content in packed.items()})
        received = {
            sender: torch.empty(theirs[self.rank], dtype=torch.uint8)
            for sender, theirs in enumerate(sizes)
            if self.rank in theirs
        }
        transfers = [dist.isend(content, rank, group=self._group) for rank, content in packed.items()]
        transfers += [dist.irecv(content, sender, group=self._group) for sender, content in received.items()]
        for transfer in transfers:
            transfer.wait()
        return {sender: pickle.loads(content.numpy()) for sender, content in received.items()}

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` in the main process only and returns its result in all. All call it."""
        try:
            value = work() if self.main else None
        except Exception as error:
            self.fail_everywhere(error)
            raise
        return self.all_gather(value)[0]

    def barrier(self) -> None:
        """Waits until all processes call it."""
        self.all_gather(None)

    def fail_everywhere(self, error: BaseException) -> None:
        """Reports this process's failure to the others, once for each error."""
        if self.size > 1 and error is not self._reported:
            self._reported = error
            self._exchange(None, f"{error}")

    def _exchange(self, value: Any, error: str | None) -> Sequence[tuple[Any, str | None]]:
        import torch.distributed as dist

        pairs: list[Any] = [None] * self.size
        dist.all_gather_object(pairs, (value, error), group=self._group)
        failed = [f"process {rank}: {reason}" for rank, (_, reason) in enumerate(pairs) if reason is not None]
        if failed and error is None:
            self._reported = ElsewhereError("; ".join(failed))
            raise self._reported
        return pairs


def pack(value: Any) -> bytearray:
    """The value, pickled. A tensor takes the bytes of its elements, also if it is a view of a larger one, and
    is unpickled into host memory."""
    import torch

    class TensorPickler(pickle.Pickler):
        def reducer_override(self, item: Any) -> Any:
            if not isinstance(item, torch.Tensor):
                return NotImplemented
            content = item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            return _tensor, (pickle.PickleBuffer(content), item.dtype, item.shape)

    stream = io.BytesIO()
    TensorPickler(stream, protocol=5).dump(value)
    return bytearray(stream.getbuffer())


def _tensor(content: bytearray, dtype: Any, shape: Sequence[int]) -> Any:
    import torch

    empty = torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).view(shape) if len(content) else empty
