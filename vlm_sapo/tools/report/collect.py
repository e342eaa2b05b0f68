"""Collects what a report shows of a run: plain values, few enough for one page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vlm_sapo.config.fields import belongs
from vlm_sapo.config.schema import report_fields
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.tools.compare import changed_item, compare, read_samples
from vlm_sapo.tools.report.page import EmbeddedImages

MAX_POINTS = 400
"""Steps of a curve; longer runs are thinned."""
MAX_HISTOGRAMS = 40
"""Steps whose histograms are shown."""
MAX_CHANGED = 40
"""Problems of an evaluation whose verdict changed."""
TRACE_KEY = re.compile(rb'\{"step": (\d+), "place": (\d+),')
"""The beginning of a line of traces.jsonl: step and slot of a group."""
TRACED = ("pieces", "log_ratio", "effective", "entropy")
"""What traces.jsonl holds of each token."""
GroupKey = tuple[int, int]
"""Step and slot of a logged group."""


def collect(folders: Sequence[Path], groups: int) -> dict[str, Any]:
    """The data of a report: runs, each with at most `groups` groups, and images. Raises ValueError for a
    folder that isn't a run's."""
    images = EmbeddedImages()
    runs = [_run(folder, groups, images) for folder in dict.fromkeys(map(Path.resolve, folders))]
    _select_facts([run["facts"] for run in runs])
    names = [run["name"] for run in runs]
    for run in runs:
        if names.count(run["name"]) > 1:
            run["name"] = run["folder"]
    return {"runs": runs, "images": images.urls}


def _run(path: Path, groups: int, images: EmbeddedImages) -> dict[str, Any]:
    folder = RunFolder(path)
    metrics = folder.read("metrics.jsonl")
    if not metrics:
        reason = "it has no step in metrics.jsonl" if path.is_dir() else "there is no such folder"
        raise ValueError(f"{path} must be the folder of a run; {reason}")
    config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    evaluations = folder.read("evaluations.jsonl")
    return {
        "name": path.resolve().name,
        "folder": str(path),
        "facts": _flatten(config),
        "summary": folder.summary(),
        "steps_planned": _field(config, "train.steps"),
        "metrics": _columns(thin(metrics, MAX_POINTS)),
        "evaluations": evaluations,
        "histograms": thin(folder.read("histograms.jsonl"), MAX_HISTOGRAMS),
        "items": [*_groups(folder, groups, images), *_changed(path, evaluations, images)],
    }


def thin(rows: list[Any], count: int) -> list[Any]:
    """At most `count` of the rows, evenly spaced, with the first and the last."""
    if len(rows) <= count:
        return rows
    return [rows[round(number * (len(rows) - 1) / (count - 1))] for number in range(count)]


def _columns(rows: list[dict]) -> dict[str, list]:
    """Values by name; None where a row has none."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [_rounded(row.get(name)) for row in rows] for name in names}


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value


def _field(config: dict, name: str) -> Any:
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _flatten(config: dict, path: str = "") -> dict[str, str]:
    """Texts of the values by field, a list as one value; fields without a value are left out."""
    texts: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            texts |= _flatten(value, f"{path}{name}.")
        elif value is not None and value != []:
            texts[f"{path}{name}"] = _text(value)
    return texts


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _select_facts(runs: list[dict[str, str]]) -> None:
    """Removes all fields but the summary's and those in which the runs differ."""
    names = dict.fromkeys(name for facts in runs for name in facts)
    differing = {name for name in names if len({facts.get(name) for facts in runs}) > 1}
    selected = {name for name in names if belongs(name, report_fields())} | (
        differing - {"run.dir", "run.name"}
    )
    for facts in runs:
        for name in facts.keys() - selected:
            del facts[name]


