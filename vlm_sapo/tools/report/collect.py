"""Collects what a report shows of a run: plain values, few enough for one page."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from vlm_sapo.config.fields import belongs
from vlm_sapo.config.files import read_mapping
from vlm_sapo.config.schema import report_fields
from vlm_sapo.evaluation.samples import SAMPLES
from vlm_sapo.reporting.console import duration
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.tools.compare import OTHER_SETTINGS, Comparison, compare, set_up_alike
from vlm_sapo.tools.report.evaluation import collect_evaluation
from vlm_sapo.tools.report.findings import (
    WINDOW,
    Finding,
    counted,
    describe_comparisons,
    describe_results,
    describe_training,
)
from vlm_sapo.tools.report.page import EmbeddedImages
from vlm_sapo.tools.report.samples import Samples, episode, problem_item, read_samples

GROUPS, PROBLEMS = 100, 1000
"""Groups of a run and problems of an evaluation that a page shows, unless told otherwise."""
MAX_POINTS = 400
"""Steps of a curve; longer runs are thinned."""
MAX_HISTOGRAMS = 40
"""Steps whose histograms are shown."""
MAX_CHANGED = 40
"""Problems of an evaluation whose verdict changed."""
TRACE_KEY = re.compile(rb'\{"step": (\d+), "place": (\d+),')
"""The beginning of a line of traces.jsonl: step and slot of a group."""
TRACED = ("pieces", "policy", "log_ratio", "effective", "entropy")
"""What traces.jsonl holds of each token."""
SPECIAL = re.compile(r"<[^<>\s]+>")
"""The name of a special token."""
PEAKS = {"memory/gpu_peak_gb": "of a GPU", "memory/host_peak_gb": "of a process in host memory"}
"""Metrics of peak memory, in words."""
SOURCE_FIELDS = ("source", "revision", "subset", "split", "args")
"""What says where rows come from."""
GroupKey = tuple[int, int]
"""Step and slot of a logged group."""


def collect(folders: Sequence[Path], groups: int | None = None) -> dict[str, Any]:
    """The data of a report: runs or evaluations, each with at most `groups` groups or problems, and images.
    Raises ValueError for a folder that is neither, and for runs beside evaluations."""
    images = EmbeddedImages()
    folders = list(dict.fromkeys(map(Path.resolve, folders)))
    evaluations = [folder for folder in folders if _is_evaluation(folder)]
    if evaluations and len(evaluations) < len(folders):
        other = next(folder for folder in folders if folder not in evaluations)
        raise ValueError(
            f"{evaluations[0]} is an evaluation and {other} is not; a page shows runs or evaluations, so "
            "write two"
        )
    if evaluations:
        items = [collect_evaluation(folder, groups or PROBLEMS, images) for folder in evaluations]
        _name_apart(items)
        return {"evaluations": items, "images": images.urls}
    runs = [_run(folder, groups or GROUPS, images) for folder in folders]
    _select_facts([run["facts"] for run in runs])
    _name_apart(runs)
    return {"runs": runs, "between": _between(runs), "images": images.urls}


def _between(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sentences on how the last evaluation of each further run differs from the first run's."""
    last = [_last_records(run["evaluations"]) for run in runs]
    samples = [
        _samples_of(Path(run["folder"]), list(records.values()))
        for run, records in zip(runs, last, strict=True)
    ]
    findings = []
    for run, records, others in zip(runs[1:], last[1:], samples[1:], strict=True):

        def when(name: str, run=run, records=records) -> str:
            before, after = (counted(own[name]["step"], "step") for own in (last[0], records))
            return f"from {runs[0]['name']} (after {before}) to {run['name']} (after {after})"

        findings += describe_comparisons(compare(samples[0], others), when)
        findings += [
            Finding("look", f"{name}: {OTHER_SETTINGS}.")
            for name in records.keys() & last[0].keys()
            if not set_up_alike(last[0][name], records[name])
        ]
    return [finding._asdict() for finding in findings]


def _last_records(evaluations: Sequence[dict]) -> dict[str, dict]:
    """The last evaluation of each name."""
    return {record["name"]: record for record in evaluations}


