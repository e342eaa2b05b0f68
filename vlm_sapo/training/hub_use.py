"""The hub during a run: reads models and data sets at fixed commits, and uploads the result."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from vlm_sapo.config import schema as cfg
from vlm_sapo.config.data import SourceConfig
from vlm_sapo.config.fields import Section
from vlm_sapo.hub import Kind, commit_of, is_hub_id, push
from vlm_sapo.reporting import environment
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.training.launch import Processes

T = TypeVar("T")
Config = cfg.TrainConfig | cfg.SftConfig


def commits_of(folder: RunFolder, config: Config, console: Console) -> dict[str, str | None]:
    """The commits that revisions on the hub stand for, by `_revision_key`: for a resumed run those of its
    first start, and none of a run that an earlier version started without them. None is one that was not
    known then."""
    resumes = folder.stored() is not None and not config.run.overwrite
    known = environment.read(folder.path) if resumes else {"revisions": {}}
    if "revisions" not in known:
        return {}
    commits = dict(known["revisions"])
    for field, section in _hub_sections(config):
        kind, name = _repository(section)
        if (key := _revision_key(section)) not in commits:
            commits[key] = commit_of(name, section.revision, kind, field=field)
        if commits[key] is None:
            console.warn(f"{field} ({name}) was read from the cache, offline, so its commit is not known")
    return commits


def _hub_sections(value: Any, name: str = "") -> Iterator[tuple[str, cfg.ModelConfig | SourceConfig]]:
    """The sections of a config that name a repository on the hub, with the field that does."""
    if isinstance(value, cfg.ModelConfig) and is_hub_id(value.path):
        yield f"{name}.path", value
    elif isinstance(value, SourceConfig) and is_hub_id(str(value.source)):
        yield f"{name}.source", value
    elif isinstance(value, Section):
        for field, item in value:
            yield from _hub_sections(item, f"{name}.{field}".strip("."))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _hub_sections(item, f"{name}.{number}")


def _repository(section: cfg.ModelConfig | SourceConfig) -> tuple[Kind, str]:
    """Kind and name of the repository that a section's revision is of."""
    return (
        ("model", section.path) if isinstance(section, cfg.ModelConfig) else ("dataset", str(section.source))
    )


def _revision_key(section: cfg.ModelConfig | SourceConfig) -> str:
    """What a section asks for, as in `Qwen/Qwen3-VL-2B-Instruct@main`."""
    kind, name = _repository(section)
    return f"{'datasets/' if kind == 'dataset' else ''}{name}@{section.revision or 'main'}"


def pin(value: T, commits: Mapping[str, str | None]) -> T:
    """The config, or a part of it, with these commits as the revisions that they stand for."""
    if isinstance(value, list):
        return [pin(item, commits) for item in value]
    if not isinstance(value, Section):
        return value
    if isinstance(value, cfg.ModelConfig | SourceConfig) and (commit := commits.get(_revision_key(value))):
        return value.model_copy(update={"revision": commit})
    parts = {name: (item, pin(item, commits)) for name, item in value}
    return value.model_copy(update={name: new for name, (old, new) in parts.items() if new != old})


def publish(config: Config, folder: RunFolder, processes: Processes) -> None:
    """Pushes a finished run's model if the config says so, with a card for that repository. A push that fails
    is a warning: the run is complete without it."""
    repo, console = config.hub.push, processes.console
    if repo is None or not processes.world.main:  # the others don't wait for an upload of hours
        return
    again = _push_command(folder)
    console.say(f"pushing to {repo}; the run is finished, so if this is interrupted: {again}")
    try:
        address = push(folder.path / "final", repo, field="hub.push")
    except ValueError as error:
        console.warn(f"{error}. The run is finished and complete; push it again with: {again}")
    else:
        console.say(f"pushed to {address}")


def say_finished(config: Config, folder: RunFolder, console: Console) -> None:
    """Says what can be done with a run that is finished already."""
    push_it = f"; to push its model: {_push_command(folder)}" if config.hub.push else ""
    console.say(
        "this run is finished; raise train.steps to go on, start it over with run.overwrite=true, or choose "
        f"another run.dir{push_it}"
    )


def _push_command(folder: RunFolder) -> str:
    return f"vlm-sapo push {shlex.quote(str(folder.path))}"
