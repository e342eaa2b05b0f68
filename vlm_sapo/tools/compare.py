"""Compares two evaluations of the same problems: a paired test, and a page of the problems, those whose
verdict changed first."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vlm_sapo.evaluation.results import RESAMPLES
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import EVALUATIONS, RunFolder, measured_alike
from vlm_sapo.tools.report.findings import describe_comparisons
from vlm_sapo.tools.report.page import EmbeddedImages, render
from vlm_sapo.tools.report.samples import Samples, mean_score, problem_item, read_samples

HEADER = ["benchmark", "problems", "A", "B", "B - A", "95 % interval", "wins", "losses", "sign test p"]
IGNORED_SETTINGS = ("model", "responses", "weights", "recorded", "definition", "on_error")
"""Settings that two evaluations may differ in without a note."""
OTHER_SETTINGS = "the two were sampled or graded in different ways (samples, lengths, temperature, reward)"
MAX_PROBLEMS = 500
"""Problems on the page, the changed ones first."""
MAX_RESPONSES = 4
"""Responses to each problem on the page, of each evaluation."""


@dataclass(frozen=True)
class Comparison:
    """B against A on one benchmark. `wins` are problems where B's mean score is higher."""

    benchmark: str
    n: int
    first: float
    second: float
    difference: float
    ci95: tuple[float, float]
    wins: int
    losses: int
    p: float
    changed: list[tuple[dict, dict]]
    """Records of A and B for the problems whose mean score differs, B's losses first."""
    unchanged: list[tuple[dict, dict]]
    """The same for all others."""


def compare_command(one: Path, other: Path, out: Path) -> list[Comparison]:
    """Compares two folders of `vlm-sapo eval`, or of a training run's `evaluations/`; prints a table and
    writes a page."""
    console = Console()
    first, second = read_samples(one), read_samples(other)
    comparisons, notes = compare(first, second), find_differences(one, other, first, second)
    if not comparisons:
        raise ValueError(
            f"RUN_A ({one}) and RUN_B ({other}) must share problems of a benchmark; they share none"
        )
    console.table(HEADER, [_cells(comparison) for comparison in comparisons])
    data = _page_data(comparisons, notes) | {"a": str(one), "b": str(other)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(data), encoding="utf-8")
    for note in notes:
        console.warn(note)
    for comparison in comparisons:
        for a, b in comparison.changed[:5]:
            console.say(f"    {comparison.benchmark} {a['id']}: {mean_score(a):.2f} to {mean_score(b):.2f}")
    if not data["changed"]:
        console.say("no verdict changed")
    console.say(f"{out} shows the problems with images and the responses of both")
    return comparisons


def compare(one: Samples, other: Samples) -> list[Comparison]:
    """Compares the benchmarks and problems that both evaluations have."""
    comparisons = []
    for name in (name for name in one if name in other):
        keys = [key for key in one[name] if key in other[name]]
        if keys:
            comparisons.append(_compare(name, [(one[name][key], other[name][key]) for key in keys]))
    return comparisons


def _compare(name: str, pairs: list[tuple[dict, dict]]) -> Comparison:
    first = np.array([mean_score(record) for record, _ in pairs])
    second = np.array([mean_score(record) for _, record in pairs])
    gain = second - first
    resamples = np.random.default_rng(0).integers(0, len(gain), (RESAMPLES, len(gain)))
    low, high = np.quantile(gain[resamples].mean(1), [0.025, 0.975])
    gain[np.abs(gain) < 1e-9] = 0.0  # means of the same scores in another order
    wins, losses = int((gain > 0).sum()), int((gain < 0).sum())
    order = np.argsort(gain, kind="stable")
    return Comparison(
        benchmark=name,
        n=len(pairs),
        first=float(first.mean()),
        second=float(second.mean()),
        difference=float(gain.mean()),
        ci95=(float(low), float(high)),
        wins=wins,
        losses=losses,
        p=sign_test(wins, losses),
        changed=[pairs[index] for index in order if gain[index]],
        unchanged=[pairs[index] for index in order if not gain[index]],
    )


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of a sign test; ties don't count."""
    n = wins + losses
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        for k in range(min(wins, losses) + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def find_differences(one: Path, other: Path, first: Samples, second: Samples) -> list[str]:
    """Notes on what makes two evaluations less comparable: benchmarks and problems that only one has, and
    different settings."""
    notes = []
    for name in dict.fromkeys([*first, *second]):
        a, b = first.get(name, {}), second.get(name, {})
        if not a or not b:
            notes.append(f"{name} is only in {'A' if a else 'B'}")
        elif a.keys() != b.keys():
            notes.append(
                f"{name}: {len(a.keys() & b.keys())} problems are in both, of {len(a)} in A and {len(b)} in B"
            )
    for name in (name for name in first if name in second):
        if not set_up_alike(*(_measured(folder).get(name, {}) for folder in (one, other))):
            notes.append(f"{name}: {OTHER_SETTINGS}")
    settings_a, settings_b = _settings(one), _settings(other)
    for name in (name for name in settings_a if name in settings_b):
        a, b = settings_a[name], settings_b[name]
        keys = [key for key in a if key not in IGNORED_SETTINGS and a[key] != b.get(key)]
        if keys:
            values = ", ".join(f"{key} {a[key]} and {b.get(key)}" for key in keys)
            notes.append(f"{name}: A and B differ in {values}")
    return notes


def set_up_alike(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two records of evaluations were sampled and graded alike, whatever their rows."""
    return measured_alike(dict(first) | {"rows": None}, second)


def _measured(folder: Path) -> dict[str, dict]:
    """By name the records of a run's evaluations after one step; empty for a folder of `vlm-sapo eval`."""
    step = re.fullmatch(r"step_(\d+)", folder.resolve().name)
    records = RunFolder(folder.resolve().parent.parent).read(EVALUATIONS) if step else []
    return {record["name"]: record for record in records if record["step"] == int(step[1])}


def _settings(folder: Path) -> dict[str, dict]:
    path = folder / "eval.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _page_data(comparisons: Sequence[Comparison], notes: Sequence[str]) -> dict[str, Any]:
    """What the page shows: sentences, the table, the notes and the problems."""
    images = EmbeddedImages()
    changed = [(comparison.benchmark, *pair) for comparison in comparisons for pair in comparison.changed]
    unchanged = [(comparison.benchmark, *pair) for comparison in comparisons for pair in comparison.unchanged]
    items = [
        problem_item(benchmark, {"A": a, "B": b}, images, MAX_RESPONSES)
        for benchmark, a, b in [*changed, *unchanged][:MAX_PROBLEMS]
    ]
    return {
        "findings": [finding._asdict() for finding in describe_comparisons(comparisons, "from A to B")],
        "header": HEADER,
        "rows": [_cells(comparison) for comparison in comparisons],
        "notes": notes,
        "changed": len(changed),
        "problems": len(changed) + len(unchanged),
        "items": items,
        "images": images.urls,
    }


def _cells(comparison: Comparison) -> list[str]:
    low, high = comparison.ci95
    return [
        comparison.benchmark,
        str(comparison.n),
        f"{comparison.first:.3f}",
        f"{comparison.second:.3f}",
        f"{comparison.difference:+.3f}",
        f"{low:+.3f} to {high:+.3f}",
        str(comparison.wins),
        str(comparison.losses),
        f"{comparison.p:.2g}",
    ]
