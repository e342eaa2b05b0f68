"""What a report shows of a run: plain values, of a size that a page can hold."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.tools.compare import compare, read_samples

POINTS = 400
"""Steps of a curve; longer runs are thinned."""
CLOUDS = 40
"""Steps whose histograms are kept."""
KEY = re.compile(rb'\{"step": (\d+), "place": (\d+),')
"""How a line of traces.jsonl begins."""
LARGEST = 2_000_000
"""Bytes of a picture; those of a run are small."""
CHANGED = 40
"""Problems of an evaluation whose verdict changed."""
FACTS = (
    "model.path",
    "data.source",
    "data.args",
    "reward.parts",
    "algo.objective",
    "algo.ratio",
    "algo.advantage",
    "algo.kl",
    "train.lr",
    "train.prompts_per_step",
    "train.minibatches",
    "rollout.group",
    "rollout.temperature",
    "rollout.max_tokens",
    "run.seed",
)
"""Fields of the config that the summary names."""


class Pictures:
    """Files as data URLs, each once."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self._places: dict[Path, int | None] = {}

    def place(self, path: Path) -> int | None:
        """Where the picture stands in `urls`; None where there is no such file."""
        if path not in self._places:
            there = path.is_file() and path.stat().st_size < LARGEST
            self._places[path] = len(self.urls) if there else None
            if there:
                encoded = base64.b64encode(path.read_bytes()).decode()
                self.urls.append(f"data:image/jpeg;base64,{encoded}")
        return self._places[path]

    def places(self, folder: Path, names: Sequence[str]) -> list[int | None]:
        """Of several files in a folder; none of one that a name leads out to."""
        paths = [(folder / name).resolve() for name in names]
        return [self.place(path) if path.is_relative_to(folder.resolve()) else None for path in paths]


def collect(folders: Sequence[Path], groups: int) -> dict[str, Any]:
    """Runs and pictures; `groups` is how many groups of each run are kept. Raises ValueError for a folder
    that holds no run."""
    pictures = Pictures()
    runs = [_run(folder, groups, pictures) for folder in dict.fromkeys(map(Path.resolve, folders))]
    _keep_facts([run["facts"] for run in runs])
    names = [run["name"] for run in runs]
    for run in runs:
        if names.count(run["name"]) > 1:
            run["name"] = run["folder"]
    return _plain({"runs": runs, "pictures": pictures.urls})


def _plain(value: Any) -> Any:
    """The same without numbers that JSON can't hold, and without half characters."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _run(path: Path, groups: int, pictures: Pictures) -> dict[str, Any]:
    folder = RunFolder(path)
    metrics = folder.read("metrics.jsonl")
    if not metrics:
        what = "it has no step in metrics.jsonl" if path.is_dir() else "there is no such folder"
        raise ValueError(f"{path} must be the folder of a run; {what}")
    config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    evaluations = folder.read("evaluations.jsonl")
    return {
        "name": path.resolve().name,
        "folder": str(path),
        "facts": _flat(config),
        "summary": folder.summary(),
        "steps_planned": _field(config, "train.steps"),
        "metrics": _columns(evenly(metrics, POINTS)),
        "evaluations": evaluations,
        "histograms": evenly(folder.read("histograms.jsonl"), CLOUDS),
        "items": [
            *_groups(folder, groups, pictures),
            *_changed(path, evaluations, pictures),
        ],
    }


def evenly(rows: list[Any], count: int) -> list[Any]:
    """At most so many of the rows, the first and the last among them."""
    if len(rows) <= count:
        return rows
    return [rows[round(number * (len(rows) - 1) / (count - 1))] for number in range(count)]


def _columns(rows: list[dict]) -> dict[str, list]:
    """Numbers by name; null where a step has none."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [_short(row.get(name)) for row in rows] for name in names}


