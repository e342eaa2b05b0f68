"""Checkpoints: written aside, listed in a manifest and renamed: a torn one is never taken for whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from vlm_sapo.distributed import World
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.training.optimizer import Write
from vlm_sapo.training.policy import Policy, PolicyState

NAME = re.compile(r"step_(\d+)")
MANIFEST = "manifest.json"
FAILURES = (OSError, SafetensorError)
"""What writing to a full or broken disk raises."""


@dataclass
class Progress:
    """Where a run stands: steps done and seconds spent."""

    step: int = 0
    seconds: float = 0.0

    def advance(self, step: int, seconds: float) -> None:
        """A step is done; it took so long."""
        self.step, self.seconds = step, self.seconds + seconds


class TornError(ValueError):
    """A checkpoint's files are not those that its manifest lists."""


class Checkpoints:
    """The checkpoints of a run, `step_<n>` in a folder: model or adapter, optimizer, progress, state of the
    rollouts, and a manifest with every file's size and SHA-256.

    The newest `keep_last` stay, and those of the `keep_best` best evaluations. With `background` they are
    written while training goes on, from a copy in host memory. A disk that is full leaves the ones before
    whole; the run goes on with a warning, or stops, as `on_error` says.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        *,
        console: Console,
        world: World,
        keep_last: int = 2,
        keep_best: int = 0,
        background: bool = False,
        on_error: Literal["warn", "stop"] = "warn",
    ):
        self.run_folder, self.folder = run_folder, run_folder.path / "checkpoints"
        self.keep_last, self.keep_best, self.on_error = keep_last, keep_best, on_error
        self.console, self.world = console, world
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self.pending: Future[None] | None = None
        self.newest_step: int | None = None
        """Step of the newest one that was begun or read."""

    def save(self, policy: Policy, progress: Progress, rollouts: dict[str, Any]) -> None:
        """Writes one. All processes call it."""
        self.wait()
        self.newest_step = progress.step
        parts = policy.parts(keep=self.world.main, copy=self.worker is not None)
        state = write_state(progress, policy.state(), rollouts)
        if not self.world.main:
            for _ in parts:
                pass
        elif self.worker is not None:
            copies = [state, *parts]
            logged = _done(self.run_folder.flush)  # here, since lines are added to the logs meanwhile
            write = self.worker.submit
            self.pending = logged if logged.exception() else write(self._write, progress.step, copies)
        else:
            self.pending = _done(self._write_after_logs, progress.step, chain([state], parts))
        if self.worker is None:
            self.wait()

    def wait(self) -> None:
        """Waits for the one that is being written. All processes call it."""
        if not self.world.on_main(self._wait):
            self.newest_step = None

    def _wait(self) -> bool:
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

    def _write_after_logs(self, step: int, parts: Iterator[Write]) -> None:
        try:
            self.run_folder.flush()
        except Exception:
            for _ in parts:  # other processes contribute theirs
                pass
            raise
        self._write(step, parts)

    def _write(self, step: int, parts: Iterable[Write]) -> None:
        target = self.folder / f"step_{step:06d}"
        aside = self.folder / f".{target.name}.partial"
        remaining = iter(parts)
        try:
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
            for _ in remaining:  # other processes contribute theirs
                pass
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _prune(self) -> None:
        steps, best = _steps(self.folder), self.run_folder.best(self.keep_best)
        for step in set(steps) - set(steps[-self.keep_last :]) - set(best):
            shutil.rmtree(self.folder / f"step_{step:06d}")

    def newest(self) -> Path | None:
        """The newest whole one, or None where there never was one; torn ones are named in a warning and
        renamed. Raises ValueError where all are torn. All processes call it."""
        path = self.world.on_main(self._newest)
        self.newest_step = int(NAME.fullmatch(path.name)[1]) if path else None
        return path

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


def write_state(progress: Progress, policy: PolicyState, rollouts: dict[str, Any]) -> Write:
    """What writes progress and state as they are now."""
    text = json.dumps(
        asdict(progress)
        | {
            "updates": policy.updates,
            "left_out": policy.skipped_in_a_row,
            "reuse_sampled": policy.reuse_sampled,
        }
    )

    def write(folder: Path) -> None:
        torch.save(rollouts, buffer := io.BytesIO())  # which, unlike a file, can't be full
        (folder / "rollouts.pt").write_bytes(buffer.getvalue())
        (folder / "progress.json").write_text(text)

    return write


def restore(path: Path, policy: Policy) -> tuple[Progress, dict[str, Any]]:
    """Loads the optimizer; the model is loaded from `path` like any model. Returns where the run stood, and
    the state of the rollouts. The number of processes may be another than when it was written."""
    fields = json.loads((path / "progress.json").read_text())
    policy.load(path, PolicyState(fields["updates"], fields["left_out"], fields["reuse_sampled"]))
    progress = Progress(fields["step"], fields["seconds"])
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


def _done(function: Callable[..., None], *arguments: Any, **options: Any) -> Future[None]:
    """The call's outcome as a future that has it."""
    future: Future[None] = Future()
    try:
        future.set_result(function(*arguments, **options))
    except Exception as error:
        future.set_exception(error)
    return future
