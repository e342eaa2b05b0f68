"""Checkpoints, written atomically: into a temporary folder with a manifest of hashes, then renamed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError

from vlm_sapo.distributed import World
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.training.optimizer import Write
from vlm_sapo.training.policy import Policy, PolicyState

NAME = re.compile(r"step_(\d+)")
MANIFEST = "manifest.json"
UNFINISHED = ".manifest.json"
PROCESS = "process_{}"
"""Folder of another process's files, until the checkpoint is complete."""
POLL_SECONDS = 0.2
PATIENCE = 120.0
"""Seconds after which what one host has written to a shared disk must be seen by the others."""
T = TypeVar("T")
FAILURES = (OSError, SafetensorError)
"""Errors of writing to a full or broken disk."""
FREE_DISK = "free disk space, then start the same command again"


@dataclass
class Progress:
    """Steps done and seconds spent."""

    step: int = 0
    seconds: float = 0.0

    def advance(self, step: int, seconds: float) -> None:
        """Counts a finished step."""
        self.step, self.seconds = step, self.seconds + seconds


@dataclass
class Writing:
    """A checkpoint that is being written, by the first `writers` processes."""

    step: int
    writers: int
    done: Future[None] = field(default_factory=Future)
    """This process's part."""
    sealed: Future[bool] | None = None
    """In the main process: whether it was completed in the background."""
    over: Event = field(default_factory=Event)
    """The training thread waits for it."""


@dataclass(frozen=True)
class Best:
    """The checkpoints with the best results in one evaluation."""

    count: int
    evaluation: str


class TornError(ValueError):
    """A checkpoint's files differ from its manifest."""


