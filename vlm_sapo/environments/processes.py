"""Processes that play episodes: one for each response between its turns, with a time limit for each answer.

A first process imports the environment's module once; it forks the others, which are killed if they take too
long. An error there ends one episode, not the run.
"""

from __future__ import annotations

import atexit
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pickle import PicklingError
from typing import Any, Literal, NamedTuple

import cloudpickle
import numpy as np

from vlm_sapo.environments.environment import Environment, Observation, checked
from vlm_sapo.rewards.workers import start_server
from vlm_sapo.search_path import library_path
from vlm_sapo.types import Example, ResponseText

START_TIMEOUT = 120.0
"""Seconds for importing the environment's module and creating the first environment."""


@dataclass(frozen=True)
class Failure:
    """Why an environment gave no answer."""

    kind: Literal["timeout", "error"]
    detail: str


class Step(NamedTuple):
    """A turn for an instance to answer."""

    instance: Instance
    response: ResponseText


class Instance:
    """An environment of one response. It gets a process with its first turn."""

    def __init__(self, example: bytes, seed: int):
        self.example, self.seed = example, seed
        self.process: _Process | None = None


@dataclass(eq=False)
class _Process:
    connection: Connection
    pid: int
    busy: bool = False

    def end(self) -> None:
        """Ends it: at once, with the processes that it started, if it computes; else with the end of the
        connection."""
        self.connection.close()
        if self.busy:
            for kill in (os.killpg, os.kill):  # it leads a group as soon as it runs
                with suppress(ProcessLookupError):
                    kill(self.pid, signal.SIGKILL)

    @property
    def ended(self) -> bool:
        """Whether an idle process is no longer there."""
        return self.connection.poll()


class Environments:
    """Plays episodes of the environments that `make` creates. At most `workers` of them compute at the same
    time, each answer for at most `timeout` seconds, the reset before the first one included."""

    def __init__(self, make: Callable[[], Environment], *, timeout: float, workers: int):
        self.timeout, self.workers = timeout, workers
        self._make = _pickled(make)
        self._idle: list[_Process] = []
        self._first: Any = None
        self._control: socket.socket | None = None
        self._closed = False
        atexit.register(self.close)

    def new(self, examples: Sequence[Example], seeds: Sequence[Sequence[int]]) -> list[list[Instance]]:
        """Instances for the responses to each example, by the seeds of their random numbers."""
        pickled = [cloudpickle.dumps(example) for example in examples]
        return [[Instance(data, seed) for seed in own] for data, own in zip(pickled, seeds, strict=True)]

    def step(self, steps: Sequence[Step]) -> list[Observation | Failure]:
        """The answers, in order. An instance that fails loses its process."""
        answers: list[Observation | Failure | None] = [None] * len(steps)
        waiting = list(enumerate(steps))[::-1]
        running: dict[Connection, tuple[int, Instance, float]] = {}
        while waiting or running:
            while waiting and len(running) < self.workers:
                index, step = waiting.pop()
                connection = self._send(step)
                running[connection] = index, step.instance, time.monotonic() + self.timeout
            first = min(deadline for _, _, deadline in running.values())
            for connection in wait(list(running), max(first - time.monotonic(), 0.0)):
                index, instance, _ = running.pop(connection)
                answers[index] = self._receive(instance)
            now = time.monotonic()
            for connection, (index, instance, deadline) in list(running.items()):
                if deadline <= now:
                    del running[connection]
                    self._drop(instance)
                    answers[index] = Failure("timeout", f"no answer within {self.timeout:g} s")
        return answers

    def release(self, instances: Sequence[Instance]) -> None:
        """Takes the processes of finished episodes back; those that still compute are ended."""
        for instance in instances:
            process, instance.process = instance.process, None
            if process is not None and process.busy:
                process.end()
            elif process is not None and not self._closed:
                self._idle.append(process)
            elif process is not None:
                process.end()

    def start(self) -> None:
        """Starts the first process unless it runs, and creates an environment there. Raises ValueError if
        that fails."""
        if self._control is not None:
            return
        if self._closed:
            raise ValueError(
                "the environments of this run are closed already; this is a bug, please report it"
            )
        _raise_file_limit()
        context = start_server(library_path())
        own, other = context.Pipe()
        setup = (self._make, list(sys.path), dict(os.environ))
        self._first = context.Process(target=_first_process, args=(other, *setup), daemon=True)
        self._first.start()
        other.close()
        if not own.poll(START_TIMEOUT):
            self._first.kill()
            raise ValueError(
                f"the environment's module could not be imported within {START_TIMEOUT:g} s; shorten what it "
                "does when it is imported, or move it into reset"
            )
        with suppress(EOFError):
            if (problem := own.recv()) is None:
                self._control = socket.socket(fileno=os.dup(own.fileno()))
                own.close()
                return
            raise ValueError(f"rollout.environment: {problem}")
        raise ValueError("the process that creates environments ended; run its module by itself to see why")

    def close(self) -> None:
        """Ends all processes."""
        atexit.unregister(self.close)
        self._closed = True
        self._end_all()

    def _end_all(self) -> None:
        """Ends the first process and those that wait for an episode."""
        idle, self._idle = self._idle, []
        for process in idle:
            process.end()
        control, self._control = self._control, None
        if control is not None:
            control.close()
            self._first.join(5.0)
            if self._first.is_alive():
                self._first.kill()

    def _new_process(self) -> _Process:
        """One that waits, or a new one. Starts the first process again, once, if the system ended it."""
        while self._idle:
            process = self._idle.pop()
            if not process.ended:
                return process
            process.end()
        self.start()
        try:
            return self._fork()
        except (BrokenPipeError, ConnectionResetError, EOFError):
            self._end_all()
            self.start()
            return self._fork()

    def _fork(self) -> _Process:
        try:
            own, other = socket.socketpair()
        except OSError as error:
            raise ValueError(
                f"rollout.environment needs a process and a file for each response in progress ({error}); "
                "raise `ulimit -n`, or lower train.prompts_per_step"
            ) from error
        with other:
            socket.send_fds(self._control, [b"f"], [other.fileno()])
        if not (pid := self._control.recv(32)):
            own.close()
            raise EOFError
        return _Process(Connection(own.detach()), int(pid))

    def _send(self, step: Step) -> Connection:
        instance, example = step.instance, None
        if instance.process is None:
            example = instance.example, instance.seed
            instance.process = self._new_process()
        process = instance.process
        process.busy = True
        with suppress(BrokenPipeError, ConnectionResetError):  # it ended: `_receive` says so
            process.connection.send((example, step.response))
        return process.connection

    def _receive(self, instance: Instance) -> Observation | Failure:
        """The answer. After an error the process ends, with what the environment left there."""
        process = instance.process
        try:
            problem, observation = process.connection.recv()
        except (EOFError, ConnectionResetError):
            problem = "the environment's process ended"
        except Exception:  # a value of a class that is not known here
            problem = traceback.format_exc()
        process.busy = False
        if problem is None:
            return observation
        self._drop(instance)
        return Failure("error", problem)

    @staticmethod
    def _drop(instance: Instance) -> None:
        instance.process.end()
        instance.process = None


