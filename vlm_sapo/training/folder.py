"""Builds a run's folder, checkpoints, logs and alarms, for a new or a resumed run."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from vlm_sapo.config import schema as cfg
from vlm_sapo.config.fields import belongs
from vlm_sapo.config.files import parse
from vlm_sapo.config.load import Change, check, differences, dump
from vlm_sapo.config.paths import Paths
from vlm_sapo.distributed import World
from vlm_sapo.evaluation.benchmarks import read_definition
from vlm_sapo.evaluation.samples import SAMPLES, drop_samples
from vlm_sapo.hub import describe_base, prepare_push
from vlm_sapo.reporting import environment
from vlm_sapo.reporting.alarms import Alarms
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import EVALUATIONS, ReadOnlyRunFolder, RunFolder
from vlm_sapo.reporting.trackers import build_trackers
from vlm_sapo.training.checkpoint import Best, Checkpoints
from vlm_sapo.training.hub_use import commits_of, pin
from vlm_sapo.training.launch import Processes
from vlm_sapo.training.run import Interruption

Config = cfg.TrainConfig | cfg.SftConfig

SHARED_DISK_SECONDS = 30.0
"""How long a file that one machine has written may stay unseen by the others."""
POLL_SECONDS = 0.2
EVALUATION = frozenset({"eval"})
"""Fields that change what is measured."""
EVALUATION_SETS = frozenset({"eval.data", "eval.benchmarks"})
"""Fields that may add an evaluation, also to a finished run."""


def open_folder(config: Config, processes: Processes) -> tuple[RunFolder, Config]:
    """Opens the run's folder; returns also the config with the commits of models and data sets on the hub.
    Raises ValueError if the folder has a run with another config, or if the result can't be pushed."""
    world, console = processes.world, processes.console
    _check_same(config, world)
    folder = RunFolder(config.run.folder) if world.main else ReadOnlyRunFolder(config.run.folder)
    devices = world.all_gather(environment.device_name(processes.accelerator.device))
    commits = world.on_main(lambda: commits_of(folder, config, console))
    pinned = pin(config, commits)
    world.on_main(lambda: _open(folder, pinned, console, devices, commits))
    check_shared(config.run.folder, world)
    return folder, pinned


