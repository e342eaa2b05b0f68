"""Processes that run tasks with a time limit and can be killed: pebble's pool, started again if it breaks."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import RLock
from threading import Lock
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessPool

MOST_RESTARTS = 2
"""Times that the processes are started again without a call that ends; then they end as they start."""
CHECK_EVERY = 1.0
"""Seconds between two checks whether the processes of a call still run."""


class BrokenWorkersError(Exception):
    """The processes end as they start."""


class Workers:
    """Worker processes that are set up by `initializer(*initargs)`.

    pebble gives all tasks up if a process ends when it knows of no task that runs: the system kills an idle
    one for its memory, or a function ends its process before the news that it began arrives. Then the
    processes are started again, and each call that is waited for is sent to the new ones.
    """

    def __init__(self, initializer: Callable, initargs: tuple, path: Sequence[str], number: int | None):
        if _imports_script():
            raise SystemExit(1)  # of this process, which prints nothing; the main one says why
        self._initializer, self._initargs = initializer, initargs
        self._number = number or min(os.cpu_count() or 1, 8)
        self._context = start_server(path)
        self._pool, self._restarting = self._start(), Lock()
        self.restarts = 0
        """Times that the processes were started again since a call ended."""

    def call(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> Job:
        """Runs a function in a process, for at most `timeout` seconds."""
        return Job(self, function, args, timeout)

    def send(self, function: Callable[..., Any], args: tuple, timeout: float | None) -> Sent:
        """Sends a call to the processes, which are started again if need be."""
        while True:
            pool = self._pool
            try:
                return Sent(pool, pool.schedule(function, args=args, timeout=timeout))
            except RuntimeError as error:
                self._restart(pool, error)

    def _restart(self, broken: ProcessPool, error: RuntimeError) -> None:
        with self._restarting:
            if self._pool is not broken:  # another thread did
                return
            if self.restarts == MOST_RESTARTS:
                raise BrokenWorkersError from error
            self.restarts += 1
            self.close()
            self._pool = self._start()

    def close(self) -> None:
        """Ends the processes."""
        self._pool.stop()
        self._pool.join()

    def _start(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._number,
            initializer=self._initializer,
            initargs=self._initargs,
            context=self._context,
        )


class Sent(NamedTuple):
    """A call that was sent to a pool."""

    pool: ProcessPool
    future: Future

    def lost(self) -> bool:
        """Whether it will never end: it was given up, or came when the pool was just breaking."""
        if self.future.done():
            return not self.future.cancelled() and isinstance(self.future.exception(), BrokenProcessPool)
        return not self.pool.active


class Job:
    """A call of a function in a worker process."""

    def __init__(self, workers: Workers, function: Callable[..., Any], args: tuple, timeout: float | None):
        self._workers, self._call = workers, (function, args, timeout)
        self._sent = workers.send(*self._call)

    def done(self) -> bool:
        """Whether it ended, or was given up."""
        return self._sent.future.done()

    def wait(self) -> None:
        """Returns when it has ended."""
        while not wait([self._sent.future], CHECK_EVERY).done or self._sent.lost():
            if self._sent.lost():
                self._sent = self._workers.send(*self._call)

    def result(self) -> list | None:
        """What the function returned; None if it took too long or its process ended."""
        self.wait()
        try:
            result = self._sent.future.result()
        except (TimeoutError, ProcessExpired):
            result = None
        self._workers.restarts = 0
        return result

    def exit_code(self) -> int | None:
        """That of the process, if it ended before the function did."""
        error = self._sent.future.exception()
        return error.exitcode if isinstance(error, ProcessExpired) else None

    def cancel(self) -> None:
        """Ends the call."""
        self._sent.future.cancel()


def _imports_script() -> bool:
    """Whether this is a worker that imports the script of the main process, which starts workers itself."""
    frames = [frame for frame in inspect.stack(0) if frame.function == "<module>"]
    return any(frame.frame.f_globals.get("__name__") == "__mp_main__" for frame in frames)


class _Context(ForkServerContext):
    """Keeps the locks of a pool as long as it is there. pebble drops them, and so removes them from the
    system, before it ends its workers; one that is just starting would not find them and print a
    traceback."""

    def __init__(self) -> None:
        self.locks: list[RLock] = []

    def RLock(self) -> RLock:
        lock = super().RLock()
        self.locks.append(lock)
        return lock


def start_server(path: Sequence[str]) -> _Context:
    """Starts the process that workers are forked from, unless it runs, with `path` as its module path: files
    in the current folder must not stand in for the modules of libraries that it imports."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise ValueError(
            "rewards are graded in processes of a fork server, which this system lacks; use Linux, macOS, or "
            "Windows' subsystem for Linux"
        )
    context = _Context()
    context.set_forkserver_preload(["vlm_sapo.rewards.preload"])
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")}
    own, sys.path[:] = list(sys.path), path
    os.environ |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
    try:
        forkserver.ensure_running()
    finally:
        sys.path[:] = own
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context
