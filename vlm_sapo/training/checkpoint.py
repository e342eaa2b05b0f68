"""Checkpoints: written aside, listed in a manifest and renamed: a torn one is never taken for whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from vlm_sapo.distributed import World
from vlm_sapo.reporting.console import Console
from vlm_sapo.training.policy import Policy

NAME = re.compile(r"step_(\d+)")
MANIFEST = "manifest.json"
FAILURES = (OSError, SafetensorError)
"""What writing to a full or broken disk raises."""


@dataclass
class Progress:
    """Where a run stands: steps done, seconds spent, updates of the weights, and how many of the last ones
    were left out."""

    step: int = 0
    seconds: float = 0.0
    updates: int = 0
    left_out: int = 0
    reuse_sampled: bool = False
    """Whether the engine's log-probs serve as old ones; decided at the start of the run."""

    def advance(self, step: int, seconds: float) -> None:
        """A step is done; it took so long."""
        self.step, self.seconds = step, self.seconds + seconds


class TornError(ValueError):
    """A checkpoint's files are not those that its manifest lists."""


class Checkpoints:
    """The checkpoints of a run, `step_<n>` in a folder: model or adapter, optimizer, progress, state of the
    rollouts, and a manifest with every file's size and SHA-256.

    The newest `last` stay, and those of the steps that `best` names. With `background` they are written
    while training goes on, from a copy in host memory. A disk that is full leaves the ones before whole; the
    run goes on with a warning, or stops, as `on_error` says. `settle_logs` puts on disk what was logged.
    """

    def __init__(
        self,
        folder: Path,
        *,
        console: Console,
        world: World,
        last: int = 2,
        best: Callable[[], Sequence[int]] = list,
        background: bool = False,
        on_error: Literal["warn", "stop"] = "warn",
        settle_logs: Callable[[], None] = lambda: None,
    ):
        self.folder, self.console, self.world = folder, console, world
        self.last, self.best, self.on_error, self.settle_logs = last, best, on_error, settle_logs
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self.pending: Future[None] | None = None
        self.newest_step: int | None = None
        """Step of the newest one that was begun or found."""

    def save(self, policy: Policy, progress: Progress, rollouts: dict[str, Any]) -> None:
        """Writes one. All processes call it."""
        self.settle()
        progress.updates, progress.reuse_sampled = policy.vlm.version, policy.reuse_sampled
        progress.left_out = policy.guard.in_a_row
        self.newest_step = progress.step
        parts = policy.parts(keep=self.world.main, copy=self.worker is not None)
        state = partial_state(progress, rollouts)
        if not self.world.main:
            for _ in parts:
                pass
        elif self.worker is not None:
            copies = [state, *parts]
            logged = _done(self.settle_logs)  # here, since lines are added to the logs meanwhile
            write = self.worker.submit
            self.pending = logged if logged.exception() else write(self._write, progress.step, copies)
        else:
            self.pending = _done(self._write, progress.step, _all(state, parts), first=self.settle_logs)
        if self.worker is None:
            self.settle()

    def settle(self) -> None:
        """Waits for the one that is being written. All processes call it."""
        if not self.world.on_main(self._settle):
            self.newest_step = None

    def _settle(self) -> bool:
        pending, self.pending = self.pending, None
        if pending is None:
            return True
        try:
            pending.result()
        except FAILURES as error:
            text = f"a checkpoint could not be written ({error}); the ones before in {self.folder} are whole"
            if self.on_error == "stop":
                raise ValueError(f"{text}; make room, then start the same command again") from error
            self.console.warn(f"{text}, and the run goes on (checkpoint.on_error)")
            return False
        return True

    def close(self) -> None:
        """Ends what writes in the background."""
        if self.worker is not None:
            self.worker.shutdown()

    def _write(
        self, step: int, parts: Iterable[Callable[[Path], None]], first: Callable[[], None] = lambda: None
    ) -> None:
        target = self.folder / f"step_{step:06d}"
        aside = self.folder / f".{target.name}.partial"
        remaining = iter(parts)
        try:
            first()
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            for part in remaining:
                part(aside)
            _seal(aside)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(aside, target)
            _sync(self.folder)
            self._prune()
        except Exception:
            for _ in remaining:  # other processes give their parts
                pass
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _prune(self) -> None:
        steps = _steps(self.folder)
        for step in set(steps) - set(steps[-self.last :]) - set(self.best()):
            shutil.rmtree(self.folder / f"step_{step:06d}")

    def newest(self) -> Path | None:
        """The newest whole one, or None where there never was one; torn ones are named in a warning and
        renamed. Raises ValueError where all are torn. All processes call it."""
        found = self.world.on_main(self._newest)
        self.newest_step = int(NAME.fullmatch(found.name)[1]) if found else None
        return found

    def _newest(self) -> Path | None:
        for partial in self.folder.glob(".step_*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        torn = []
        for step in reversed(_steps(self.folder)):
            path = self.folder / f"step_{step:06d}"
            try:
                check(path)
            except TornError as error:
                torn.append((path, error))
                continue
            for other, error in torn:
                self.console.warn(f"{error}; an older one is taken, and it is called torn_{other.name} now")
                other.rename(other.with_name(f"torn_{other.name}"))
            return path
        if torn:
            raise ValueError(
                f"no checkpoint of this run is whole ({'; '.join(str(error) for _, error in torn)}); put one "
                "back, or start anew with run.overwrite=true"
            )
        return None


def partial_state(progress: Progress, rollouts: dict[str, Any]) -> Callable[[Path], None]:
    """What writes progress and state as they are now."""
    text = json.dumps(asdict(progress))

    def write(folder: Path) -> None:
        torch.save(rollouts, buffer := io.BytesIO())  # which, unlike a file, can't be full
        (folder / "rollouts.pt").write_bytes(buffer.getvalue())
        (folder / "progress.json").write_text(text)

    return write


def restore(path: Path, policy: Policy) -> tuple[Progress, dict[str, Any]]:
    """Loads the optimizer; the model is loaded from `path` like any model. Returns where the run stood, and
    the state of the rollouts. The number of processes may be another than when it was written."""
    policy.load_optimizer(path)
    progress = Progress(**json.loads((path / "progress.json").read_text()))
    policy.vlm.version, policy.reuse_sampled = progress.updates, progress.reuse_sampled
    policy.guard.in_a_row = progress.left_out
    return progress, torch.load(path / "rollouts.pt", weights_only=True)


def check(path: Path) -> None:
    """Raises TornError where a checkpoint's files are not those of its manifest, or can't be read."""
    if not (path / MANIFEST).is_file():
        raise TornError(f"{path} is torn: it has no {MANIFEST}")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if missing := {"progress.json", "rollouts.pt"} - manifest.keys():
            raise TornError(f"{path} is torn: {MANIFEST} lists no {', '.join(sorted(missing))}")
        for name, listed in manifest.items():
            file = path / name
            if not file.is_file() or file.stat().st_size != listed["bytes"]:
                raise TornError(f"{path} is torn: {name} must have {listed['bytes']} bytes")
            if _hash(file) != listed["sha256"]:
                raise TornError(f"{path} is torn: {name} has other contents than were written")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, TornError):
            raise
        raise TornError(f"{path} is torn: it can't be read ({error})") from error


def _seal(folder: Path) -> None:
    """Puts everything on disk and lists it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    listed = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _hash(file)} for file in files
    }
    (folder / MANIFEST).write_text(json.dumps(listed, indent=1))
    put_on_disk(folder)


def put_on_disk(folder: Path) -> None:
    """All files of a folder, and the lists of them."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Puts a file, or a folder's list of files, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _steps(folder: Path) -> list[int]:
    """Of the checkpoints in a folder, in order."""
    names = [NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in names if match)


def _all(first: Callable[[Path], None], rest: Iterator[Callable[[Path], None]]) -> Iterator[Callable]:
    yield first
    yield from rest


def _done(function: Callable[..., None], *arguments: Any, **options: Any) -> Future[None]:
    """The call's outcome as a future that has it."""
    future: Future[None] = Future()
    try:
        future.set_result(function(*arguments, **options))
    except Exception as error:
        future.set_exception(error)
    return future