class Checkpoints:
    """The checkpoints of a run, `step_<n>` in a folder: model or adapter, optimizer, progress, state of the
    rollouts, and a manifest with the size and SHA-256 of every file.

    All processes that hold a part of the model write: each into a folder of its own inside the checkpoint's,
    which the main process empties when all are done.

    The newest `keep_last` and the `best` stay. With `background` they are
    written while training continues, from a copy in host memory. A full disk leaves earlier ones intact; then
    the run continues with a warning or stops, as `on_error` says.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        *,
        console: Console,
        world: World,
        keep_last: int = 2,
        best: Best | None = None,
        background: bool = False,
        on_error: Literal["warn", "stop"] = "warn",
    ):
        self.run_folder, self.folder = run_folder, run_folder.path / "checkpoints"
        self.keep_last, self.best, self.on_error = keep_last, best, on_error
        self.console, self.world = console, world
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self.pending: Writing | None = None
        self.newest_step: int | None = None
        """Step of the newest checkpoint that was started or read."""

    def save(self, policy: Policy, progress: Progress, rollouts: dict[str, Any]) -> None:
        """Writes a checkpoint. All processes call it."""
        self.wait()
        self.newest_step = progress.step
        writing = Writing(progress.step, policy.writers)
        refused = self.world.on_main(lambda: self._prepare(writing))
        if refused is not None:
            writing.done = _completed(_raise, OSError(refused))
        else:
            state = [write_state(progress, policy.state(), rollouts)] if self.world.main else []
            parts = chain(state, policy.parts(copy=self.worker is not None))
            if self.worker is None:
                writing.done = _completed(self._write, writing, parts)
            else:
                writing.done = self.worker.submit(self._write, writing, [*parts])
                if self.world.main:
                    writing.sealed = self.worker.submit(self._seal_early, writing)
        self.pending = writing
        if self.worker is None:
            self.wait()

    def wait(self) -> None:
        """Waits for the checkpoint that is being written. All processes call it."""
        writing, self.pending = self.pending, None
        if writing is None:
            return
        try:
            problem = _problem(writing.done)
        except Exception as error:
            writing.over.set()
            self.world.fail_everywhere(error)
            raise
        problems = [text for text in self.world.all_gather(problem) if text]
        if not self.world.on_main(lambda: self._finish(writing, problems)):
            self.newest_step = None

    def _finish(self, writing: Writing, problems: list[str]) -> bool:
        """Completes a checkpoint that all processes have written. Returns whether it is complete."""
        writing.over.set()
        try:
            complete = writing.sealed is not None and writing.sealed.result()
            if not problems and not complete:
                self._complete(writing)
        except FAILURES as error:
            problems = [f"{error}"]
        if not problems:
            path = self.folder / f"step_{writing.step:06d}"
            self.run_folder.announce("checkpoint", {"step": writing.step, "path": path})
            return True
        shutil.rmtree(self._partial(writing.step), ignore_errors=True)
        text = f"a checkpoint could not be written ({problems[0]}); earlier ones in {self.folder} are intact"
        if self.on_error == "stop":
            raise ValueError(f"{text}; {FREE_DISK}")
        self.console.warn(f"{text}, and the run continues (checkpoint.on_error)")
        return False

    def close(self) -> None:
        """Ends the background writer."""
        if self.pending is not None:
            self.pending.over.set()
        if self.worker is not None:
            self.worker.shutdown()

    def _partial(self, step: int) -> Path:
        return self.folder / f".step_{step:06d}.partial"

    def _prepare(self, writing: Writing) -> str | None:
        """Writes the logs, which must not be behind the checkpoint, and makes the folder. Returns why it
        can't."""
        partial = self._partial(writing.step)
        try:
            self.run_folder.flush()
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except FAILURES as error:
            return str(error)
        return None

    def _write(self, writing: Writing, parts: Iterable[Write]) -> None:
        """Writes this process's parts."""
        rank, remaining = self.world.rank, iter(parts)
        folder = self._partial(writing.step) / ("" if self.world.main else PROCESS.format(rank))
        try:
            for number, part in enumerate(remaining):
                if not number:
                    folder.mkdir(exist_ok=True)
                part(folder)
            if not self.world.main and rank < writing.writers:
                folder.mkdir(exist_ok=True)
                _list(folder)
        except Exception:
            for _ in remaining:  # other processes take part
                pass
            raise

    def _seal_early(self, writing: Writing) -> bool:
        """In the background: completes a checkpoint as soon as all processes have written it. Returns False
        if the training thread came first."""
        while _problem(writing.done) is None:
            if self._is_written(writing):
                self._complete(writing, patience=0.0)
                return True
            if writing.over.wait(POLL_SECONDS):
                break
        return False

    def _is_written(self, writing: Writing) -> bool:
        folder = self._partial(writing.step)
        lists = [folder / PROCESS.format(rank) / MANIFEST for rank in range(1, writing.writers)]
        return all(file.is_file() for file in lists)

    def _complete(self, writing: Writing, patience: float = PATIENCE) -> None:
        """Merges what the processes have written, and makes it a checkpoint. Raises OSError if the files of
        others can't be seen `patience` seconds after they were written."""
        partial, target = self._partial(writing.step), self.folder / f"step_{writing.step:06d}"
        deadline = time.monotonic() + patience
        while not self._is_written(writing):
            if time.monotonic() > deadline:
                raise OSError(f"other processes' files in {partial} can't be seen; is it on a shared disk?")
            time.sleep(POLL_SECONDS)
        _seal(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        _sync(self.folder)
        self._prune()

    def _prune(self) -> None:
        steps = _steps(self.folder)
        best = self.run_folder.best(self.best.count, self.best.evaluation) if self.best else []
        for step in set(steps) - set(steps[-self.keep_last :]) - set(best):
            shutil.rmtree(self.folder / f"step_{step:06d}")

    @property
    def newest_written(self) -> str:
        """Where the newest complete checkpoint is, in words."""
        steps = _steps(self.folder)
        return (
            f"the newest checkpoint in {self.folder} is of step {steps[-1]}"
            if steps
            else "no checkpoint was written"
        )

    def newest(self) -> Path | None:
        """The newest complete checkpoint, or None if there are none. Torn ones are renamed, with a warning;
        raises ValueError if all are torn. All processes call it."""
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
                self.console.warn(f"{error}; using an older one, and renaming it to torn_{other.name}")
                other.rename(other.with_name(f"torn_{other.name}"))
            return path
        if torn:
            raise ValueError(
                f"no checkpoint of this run is whole ({'; '.join(str(error) for _, error in torn)}); put one "
                "back, or start over with run.overwrite=true"
            )
        return None


def write_state(progress: Progress, policy: PolicyState, rollouts: dict[str, Any]) -> Write:
    """A function that writes progress and state as they are now."""
    text = json.dumps(
        asdict(progress)
        | {
            "updates": policy.updates,
            "left_out": policy.skipped_in_a_row,
            "reuse_sampled": policy.reuse_sampled,
        }
    )

    def write(folder: Path) -> None:
        torch.save(rollouts, buffer := io.BytesIO())  # torch.save into a full disk would raise RuntimeError
        (folder / "rollouts.pt").write_bytes(buffer.getvalue())
        (folder / "progress.json").write_text(text)

    return write


def restore(path: Path, policy: Policy) -> tuple[Progress, dict[str, Any]]:
    """Restores the optimizer; the model is loaded from `path` like any model. Returns the progress and the
    state of the rollouts. The number of processes may have changed since."""
    fields = json.loads((path / "progress.json").read_text())
    policy.load(path, PolicyState(fields["updates"], fields["left_out"], fields["reuse_sampled"]))
    progress = Progress(fields["step"], fields["seconds"])
    return progress, torch.load(path / "rollouts.pt", weights_only=True)


def check(path: Path) -> None:
    """Raises TornError if a checkpoint's files differ from its manifest or can't be read."""
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
    """Moves the files of other processes into the folder, writes the manifest and syncs everything to disk.
    Each process has hashed its own files."""
    listed = {}
    for other in sorted(folder.glob(PROCESS.format("*"))):
        own = json.loads((other / MANIFEST).read_text())
        for name in own:
            os.replace(other / name, folder / name)
        shutil.rmtree(other)
        listed |= own
    _list(folder, listed)
    _sync(folder)


def _list(folder: Path, known: dict[str, dict[str, Any]] | None = None) -> None:
    """Writes the manifest of a folder, with the entries of `known` files as they are, after everything else
    is on disk."""
    names = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    listed = {
        name: (known or {}).get(name) or {"bytes": file.stat().st_size, "sha256": _hash(file)}
        for name, file in sorted(names.items())
    }
    sync_to_disk(folder)
    (folder / UNFINISHED).write_text(json.dumps(listed, indent=1))
    _sync(folder / UNFINISHED)
    os.replace(folder / UNFINISHED, folder / MANIFEST)  # last: then the main process may empty the folder


def sync_to_disk(folder: Path) -> None:
    """Syncs all files and folders in `folder`."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Syncs a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, in order."""
    names = [NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in names if match)


def _raise(error: Exception) -> None:
    raise error


def _problem(future: Future) -> str | None:
    """Waits for a future. Returns why it could not write; other errors are raised."""
    try:
        future.result()
    except FAILURES as error:
        return str(error)
    return None


def _completed(function: Callable[..., T], *arguments: Any, **options: Any) -> Future[T]:
    """A future with the result or error of the call, which runs now."""
    future: Future[T] = Future()
    try:
        future.set_result(function(*arguments, **options))
    except Exception as error:
        future.set_exception(error)
    return future
