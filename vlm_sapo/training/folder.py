"""Builds a run's folder, checkpoints and logs, for a new or a resumed run."""

from __future__ import annotations

from vlm_sapo.config import schema as cfg
from vlm_sapo.config.fields import belongs
from vlm_sapo.config.files import parse
from vlm_sapo.config.load import Change, check, differences, dump
from vlm_sapo.config.paths import Paths
from vlm_sapo.evaluation.benchmarks import read_definition
from vlm_sapo.evaluation.samples import SAMPLES, drop_samples
from vlm_sapo.reporting import environment
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import ReadOnlyRunFolder, RunFolder
from vlm_sapo.reporting.trackers import build_trackers
from vlm_sapo.training.checkpoint import Best, Checkpoints
from vlm_sapo.training.launch import Processes

EVALUATION = frozenset({"eval"})
"""Fields that change what is measured."""
EVALUATION_SETS = frozenset({"eval.data", "eval.benchmarks"})
"""Fields that may add an evaluation, also to a finished run."""


def open_folder(config: cfg.TrainConfig | cfg.SftConfig, processes: Processes) -> RunFolder:
    """Opens the run's folder. Raises ValueError if it has a run with another config."""
    world, console = processes.world, processes.console
    folder = RunFolder(config.run.folder) if world.main else ReadOnlyRunFolder(config.run.folder)
    devices = world.all_gather(environment.device_name(processes.accelerator.device))
    world.on_main(lambda: _open(folder, config, console, devices))
    return folder


def _open(
    folder: RunFolder, config: cfg.TrainConfig | cfg.SftConfig, console: Console, devices: list[str]
) -> None:
    for name in config.eval.benchmarks:
        read_definition(name)  # before anything is written
    cleared = {"overwrite": False, "accept_changes": False}
    text = dump(config.model_copy(update={"run": config.run.model_copy(update=cleared)}))
    stored = folder.stored()  # raises ValueError if other files are there
    if config.run.overwrite:
        folder.clear()
    elif stored is not None and (upgraded := _upgraded(stored, type(config))) != text:
        _accept(differences(upgraded, text), folder, console, accept_all=config.run.accept_changes)
    folder.begin(text)
    if folder.summary() is None:
        environment.record(folder, devices, {})


def _accept(changes: list[Change], folder: RunFolder, console: Console, *, accept_all: bool) -> None:
    """Warns of changes of the config with which a run is resumed. Raises ValueError if they can't be
    accepted."""
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


def _drop_unfinished(folder: RunFolder) -> None:
    """Removes samples of evaluations that were interrupted: those of the new settings would not fit them."""
    logged = folder.read("evaluations.jsonl")
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
    config: cfg.TrainConfig | cfg.SftConfig,
    folder: RunFolder,
    processes: Processes,
    ranked_by: str | None,
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


def open_logs(
    config: cfg.TrainConfig | cfg.SftConfig, folder: RunFolder, processes: Processes, step: int
) -> None:
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