def _samples_of(path: Path, records: Sequence[Mapping[str, Any]]) -> Samples:
    """The samples of evaluations of different names, as far as they are there."""
    folders = {row["step"]: path / "evaluations" / f"step_{row['step']:06d}" for row in records}
    files = {step: read_samples(folder) for step, folder in folders.items() if (folder / SAMPLES).is_file()}
    return {row["name"]: files.get(row["step"], {}).get(row["name"], {}) for row in records}


def _is_evaluation(folder: Path) -> bool:
    return (folder / "samples.jsonl").is_file() and not (folder / "metrics.jsonl").is_file()


def _name_apart(items: list[dict[str, Any]]) -> None:
    """Names items of one name by their folders."""
    names = [item["name"] for item in items]
    for item in items:
        if names.count(item["name"]) > 1:
            item["name"] = item["folder"]


def _run(path: Path, groups: int, images: EmbeddedImages) -> dict[str, Any]:
    folder = RunFolder(path)
    metrics = folder.read("metrics.jsonl")
    if not metrics:
        reason = (
            "it has neither a step in metrics.jsonl nor samples.jsonl"
            if path.is_dir()
            else "there is no such folder"
        )
        raise ValueError(f"{path} must be the folder of a run or of an evaluation; {reason}")
    config = read_mapping(path / "config.yaml")
    evaluations, summary = folder.evaluations(), folder.summary()
    comparisons = _compare_ends(path, evaluations)
    findings = [*describe_results(evaluations, comparisons), *describe_training(metrics, config)]
    return {
        "name": path.resolve().name,
        "folder": str(path),
        "findings": [finding._asdict() for finding in findings],
        "about": _about(path, metrics, config, finished=summary is not None),
        "data": _data(metrics, config),
        "facts": _flatten(config),
        "metrics": _columns(thin(metrics, MAX_POINTS)),
        "evaluations": evaluations,
        "histograms": thin(folder.read("histograms.jsonl"), MAX_HISTOGRAMS),
        "items": [*_groups(folder, groups, images), *_changed(comparisons, evaluations, images)],
    }


def thin(rows: list[Any], count: int) -> list[Any]:
    """At most `count` of the rows, evenly spaced, with the first and the last."""
    if len(rows) <= count:
        return rows
    if count == 1:
        return rows[:1]
    return [rows[round(number * (len(rows) - 1) / (count - 1))] for number in range(count)]


def _columns(rows: list[dict]) -> dict[str, list]:
    """Values by name, without those of single mini-batches; None where a row has none."""
    names = dict.fromkeys(name for row in rows for name in row if not name.startswith("minibatch"))
    return {name: [_rounded(row.get(name)) for row in rows] for name in names}


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value


def _about(path: Path, metrics: list[dict], config: dict, *, finished: bool) -> dict[str, str]:
    """How a run was started and how far it is, as texts by name; without what its files don't hold."""
    last, steps = metrics[-1], len(metrics)
    file = path / "environment.json"
    started = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    changed = ", with uncommitted changes" if started.get("uncommitted_changes") else ""
    devices = Counter(started.get("devices", []))
    seconds = sum(row.get("time/step", 0.0) for row in metrics)
    rates = [row["lr"] for row in metrics if "lr" in row]
    about = {
        "folder": str(path),
        "command": started.get("command"),
        "started": started.get("started"),
        "resumed": ", ".join(each["started"] for each in started.get("resumed", [])),
        "commit": f"{started['commit']}{changed}" if started.get("commit") else None,
        "devices": ", ".join(f"{count} x {name}" for name, count in devices.items()),
        "versions": ", ".join(f"{name} {number}" for name, number in started.get("versions", {}).items()),
        "steps": f"{last['step']} of {config['train']['steps']}{', finished' if finished else ''}",
        "epochs": f"{last['epoch']:.3g}" if "epoch" in last else None,
        "time": f"{_elapsed(seconds)} in steps, {seconds / steps:.3g} s per step" if seconds else None,
        "learning rate": f"{rates[0]:.3g} to {rates[-1]:.3g}" if len(set(rates)) > 1 else None,
        "peak memory": ", ".join(
            f"{max(row.get(metric, 0.0) for row in metrics):.1f} GB {where}"
            for metric, where in PEAKS.items()
            if metric in last
        ),
    }
    return {name: text for name, text in about.items() if text}