def _pickled(make: Callable[[], Environment]) -> bytes:
    try:
        return cloudpickle.dumps(make)
    except (PicklingError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"the environment can't be sent to the processes that play it ({error}); define it at the top "
            "level of a module, and let reset create what it uses"
        ) from error


def _first_process(
    connection: Connection, make: bytes, path: Sequence[str], variables: Mapping[str, str]
) -> None:
    """Imports the environment's module, then forks a process for each request until the run ends."""
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends its processes
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        factory = cloudpickle.loads(make)
        environment = factory()
    except BaseException:
        connection.send(
            f"the environment cannot be created in a process of its own:\n{traceback.format_exc()}"
        )
        return
    missing = [name for name in ("reset", "step") if not callable(getattr(environment, name, None))]
    if missing:
        connection.send(
            "an environment must have the methods reset(example) and step(response); "
            f"{type(environment).__name__} has no {' and no '.join(missing)}: add it"
        )
        return
    connection.send(None)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    with socket.socket(fileno=os.dup(connection.fileno())) as control:
        while True:
            message, files, _, _ = socket.recv_fds(control, 1, 1)
            if not message:
                return
            if pid := os.fork():
                os.close(files[0])
                control.sendall(str(pid).encode())
                continue
            control.close()
            connection.close()
            _play(Connection(files[0]), factory)
            os._exit(0)


def _play(connection: Connection, make: Callable[[], Environment]) -> None:
    """Answers turns until the run closes the connection."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    environment: Environment | None = None
    while True:
        try:
            begin, response = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            if begin is not None:
                example, seed = begin
                _seed(seed)
                environment = make()
                environment.reset(cloudpickle.loads(example))
            answer = None, checked(environment.step(response))
        except Exception:
            answer = traceback.format_exc(), None
        try:
            connection.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception:  # a value that can't be pickled
            connection.send((traceback.format_exc(), None))


def _raise_file_limit() -> None:
    """As many open files as the system allows: there is one for each response in progress."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _seed(seed: int) -> None:
    """Sets the random numbers of an episode, so that a resumed run plays it as before."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _end_with_parent(parent: int) -> None:
    """Ends this process with the one that forked it, so that a killed run leaves none that computes."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
