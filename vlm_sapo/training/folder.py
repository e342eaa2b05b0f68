"""A run's folder, checkpoints, logs and alarms: new ones, or those of a run that is resumed."""

from __future__ import annotations

from vlm_sapo.config import schema as cfg
from vlm_sapo.config.files import parse
from vlm_sapo.config.load import check, differences, dump
from vlm_sapo.reporting.alarms import Alarms
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import ReadOnlyRunFolder, RunFolder
from vlm_sapo.reporting.trackers import build_trackers
from vlm_sapo.training.checkpoint import Checkpoints
from vlm_sapo.training.launch import Processes
from vlm_sapo.training.run import Interruption


def open_folder(config: cfg.TrainConfig | cfg.SftConfig, processes: Processes) -> RunFolder:
    """The run's folder, a new one or one that belongs to this config."""
    world, console = processes.world, processes.console
    folder = RunFolder(config.run.folder) if world.main else ReadOnlyRunFolder(config.run.folder)
    world.on_main(lambda: _open(folder, config, console))
    return folder


def _open(folder: RunFolder, config: cfg.TrainConfig | cfg.SftConfig, console: Console) -> None:
    cleared = {"overwrite": False, "accept_changes": False}
    text = dump(config.model_copy(update={"run": config.run.model_copy(update=cleared)}))
    stored = None if config.run.overwrite else _upgraded(folder.stored(), type(config))
    if config.run.overwrite:
        folder.stored()  # or what lies there is no run's
        folder.clear()
    elif stored is not None and stored != text:
        changes = differences(stored, text)
        refused = [str(change) for change in changes if not change.harmless]
        if refused and not config.run.accept_changes:
            raise ValueError(
                f"run.dir ({folder.path}) holds a run with another config: {'; '.join(refused)}. Choose "
                "another run.dir, start anew with run.overwrite=true, or go on all the same with "
                "run.accept_changes=true"
            )
        steps = {change.field: change for change in changes}.get("train.steps")
        if steps is not None and steps.after < (done := folder.steps()):
            raise ValueError(
                f"train.steps ({steps.after}) must be {done} or more: the run in {folder.path} has done so "
                "many; choose another run.dir, or start anew with run.overwrite=true"
            )
        console.warn(f"this run goes on with changes: {'; '.join(map(str, changes))}")
        if folder.summary() is not None and (steps is not None or refused):
            if not (folder.path / "checkpoints").is_dir():
                raise ValueError(
                    f"the run in {folder.path} is finished and left no checkpoint to go on from "
                    "(checkpoint.every=0); choose another run.dir, or start anew with run.overwrite=true"
                )
            folder.unfinish()
    folder.begin(text)


def _upgraded(stored: str | None, kind: type[cfg.TrainConfig | cfg.SftConfig]) -> str | None:
    """A stored config with the fields that came after it was written, at their defaults."""
    if stored is None:
        return None
    try:
        return dump(check(kind, parse(stored)))
    except ValueError:  # of fields that are no longer there: the comparison names them
        return stored


def build_checkpoints(
    config: cfg.TrainConfig | cfg.SftConfig, folder: RunFolder, processes: Processes
) -> Checkpoints:
    """The run's checkpoints, as its config wants them kept."""
    section = config.checkpoint
    return Checkpoints(
        folder,
        console=processes.console,
        world=processes.world,
        keep_last=section.keep_last,
        keep_best=section.keep_best,
        background=section.background,
        on_error=section.on_error,
    )


def open_logs(
    config: cfg.TrainConfig | cfg.SftConfig, folder: RunFolder, processes: Processes, step: int
) -> None:
    """Makes logs and trackers ready for what comes after `step`."""
    folder.rewind(step)
    if not processes.world.main:
        return
    if (logged := len(folder.read("metrics.jsonl"))) != step:
        processes.console.warn(
            f"metrics.jsonl has {logged} of the {step} steps that lie behind the checkpoint"
        )
    if config.log.to:
        folder.trackers = build_trackers(
            config.log.to,
            project=config.log.project,
            name=folder.path.resolve().name,
            folder=folder.path,
            config=config.model_dump(mode="json"),
            step=step,
            warn=processes.console.warn,
        )


def build_alarms(
    config: cfg.TrainConfig, folder: RunFolder, console: Console, interruption: Interruption
) -> Alarms:
    """What watches the metrics, with those of the steps that are done."""
    thresholds = config.alarms.model_dump(exclude={"stop"})
    stop = interruption.stop_at_alarm if config.alarms.stop else None
    alarms = Alarms(console, **thresholds, stop=stop)
    alarms.resume(folder.read("metrics.jsonl"))
    return alarms