def _elapsed(seconds: float) -> str:
    return duration(seconds) if seconds >= 120 else f"{seconds:.0f} s"


def _data(metrics: list[dict], config: dict) -> list[dict[str, Any]]:
    """What was trained on, by source: its share, how many of its prompts, how often, and its reward."""
    mixture = config["data"].get("mixture") or []
    total = sum(source["share"] for source in mixture)
    rows = []
    for source in mixture or [config["data"]]:
        name = source.get("name") or str(source.get("source"))
        reward, epoch = (f"task/{name}/reward", f"task/{name}/epoch") if mixture else ("reward/mean", "epoch")
        counts = [row[key] for row in metrics for key in row if _counts_prompts(key, name, mixture)]
        rewards = [row[reward] for row in metrics if reward in row]
        size = max(1, min(WINDOW, len(rewards) // 2))
        rows.append(
            {
                "name": name,
                "source": " ".join(str(source[key]) for key in SOURCE_FIELDS if source.get(key)),
                "share": source["share"] / total if mixture else 1.0,
                "prompts": sum(counts) or None,
                "epochs": _rounded(metrics[-1].get(epoch)),
                "first": _rounded(sum(rewards[:size]) / size) if rewards else None,
                "last": _rounded(sum(rewards[-size:]) / size) if rewards else None,
            }
        )
    return rows


def _counts_prompts(key: str, name: str, mixture: list) -> bool:
    """Whether a metric counts the prompts of a source in a step."""
    if not mixture:
        return key == "rollout/groups"
    return key.startswith("minibatch") and key.endswith(f"/prompts/{name}")


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
    """A value in one line; mappings in a list without their fields that have none."""
    if isinstance(value, list):
        value = [
            {key: one for key, one in item.items() if one not in (None, {}, [])}
            if isinstance(item, dict)
            else item
            for item in value
        ]
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
                "responses": [
                    _response(row, trace, index) | episode(row, folder.path, images)
                    for index, row in enumerate(rows)
                ],
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
    tokens = _shortened({name: trace[name][index] for name in TRACED if name in trace}) if trace else {}
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


def _shortened(tokens: dict[str, list]) -> dict[str, list]:
    """With a run of the same special token of an environment, such as those of an image, as one token."""
    if not tokens.get("policy"):
        return tokens
    starts, texts = [], []
    numbered = enumerate(zip(tokens["pieces"], tokens["policy"], strict=True))
    for (text, own), run in groupby(numbered, lambda item: item[1]):
        indices = [index for index, _ in run]
        if len(indices) > 1 and not own and SPECIAL.fullmatch(text):
            starts.append(indices[0])
            texts.append(f"{text} x{len(indices)}")
        else:
            starts += indices
            texts += [text] * len(indices)
    columns = {name: [values[at] for at in starts] if values else [] for name, values in tokens.items()}
    return columns | {"pieces": texts}


def _compare_ends(path: Path, evaluations: list[dict]) -> list[Comparison]:
    """By name the comparison of the first with the last evaluation, where both have samples."""
    ends = [_ends(evaluations, name) for name in _last_records(evaluations)]
    ends = [pair for pair in ends if pair[0]["step"] < pair[1]["step"]]
    first, last = (_samples_of(path, [pair[side] for pair in ends]) for side in (0, 1))
    return compare(first, last)


def _ends(evaluations: list[dict], name: str) -> tuple[dict, dict]:
    """The records of the first and the last evaluation of a name."""
    records = sorted((row for row in evaluations if row["name"] == name), key=lambda row: row["step"])
    return records[0], records[-1]


def _changed(
    comparisons: Sequence[Comparison], evaluations: list[dict], images: EmbeddedImages
) -> list[dict[str, Any]]:
    """Problems whose mean score differs between the first and the last evaluation."""
    items = []
    for comparison in comparisons:
        labels = [f"after {row['step']} steps" for row in _ends(evaluations, comparison.benchmark)]
        for pair in thin(comparison.changed, MAX_CHANGED):
            items.append(problem_item("evaluation", dict(zip(labels, pair, strict=True)), images))
    return items
