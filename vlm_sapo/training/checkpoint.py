"""Checkpoints: written aside and renamed, so that a torn one is never taken for whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from vlm_sapo.training.policy import Policy
from vlm_sapo.world import World

NAME = re.compile(r"step_(\d+)")


@dataclass
class Progress:
    """Where a run stands: steps done, seconds spent, and updates of the weights."""

    step: int = 0
    seconds: float = 0.0
    updates: int = 0
    reuse_sampled: bool = False
    """Whether the engine's log-probs serve as old ones; decided at the start of the run."""

    def advance(self, step: int, seconds: float) -> None:
        """A step is done; it took so long."""
        self.step, self.seconds = step, self.seconds + seconds


def save(
    folder: Path, policy: Policy, progress: Progress, rollouts: dict[str, Any], *, keep: int, world: World
) -> Path:
    """Writes `step_<n>` (model or adapter, optimizer, progress, state of the rollouts) and removes all but
    the newest `keep`. All processes call it; each writes its part of the optimizer."""
    target = folder / f"step_{progress.step:06d}"
    partial = folder / f".{target.name}.partial"
    progress.updates, progress.reuse_sampled = policy.vlm.version, policy.reuse_sampled
    world.from_main(lambda: _begin(partial, progress, rollouts))
    policy.save(partial, write=world.main)
    with _quietly():
        dcp.save(policy.optimizer_state(), checkpoint_id=partial / "optimizer")
    world.from_main(lambda: _end(partial, target, keep))
    return target


def _begin(partial: Path, progress: Progress, rollouts: dict[str, Any]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.save(rollouts, partial / "rollouts.pt")
    (partial / "progress.json").write_text(json.dumps(asdict(progress)))


def _end(partial: Path, target: Path, keep: int) -> None:
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    for old in sorted(_checkpoints(target.parent))[:-keep]:
        shutil.rmtree(target.parent / f"step_{old:06d}")


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder, or None."""
    steps = _checkpoints(folder)
    return folder / f"step_{max(steps):06d}" if steps else None


def latest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, or None."""
    return max(_checkpoints(folder), default=None)


def restore(path: Path, policy: Policy) -> tuple[Progress, dict[str, Any]]:
    """Loads the optimizer; the model is loaded from `path` like any model. Returns where the run stood, and
    the state of the rollouts. The number of processes may be another than when it was written."""
    state = policy.optimizer_state()
    with _quietly():
        dcp.load(state, checkpoint_id=path / "optimizer")
    policy.load_optimizer_state(state)
    progress = Progress(**json.loads((path / "progress.json").read_text()))
    policy.vlm.version, policy.reuse_sampled = progress.updates, progress.reuse_sampled
    return progress, torch.load(path / "rollouts.pt", weights_only=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the remark that there is one process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _checkpoints(folder: Path) -> list[int]:
    names = [NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return [int(match[1]) for match in names if match]
