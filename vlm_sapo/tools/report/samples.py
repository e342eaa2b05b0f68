"""Reads the samples of an evaluation, and makes of them what a page shows of a problem."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vlm_sapo.tools.report.page import MAX_TOTAL_BYTES, EmbeddedImages

Key = tuple[str, ...]
"""A problem's text, answer and pictures, and how many of the rows before it have the same."""
Samples = dict[str, dict[Key, dict]]
"""Records of samples.jsonl by benchmark, then by problem: rows may have moved between two evaluations, and
another problem may have a row's number and id."""


def read_samples(folder: Path) -> Samples:
    """Reads samples.jsonl of an evaluation's folder. Raises ValueError if there is none."""
    path = folder / "samples.jsonl"
    if not path.is_file():
        inside = sorted(folder.glob("evaluations/*/samples.jsonl"))
        hint = f"; use one of {', '.join(str(p.parent) for p in inside)}" if inside else ""
        raise ValueError(f"{folder} must hold samples.jsonl, as `vlm-sapo eval` writes it{hint}")
    benchmarks: dict[str, dict[int, dict]] = {}
    for line in filter(None, path.read_text(encoding="utf-8", errors="replace").split("\n")):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last line of a process that was killed or is writing right now
            continue
        record["folder"] = str(folder)
        benchmarks.setdefault(record["benchmark"], {})[record["row"]] = record
    return {name: _by_problem(records) for name, records in benchmarks.items()}


def _by_problem(records: Mapping[int, dict]) -> dict[Key, dict]:
    """The records, by row, of a benchmark."""
    keyed: dict[Key, dict] = {}
    seen: Counter[Key] = Counter()
    for row in sorted(records):
        record = records[row]
        key = (record["problem"], str(record["answer"]), *record.get("pictures", ()))
        keyed[*key, str(seen[key])] = record
        seen[key] += 1
    return keyed


def mean_score(record: dict) -> float:
    """The mean over a record's samples."""
    return float(np.mean(record["scores"]))


def problem_item(
    title: str, records: Mapping[str, dict], images: EmbeddedImages, responses: int | None = None
) -> dict[str, Any]:
    """A problem for a page's list of responses: the records of one evaluation, or of two to compare, by
    label, and the first `responses` of each."""
    first, last = [*records.values()][0], [*records.values()][-1]
    item = {
        "kind": "evaluation",
        "title": title,
        "id": first["id"],
        "problem": first["problem"],
        "answer": first["answer"],
        "task": first["benchmark"],
        "images": images.add(Path(first["folder"]), first["pictures"]),
        "mean": mean_score(last),
        "changed": abs(mean_score(last) - mean_score(first)) > 1e-9,
        "responses": [
            response | ({"when": label} if len(records) > 1 else {})
            for label, record in records.items()
            for response in _responses(record, images, responses)
        ],
    }
    if len(records) > 1:
        means = {label: mean_score(record) for label, record in records.items()}
        item |= {"gain": mean_score(last) - mean_score(first), "means": means}
    return item


def episode(row: Mapping[str, Any], folder: Path, images: EmbeddedImages) -> dict[str, Any]:
    """What a page shows of a response with an environment (`counts` and maybe `turns` and `finish`); empty
    for others. Images of turns may fill half of a page, so that those of other problems have room."""
    if not row.get("counts"):
        return {}
    limits = [name.removeprefix("limit/") for name in row["counts"] if name.startswith("limit/")]
    shown = {"finish": row.get("finish") or next(iter(limits), None), "counts": row["counts"]}
    if row.get("turns"):
        shown["turns"] = []
        for turn in row["turns"]:
            room = images.bytes < MAX_TOTAL_BYTES / 2
            files = turn.get("pictures", [])
            indices = images.add(folder, files) if room else [None] * len(files)
            shown["turns"].append({"by": turn["by"], "text": turn["text"], "images": indices})
    return shown


def _responses(record: dict, images: EmbeddedImages, limit: int | None) -> list[dict[str, Any]]:
    count = len(record["responses"])
    columns = (
        record["responses"],
        record["scores"],
        record.get("outcomes", ["graded"] * count),
        record.get("tokens", [None] * count),
        record.get("truncated", [False] * count),
        record.get("counts", [{}] * count),
        record.get("turns", [[]] * count),
    )
    return [
        {
            "text": text,
            "reward": score,
            "outcomes": {} if outcome == "graded" else {"outcome": outcome},
            "tokens": tokens,
            "truncated": truncated,
        }
        | episode({"counts": counts, "turns": turns}, Path(record["folder"]), images)
        for text, score, outcome, tokens, truncated, counts, turns in islice(
            zip(*columns, strict=True), limit
        )
    ]
