"""Collects what a page shows of one evaluation: results by benchmark and subset, settings, responses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vlm_sapo.evaluation.results import Measure, bootstrap, cautions, summarize
from vlm_sapo.tools.report.findings import FEW, Finding, counted
from vlm_sapo.tools.report.page import EmbeddedImages
from vlm_sapo.tools.report.samples import mean_score, problem_item, read_samples

MAX_SUBSETS = 8
"""Most values of a column by which results are broken down without being asked to."""
MAX_RESPONSES = 8
"""Responses to each problem on the page."""
NOT_SUBSETS = ("id", "problem", "answer", "images", "split")
NOT_SETTINGS = ("weights", "problems", "recorded", "definition")
"""What eval.yaml holds for the next start of the same evaluation."""


def collect_evaluation(folder: Path, count: int, images: EmbeddedImages) -> dict[str, Any]:
    """What a page shows of a folder with samples.jsonl, with at most `count` problems."""
    samples = {name: list(records.values()) for name, records in read_samples(folder).items()}
    if not samples:
        raise ValueError(f"{folder} must hold an evaluation; its samples.jsonl has no sample yet")
    path, settings_path = folder / "results.json", folder / "eval.yaml"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings = yaml.safe_load(settings_path.read_text(encoding="utf-8")) if settings_path.is_file() else {}
    findings, results, subsets = [], [], []
    for name, records in samples.items():
        result = stored.get(name) or summarize(records, Measure(part=""))
        findings += _describe(name, result, complete=name in stored)
        results.append(_result(name, result))
        subsets += _subsets(name, records, result.get("by", {}))
    findings += _extremes(subsets)
    return {
        "name": folder.name,
        "folder": str(folder),
        "findings": [finding._asdict() for finding in findings],
        "results": results,
        "subsets": subsets,
        "settings": {name: _settings(settings.get(name, {}), stored.get(name, {})) for name in samples},
        "problems": sum(map(len, samples.values())),
        "items": _items(samples, count, images),
    }


def _describe(name: str, result: Mapping[str, Any], *, complete: bool) -> list[Finding]:
    """The result in a sentence, and what its reader must know."""
    low, high = result["ci95"]
    findings = [
        Finding(
            "note",
            f"{name}: pass@1 {result['pass@1']:.3f}, 95 % interval {low:.3f} to {high:.3f}, over "
            f"{counted(result['n'], 'problem')} with {counted(result['samples'], 'response')} each.",
        )
    ]
    if not complete:
        findings.append(
            Finding(
                "note",
                f"{name}: the numbers are of samples.jsonl alone, since results.json doesn't have them: this "
                "evaluation is not finished, or is part of a run.",
            )
        )
    if (official := result.get("official")) and official["differ"]:
        findings.append(
            Finding(
                "look",
                f"{name}: the official scorer gives {official['pass@1']:.3f}; the two verdicts differ on "
                f"{official['differ']} responses.",
            )
        )
    lines = cautions(dict(result), limit=result.get("limit"), max_tokens=result.get("max_tokens"))
    return findings + [Finding("look", f"{name}: {line}.") for line in lines]


def _extremes(subsets: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Which subsets of a column differ for certain: the best and the worst, if their intervals are apart."""
    findings = []
    for key in dict.fromkeys((row["benchmark"], row["column"]) for row in subsets):
        rows = [row for row in subsets if (row["benchmark"], row["column"]) == key and row["n"] >= FEW]
        if len(rows) < 2:
            continue
        best, worst = max(rows, key=_score), min(rows, key=_score)
        if best["ci95"][0] > worst["ci95"][1]:
            findings.append(
                Finding(
                    "note",
                    f"{key[0]} by {key[1]}: of {len(rows)} values best {best['value']} ({_score(best):.3f}), "
                    f"worst {worst['value']} ({_score(worst):.3f}); their 95 % intervals don't overlap.",
                )
            )
    return findings


def _score(row: Mapping[str, Any]) -> float:
    return row["pass@1"]


def _result(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of results; `more` has the columns that not every benchmark has."""
    more = {key: value for key, value in result.items() if key.startswith(("pass@", "majority@"))}
    del more["pass@1"]
    if official := result.get("official"):
        low, high = official["ci95"]
        more["official scorer"] = f"{official['pass@1']:.3f} ({low:.3f} to {high:.3f})"
    for metric, value in result.get("metric", {}).items():
        more[f"official {metric}"] = value["score"] if isinstance(value, dict) else value
    names = {
        "tokens per response": "response_tokens",
        "truncated": "truncated",
        "no answer found": "no_answer",
    }
    more |= {label: result[key] for label, key in names.items() if key in result}
    return {
        "benchmark": name,
        "n": result["n"],
        "samples": result["samples"],
        "pass@1": result["pass@1"],
        "ci95": result["ci95"],
        "more": more,
    }


def _subsets(name: str, records: list[dict], by: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Results by the values of columns: those that the benchmark names, and others of few values."""
    columns = dict.fromkeys([*by, *(column for record in records for column in record["columns"])])
    rows = []
    for column in columns:
        groups: dict[str, list[float]] = {}
        for record in records:
            groups.setdefault(str(record["columns"].get(column, "none")), []).append(mean_score(record))
        few = 1 < len(groups) <= min(MAX_SUBSETS, len(records) // 2)
        if len(groups) > 1 and (column in by or (few and column not in NOT_SUBSETS)):
            rows += [
                {
                    "benchmark": name,
                    "column": column,
                    "value": value,
                    "n": len(scores),
                    "pass@1": float(np.mean(scores)),
                    "ci95": bootstrap(np.array(scores)),
                }
                for value, scores in sorted(groups.items())
            ]
    return rows


def _settings(settings: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
    """The options of the evaluation, as they applied, and where its rows come from."""
    options = {key: result.get(key, value) for key, value in settings.items() if key not in NOT_SETTINGS}
    options["samples"] = result.get("samples", options.get("samples"))
    definition = settings.get("definition") or {}
    rows = {key: definition.get(key) for key in ("about", "source", "split")}
    return {key: str(value) for key, value in (options | rows).items() if value is not None}


def _items(samples: Mapping[str, list[dict]], count: int, images: EmbeddedImages) -> list[dict[str, Any]]:
    """Evenly spaced problems of all benchmarks."""
    records = [record for part in samples.values() for record in part]
    stride = max(1.0, len(records) / count)
    shown = [records[int(number * stride)] for number in range(min(count, len(records)))]
    columns = {name: {row["column"] for row in _subsets(name, part, {})} for name, part in samples.items()}
    return [
        problem_item(record["benchmark"], {"": record}, images, MAX_RESPONSES)
        | {"subsets": {c: str(record["columns"].get(c, "none")) for c in columns[record["benchmark"]]}}
        for record in shown
    ]