def _groups(folder: RunFolder, count: int, images: EmbeddedImages) -> list[dict[str, Any]]:
    """Logged groups with what the update saw of their tokens."""
    groups: dict[GroupKey, list[dict]] = {}
    for row in folder.read("rollouts.jsonl"):
        slot = row.get("place", row["id"])  # rows of older runs have no slot and no images
        groups.setdefault((row["step"], slot), []).append(row)
    means = {key: sum(row["reward"] for row in rows) / len(rows) for key, rows in groups.items()}
    changed = _changed_groups(groups, means)
    path = folder.path / "traces.jsonl"
    offsets = _trace_offsets(path)
    keys = thin([key for key in groups if key in offsets] or list(groups), count)
    traces = _read_traces(path, [offsets[key] for key in keys if key in offsets])
    items = []
    for key in keys:
        rows, trace = groups[key], traces.get(key)
        first = rows[0]
        items.append(
            {
                "kind": "rollout",
                "title": f"step {key[0]}",
                "id": first["id"],
                "problem": first["problem"],
                "answer": first["answer"],
                "task": first.get("task") or first.get("benchmark"),
                "images": images.add(folder.path, first.get("pictures", [])),
                "boxes": first.get("gold_boxes", []),
                "mean": means[key],
                "changed": key in changed,
                "responses": [_response(row, trace, index) for index, row in enumerate(rows)],
            }
        )
    return items


def _changed_groups(groups: dict[GroupKey, list[dict]], means: dict[GroupKey, float]) -> set[GroupKey]:
    """Groups whose mean reward differs from that of the same problem's first group."""
    first_means: dict[tuple, float] = {}
    changed = set()
    for key, rows in groups.items():
        problem = (rows[0].get("task"), rows[0]["id"])
        if first_means.setdefault(problem, means[key]) != means[key]:
            changed.add(key)
    return changed


def _trace_offsets(path: Path) -> dict[GroupKey, int]:
    """The byte offset of each group's line in the file."""
    offsets: dict[GroupKey, int] = {}
    if path.is_file():
        with path.open("rb") as file:
            offset = 0
            for line in file:
                if (match := TRACE_KEY.match(line)) and line.endswith(b"\n"):
                    offsets[(int(match[1]), int(match[2]))] = offset
                offset += len(line)
    return offsets


def _read_traces(path: Path, offsets: Sequence[int]) -> dict[GroupKey, dict]:
    """The lines at these offsets; all others, which may be many, are not parsed."""
    traces = {}
    if offsets:
        with path.open("rb") as file:
            for offset in offsets:
                file.seek(offset)
                row = json.loads(file.readline())
                traces[(row["step"], row["place"])] = row
    return traces


def _response(row: dict, trace: dict | None, index: int) -> dict[str, Any]:
    tokens = {name: trace[name][index] for name in TRACED} if trace else {}
    outcomes = {name: outcome for name, outcome in row.get("outcomes", {}).items() if outcome != "graded"}
    return {
        "text": row["response"],
        "reward": row["reward"],
        "parts": row["parts"],
        "outcomes": outcomes,
        "advantage": _rounded(row["advantage"]),
        "tokens": row["tokens"],
        "truncated": row["finish"] == "length",
        "boxes": row.get("boxes", []),
    } | tokens


def _changed(path: Path, evaluations: list[dict], images: EmbeddedImages) -> list[dict[str, Any]]:
    """Problems whose mean score differs between the first and the last evaluation."""
    steps = sorted({row["step"] for row in evaluations})
    ends = steps[:1] + steps[-1:]
    folders = [path / "evaluations" / f"step_{step:06d}" for step in ends]
    if len(steps) < 2 or not all((folder / "samples.jsonl").is_file() for folder in folders):
        return []
    labels = [f"after {step} steps" for step in ends]
    return [
        changed_item("evaluation", dict(zip(labels, pair, strict=True)), images)
        for comparison in compare(*map(read_samples, folders))
        for pair in thin(comparison.changed, MAX_CHANGED)
    ]