def _short(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _field(config: dict, name: str) -> Any:
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _flat(config: dict, path: str = "") -> dict[str, str]:
    """Values by field, lists as a whole; what has no value is left out."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{path}{name}.")
        elif value is not None and value != []:
            found[f"{path}{name}"] = _text(value)
    return found


def _keep_facts(runs: list[dict[str, str]]) -> None:
    """Leaves the fields that say what the runs are, and those in which they differ."""
    names = dict.fromkeys(name for facts in runs for name in facts)
    differ = {name for name in names if len({facts.get(name) for facts in runs}) > 1}
    kept = {name for name in names if name.startswith(FACTS)} | (differ - {"run.dir", "run.name"})
    for facts in runs:
        for name in facts.keys() - kept:
            del facts[name]


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _groups(folder: RunFolder, count: int, pictures: Pictures) -> list[dict[str, Any]]:
    """The logged groups, with what the updates saw of them."""
    found: dict[tuple, list[dict]] = {}
    for row in folder.read("rollouts.jsonl"):
        place = row.get("place", row["id"])  # older runs have no places and no pictures
        found.setdefault((row["step"], place), []).append(row)
    seen: dict[tuple, float] = {}
    changed, means = set(), {}
    for key, rows in found.items():
        means[key] = sum(row["reward"] for row in rows) / len(rows)
        name = (rows[0].get("task"), rows[0]["id"])
        if seen.setdefault(name, means[key]) != means[key]:
            changed.add(key)
    where = _traced(folder.path / "traces.jsonl")
    keys = evenly([key for key in found if key in where] or list(found), count)
    traces = _traces(folder.path / "traces.jsonl", [where[key] for key in keys if key in where])
    items = []
    for key in keys:
        rows = found[key]
        items.append(
            _item(rows[0], f"step {key[0]}", pictures.places(folder.path, rows[0].get("pictures", [])))
            | {
                "kind": "rollout",
                "step": key[0],
                "boxes": rows[0].get("gold_boxes", []),
                "mean": means[key],
                "changed": key in changed,
                "responses": [_response(row, traces.get(key), place) for place, row in enumerate(rows)],
            }
        )
    return items


def _traced(path: Path) -> dict[tuple[int, int], int]:
    """Where in the file the line of each step and place begins."""
    found: dict[tuple[int, int], int] = {}
    if path.is_file():
        with path.open("rb") as file:
            place = 0
            for line in file:
                if (match := KEY.match(line)) and line.endswith(b"\n"):
                    found[(int(match[1]), int(match[2]))] = place
                place += len(line)
    return found


def _traces(path: Path, places: Sequence[int]) -> dict[tuple, dict]:
    """The lines that begin there; the others, which may be many, are not read."""
    found = {}
    if places:
        with path.open("rb") as file:
            for place in places:
                file.seek(place)
                row = json.loads(file.readline())
                found[(row["step"], row["place"])] = row
    return found


def _item(row: dict, title: str, pictures: list[int | None]) -> dict[str, Any]:
    return {
        "title": title,
        "id": row["id"],
        "problem": row["problem"],
        "answer": row["answer"],
        "pictures": pictures,
        "task": row.get("task") or row.get("benchmark"),
    }


def _response(row: dict, trace: dict | None, place: int) -> dict[str, Any]:
    seen = (
        {name: trace[name][place] for name in ("pieces", "log_ratio", "effective", "entropy")}
        if trace
        else {}
    )
    return {
        "text": row["response"],
        "reward": row["reward"],
        "parts": row["parts"],
        "outcomes": {
            name: outcome for name, outcome in row.get("outcomes", {}).items() if outcome != "graded"
        },
        "advantage": _short(row["advantage"]),
        "tokens": row["tokens"],
        "cut": row["finish"] == "length",
        "boxes": row.get("boxes", []),
    } | seen


def _changed(path: Path, evaluations: list[dict], pictures: Pictures) -> list[dict[str, Any]]:
    """The problems whose verdict differs between the first evaluation and the last."""
    steps = sorted({row["step"] for row in evaluations})
    folders = [path / "evaluations" / f"step_{step:06d}" for step in (steps[:1] + steps[-1:])]
    if len(steps) < 2 or not all((folder / "samples.jsonl").is_file() for folder in folders):
        return []
    items = []
    for comparison in compare(*map(read_samples, folders)):
        for first, second in evenly(comparison.changed, CHANGED):
            responses = [
                {"text": text, "reward": score, "tokens": tokens, "cut": cut, "when": f"after {step} steps"}
                for step, record in zip((steps[0], steps[-1]), (first, second), strict=True)
                for text, score, tokens, cut in zip(
                    record["responses"], record["scores"], record["tokens"], record["truncated"], strict=True
                )
            ]
            last = second["scores"]
            items.append(
                _item(
                    first,
                    f"evaluation {comparison.benchmark}",
                    pictures.places(folders[0], first["pictures"]),
                )
                | {
                    "kind": "evaluation",
                    "step": steps[-1],
                    "mean": sum(last) / len(last),
                    "changed": True,
                    "responses": responses,
                }
            )
    return items