def check_shared(folder: Path, world: World) -> None:
    """Raises ValueError, in all processes, where one doesn't see the folder that the first has written: its
    part of each checkpoint would be missing."""
    deadline = time.monotonic() + SHARED_DISK_SECONDS
    while not (seen := (folder / "config.yaml").is_file()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    blind = [host for host in world.all_gather("" if seen else socket.gethostname()) if host]
    if blind:
        raise ValueError(
            f"run.dir ({folder}) must be on a disk that all machines share, under the same path; on "
            f"{', '.join(sorted(set(blind)))} it has no config.yaml"
        )


def _check_same(config: Config, world: World) -> None:
    """Raises ValueError, in all processes, where a Python program passed different rows or functions."""
    first, *others = world.all_gather(re.findall(r"fingerprint: (\S+)", dump(config)))
    for rank, hashes in enumerate(others, 1):
        if hashes != first:
            raise ValueError(
                f"all processes must train on the same rows with the same functions, and process {rank} has "
                "others than the first; give all the same rows in the same order, with a fixed seed where "
                "they are shuffled"
            )


def _open(
    folder: RunFolder,
    config: Config,
    console: Console,
    devices: list[str],
    commits: Mapping[str, str | None],
) -> None:
    for name in config.eval.benchmarks:
        read_definition(name)  # before anything is written
    cleared = {"overwrite": False, "accept_changes": False}
    text = dump(config.model_copy(update={"run": config.run.model_copy(update=cleared)}))
    stored = folder.stored()  # raises ValueError if other files are there
    resumes = stored is not None and not config.run.overwrite
    if resumes and (upgraded := _upgraded(stored, type(config))) != text:
        _accept(differences(upgraded, text), folder, console, accept_all=config.run.accept_changes)
    if resumes and folder.summary() is not None:
        folder.begin(text)
        return
    if config.hub.push is not None:
        try:
            note = prepare_push(config.hub.push, private=config.hub.private, field="hub.push")
        except ValueError as error:
            if not resumes:
                raise
            note = f"{error}. The run goes on, and tries to push at its end"
        if note:
            console.warn(note)
    base = describe_base(config.model.path, config.model.revision)
    if config.run.overwrite:
        folder.clear()
    folder.begin(text)
    environment.record(folder, devices, {"revisions": dict(commits), "base": base}, resumes=resumes)


def _accept(changes: list[Change], folder: RunFolder, console: Console, *, accept_all: bool) -> None:
    """Warns of changes of the config with which a run is resumed. Raises ValueError if they can't be
    accepted."""
    for change in changes:
        if isinstance(change.before, str) and _is_gone(change.before, str(change.after)):
            raise ValueError(
                f"{change.field} ({change.before}) isn't there any more, and the run in {folder.path} needs "
                "it; put it back, or name another one with run.accept_changes=true"
            )
    refused = [str(change) for change in changes if not change.harmless]
    if refused and not accept_all:
        raise ValueError(
            f"run.dir ({folder.path}) holds a run with another config: {'; '.join(refused)}. Choose "
            "another run.dir, start over with run.overwrite=true, or continue anyway with "
            "run.accept_changes=true"
        )
    steps = next((change for change in changes if change.field == "train.steps"), None)
    if steps is not None and steps.after < (done := folder.steps()):
        raise ValueError(
            f"train.steps ({steps.after}) must be {done} or more: the run in {folder.path} has done so "
            "many; choose another run.dir, or start over with run.overwrite=true"
        )
    console.warn(f"this run continues with changes: {'; '.join(map(str, changes))}")
    fields = [change.field for change in changes]
    if any(belongs(field, EVALUATION) for field in fields):
        _drop_unfinished(folder)
    further = (
        any(belongs(field, EVALUATION_SETS) for field in fields) and (folder.path / "checkpoints").is_dir()
    )
    if folder.summary() is not None and (steps is not None or refused or further):
        if not (folder.path / "checkpoints").is_dir():
            raise ValueError(
                f"the run in {folder.path} is finished and left no checkpoint to resume from "
                "(checkpoint.every=0); choose another run.dir, or start over with run.overwrite=true"
            )
        folder.unfinish()


def _is_gone(before: str, after: str) -> bool:
    """Whether a path, or `FILE.py:NAME`, was absolute and now can't be looked up, so that it stays as it is
    written."""
    path, now = (Path(re.sub(r"(\.py):\w+$", r"\1", text)) for text in (before, after))
    return path.is_absolute() and path.name == now.name and not now.is_absolute() and not path.exists()


def _drop_unfinished(folder: RunFolder) -> None:
    """Removes samples of evaluations that were interrupted: those of the new settings would not fit them."""
    logged = folder.read(EVALUATIONS)
    for path in folder.path.glob(f"evaluations/step_*/{SAMPLES}"):
        step = int(path.parent.name.removeprefix("step_"))
        drop_samples(path.parent, {record["name"] for record in logged if record["step"] == step})


def _upgraded(stored: str, kind: type[cfg.TrainConfig | cfg.SftConfig]) -> str:
    """A stored config, with newer fields at their defaults and paths as `load` would give them."""
    try:
        return dump(check(kind, Paths(None, naming=True).absolute(kind, parse(stored))))
    except ValueError:  # it has removed fields, which the comparison names
        return stored


def build_checkpoints(
    config: Config, folder: RunFolder, processes: Processes, ranked_by: str | None
) -> Checkpoints:
    """Builds the run's checkpoints; the evaluation of the name `ranked_by` decides which are best."""
    section = config.checkpoint
    return Checkpoints(
        folder,
        console=processes.console,
        world=processes.world,
        keep_last=section.keep_last,
        best=Best(section.keep_best, ranked_by) if ranked_by else None,
        background=section.background,
        on_error=section.on_error,
    )


def open_logs(config: Config, folder: RunFolder, processes: Processes, step: int) -> None:
    """Opens logs and trackers, to continue after `step`."""
    folder.rewind(step)
    if not processes.world.main:
        return
    if (logged := len(folder.read("metrics.jsonl"))) != step:
        processes.console.warn(f"metrics.jsonl has {logged} of the {step} steps before the checkpoint")
    if config.log.to:
        trackers = build_trackers(
            config.log.to,
            project=config.log.project,
            name=folder.path.resolve().name,
            folder=folder.path,
            config=config.model_dump(mode="json"),
            step=step,
            warn=processes.console.warn,
        )
        folder.listeners.append(trackers)


def build_alarms(
    config: cfg.TrainConfig, folder: RunFolder, console: Console, interruption: Interruption
) -> Alarms:
    """Builds the alarms, with the metrics of finished steps."""
    alarms = Alarms.of(config, console, interruption.stop_at_alarm if config.alarms.stop else None)
    alarms.resume(folder.read("metrics.jsonl"))
    return alarms
