"""Checkpoints, written atomically: into a temporary folder with a manifest of hashes, then renamed."""

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
"""Errors of writing to a full or broken disk."""


@dataclass
class Progress:
    """Steps done and seconds spent."""

    step: int = 0
    seconds: float = 0.0

    def advance(self, step: int, seconds: float) -> None:
        """Counts a finished step."""
        self.step, self.seconds = step, self.seconds + seconds


class TornError(ValueError):
    """A checkpoint's files differ from its manifest."""


class Checkpoints:
    """The checkpoints of a run, `step_<n>` in a folder: model or adapter, optimizer, progress, state of the
    rollouts, and a manifest with the size and SHA-256 of every file.

    The newest `keep_last` and those of the `keep_best` best evaluations stay. With `background` they are
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
        """Step of the newest checkpoint that was started or read."""

    def save(self, policy: Policy, progress: Progress, rollouts: dict[str, Any]) -> None:
        """Writes a checkpoint. All processes call it."""
        self.wait()
        self.newest_step = progress.step
        parts = policy.parts(keep=self.world.main, copy=self.worker is not None)
        state = write_state(progress, policy.state(), rollouts)
        if not self.world.main:
            for _ in parts:
                pass
        elif self.worker is not None:
            copies = [state, *parts]
            # not in the background, since training appends to the logs meanwhile
            flushed = _completed(self.run_folder.flush)
            write = self.worker.submit
            self.pending = flushed if flushed.exception() else write(self._write, progress.step, copies)
        else:
            self.pending = _completed(self._write_after_logs, progress.step, chain([state], parts))
        if self.worker is None:
            self.wait()

    def wait(self) -> None:
        """Waits for the checkpoint that is being written. All processes call it."""
        if not self.world.on_main(self._wait):
            self.newest_step = None

    def _wait(self) -> bool:
        pending, self.pending = self.pending, None
        if pending is None:
            return True
        try:
            pending.result()
        except FAILURES as error:
            text = f"a checkpoint could not be written ({error}); earlier ones in {self.folder} are intact"
            if self.on_error == "stop":
                raise ValueError(f"{text}; make room, then start the same command again") from error
            self.console.warn(f"{text}, and the run continues (checkpoint.on_error)")
            return False
        return True

    def close(self) -> None:
        """Ends the background writer."""
        if self.worker is not None:
            self.worker.shutdown()

    def _write_after_logs(self, step: int, parts: Iterator[Write]) -> None:
        try:
            self.run_folder.flush()
        except Exception:
            for _ in parts:  # other processes take part
                pass
            raise
        self._write(step, parts)

    def _write(self, step: int, parts: Iterable[Write]) -> None:
        target = self.folder / f"step_{step:06d}"
        partial = self.folder / f".{target.name}.partial"
        remaining = iter(parts)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for part in remaining:
                part(partial)
            _seal(partial)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            _sync(self.folder)
            self._prune()
        except Exception:
            for _ in remaining:  # other processes take part
                pass
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _prune(self) -> None:
        steps, best = _steps(self.folder), self.run_folder.best(self.keep_best)
        for step in set(steps) - set(steps[-self.keep_last :]) - set(best):
            shutil.rmtree(self.folder / f"step_{step:06d}")

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
    """Writes the manifest and syncs everything to disk."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    listed = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _hash(file)} for file in files
    }
    (folder / MANIFEST).write_text(json.dumps(listed, indent=1))
    sync_to_disk(folder)


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


def _completed(function: Callable[..., None], *arguments: Any, **options: Any) -> Future[None]:
    """A future with the result or error of the call, which runs now."""
    future: Future[None] = Future()
    try:
        future.set_result(function(*arguments, **options))
    except Exception as error:
        future.set_exception(error)
    return future
