"""What a run reads and its config only names, rows and Python files; a resumed run says what changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlm_sapo.config import schema as cfg
from vlm_sapo.data.holdout import TaskRows
from vlm_sapo.evaluation.periodic import EvaluationSet
from vlm_sapo.plugins import PACKAGE, PYTHON, locate
from vlm_sapo.reporting import environment
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import EVALUATIONS, RunFolder, measured_alike

Config = cfg.TrainConfig | cfg.SftConfig

SECTIONS = ("model", "data", "rollout", "reward", "algo")
"""Whose functions can change what is trained."""
INPUTS, CHANGED = "inputs", "inputs_changed"
"""Keys of `environment.json`: the hashes, and the words for those that changed between two starts."""
NUMBER = "the number of rows of"


def check_resumed(
    config: Config, folder: RunFolder, console: Console, rows: TaskRows, sets: Sequence[EvaluationSet]
) -> None:
    """Raises ValueError where a resumed run would read, or hold out, something else than before."""
    accept_all = config.run.accept_changes
    check_evaluations(sets, folder, console, accept_all=accept_all)
    check_inputs(read_inputs(config, rows), folder, console, accept_all=accept_all)


def read_inputs(config: Config, rows: TaskRows) -> dict[str, str]:
    """Hashes by the words for what they are of: the rows of each task, their number, and each Python file
    with a function that the config names. What such a file imports is not among them."""
    hashes = {f"the rows of {task}": examples.fingerprint() for task, examples in rows.trained.items()}
    hashes |= {f"{NUMBER} {task}": str(len(examples)) for task, examples in rows.trained.items()}
    sections = config.model_dump(mode="json")
    for name in _texts([sections[key] for key in SECTIONS if key in sections]):
        if (path := _python_file(name)) is not None:
            hashes[f"the file {path}"] = _hash(path)
    return hashes


def by_content(value: Any) -> Any:
    """A value of a config with each Python file that it names by what is in it instead of where it is."""
    if isinstance(value, Mapping):
        return {key: by_content(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [by_content(item) for item in value]
    if isinstance(value, str) and (path := _python_file(value)) is not None:
        return f"{value.rpartition(':')[2]} of {_hash(path)}"
    return value


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def check_inputs(inputs: Mapping[str, str], folder: RunFolder, console: Console, *, accept_all: bool) -> None:
    """Stores the hashes, and warns of what changed since the run read it: a row or a reward that was mended
    so that the run can go on. Raises ValueError where there are more or fewer rows, since their order is then
    another."""
    stored = environment.read(folder.path)
    known = stored.get(INPUTS, {})
    changed = [words for words, value in inputs.items() if known.get(words, value) != value]
    numbers = [words for words in changed if words.startswith(NUMBER)]
    if numbers and not accept_all:
        raise ValueError(
            f"{' and '.join(numbers)} changed since the run in {folder.path} read them, so it can't go on in "
            "the same order. Restore them, choose another run.dir, start over with run.overwrite=true, or "
            "continue anyway with run.accept_changes=true"
        )
    if changed:
        console.warn(f"this run goes on although {' and '.join(changed)} changed since it began")
    if dict(known) != dict(inputs):
        further = {INPUTS: dict(inputs), CHANGED: [*stored.get(CHANGED, []), *changed]}
        text = json.dumps(stored | further, indent=2, ensure_ascii=False)
        folder.replace(environment.FILE, text + "\n")


def check_evaluations(
    sets: Sequence[EvaluationSet], folder: RunFolder, console: Console, *, accept_all: bool
) -> None:
    """Warns of evaluations that a resumed run measures in another way than before. Raises ValueError where
    other rows are held out of training than before, since the run may have trained on them."""
    last = {record["name"]: record for record in folder.read(EVALUATIONS)}
    for item in sets:
        earlier = last.get(item.name, {})
        if measured_alike(earlier, item.fingerprints):
            continue
        same_rows = earlier["rows"] == item.fingerprints["rows"]
        if not same_rows and item.of_training and not accept_all:
            raise ValueError(
                f"data.holdout holds out other rows for {item.name} than before this run was resumed, so "
                "rows that it trained on may be among them: the rows of data.source have changed. Restore "
                "them, choose another run.dir, or continue anyway with run.accept_changes=true"
            )
        what = "with other settings" if same_rows else "on other rows"
        console.warn(
            f"{item.name} is evaluated {what} than before this run was resumed, so only its results from "
            "now on are compared with each other; give the set another name to keep both"
        )


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of a config."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _python_file(name: str) -> Path | None:
    """The file of `FILE.py:NAME` or `package.module:NAME`; None for other texts and for what ships with the
    project."""
    target, _, attribute = name.rpartition(":")
    if not target or not attribute.isidentifier() or name.startswith(PYTHON):
        return None
    if target.endswith(".py"):
        path = locate(target)
    elif all(part.isidentifier() for part in target.split(".")):
        spec = _spec(target)
        path = Path(spec) if spec else None
    else:
        return None
    if path is None or not path.is_file() or path.resolve().is_relative_to(PACKAGE):
        return None
    return path.resolve()


def _spec(module: str) -> str | None:
    """The file of an importable module; None for one that isn't there or has none."""
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return None
    return spec.origin if spec else None
