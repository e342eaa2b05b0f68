"""Two evaluations of the same problems side by side: a paired test, and the pictures whose verdict
changed."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import yaml

from vlm_sapo.evaluation.results import RESAMPLES
from vlm_sapo.reporting.console import Console

HEADER = ["benchmark", "problems", "A", "B", "B - A", "95 % interval", "wins", "losses", "sign test p"]
OWN = ("model", "responses", "weights", "recorded", "definition", "on_error", "dtype")
"""Settings in which two evaluations are meant to differ, or that say nothing to a reader."""
SHOWN = 200
"""Changed problems that the page holds."""
SAMPLES = 4
"""Responses to each that it shows."""
STYLE = """body{font:15px sans-serif;max-width:70em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse}td,th{padding:.3em .8em;text-align:left;border-bottom:1px solid #ddd}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1em}
.pair div{white-space:pre-wrap;background:#f6f6f6;padding:.6em;overflow-wrap:anywhere}
.right{border-left:4px solid #2a2}.wrong{border-left:4px solid #c33}
img{max-width:24em}section{margin:2em 0;border-top:1px solid #ccc}"""


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
    """Records of the problems whose mean score differs, B's losses first."""


def compare_command(one: Path, other: Path, out: Path) -> list[Comparison]:
    """Compares two folders of `vlm-sapo eval`, or of a training run's `evaluations/`; prints and writes a
    page."""
    console = Console()
    first, second = read_samples(one), read_samples(other)
    comparisons, said = compare(first, second), notes(one, other, first, second)
    if not comparisons:
        raise ValueError(
            f"RUN_A ({one}) and RUN_B ({other}) must share problems of a benchmark; they share none"
        )
    console.table(HEADER, [_cells(item) for item in comparisons])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(comparisons, one, other, said), encoding="utf-8")
    for note in said:
        console.warn(note)
    for item in comparisons:
        for first, second in item.changed[:5]:
            console.say(f"    {item.benchmark} {first['id']}: {_mean(first):.2f} to {_mean(second):.2f}")
    console.say(f"the problems whose verdict changed, with pictures and both responses, are in {out}")
    return comparisons


def read_samples(folder: Path) -> dict[str, dict[tuple, dict]]:
    """By benchmark, the records of a folder by row and id."""
    path = folder / "samples.jsonl"
    if not path.is_file():
        inside = sorted(folder.glob("evaluations/*/samples.jsonl"))
        hint = f"; give one of {', '.join(str(p.parent) for p in inside)}" if inside else ""
        raise ValueError(f"{folder} must hold samples.jsonl, as `vlm-sapo eval` writes it{hint}")
    found: dict[str, dict[tuple, dict]] = {}
    for line in filter(None, path.read_text(encoding="utf-8", errors="replace").split("\n")):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last line of a process that was killed, or writes just now
            continue
        record["folder"] = str(folder)
        found.setdefault(record["benchmark"], {})[(record["row"], record["id"])] = record
    return found


def compare(one: dict[str, dict], other: dict[str, dict]) -> list[Comparison]:
    """The benchmarks that both have, on the problems that both have."""
    found = []
    for name in (name for name in one if name in other):
        keys = [key for key in one[name] if key in other[name]]
        if keys:
            found.append(_compare(name, [(one[name][key], other[name][key]) for key in keys]))
    return found


def _compare(name: str, pairs: list[tuple[dict, dict]]) -> Comparison:
    first = np.array([_mean(record) for record, _ in pairs])
    second = np.array([_mean(record) for _, record in pairs])
    gain = second - first
    draws = np.random.default_rng(0).integers(0, len(gain), (RESAMPLES, len(gain)))
    low, high = np.quantile(gain[draws].mean(1), [0.025, 0.975])
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
        changed=[pairs[place] for place in order if gain[place]],
    )


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of so many wins and losses where either is as likely; ties don't count."""
    n = wins + losses
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        for k in range(min(wins, losses) + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def notes(one: Path, other: Path, first: dict[str, dict], second: dict[str, dict]) -> list[str]:
    """What makes two folders less than alike: benchmarks and problems of one alone, other settings."""
    said = []
    for name in dict.fromkeys([*first, *second]):
        a, b = first.get(name, {}), second.get(name, {})
        if not a or not b:
            said.append(f"{name} is only in {'A' if a else 'B'}")
        elif a.keys() != b.keys():
            said.append(
                f"{name}: {len(a.keys() & b.keys())} problems are in both, of {len(a)} in A and {len(b)} in B"
            )
    held = [_settings(folder) for folder in (one, other)]
    for name in held[0].keys() & held[1].keys():
        a, b = held[0][name], held[1][name]
        differ = [f"{key} {a[key]} and {b.get(key)}" for key in a if key not in OWN and a[key] != b.get(key)]
        said += [f"{name}: A and B differ in {', '.join(differ)}"] if differ else []
    return said


def _settings(folder: Path) -> dict[str, dict]:
    path = folder / "eval.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def page(comparisons: Sequence[Comparison], one: Path, other: Path, said: Sequence[str] = ()) -> str:
    """One HTML file without anything outside it."""
    remarks = "".join(f"<p>Note: {escape(note)}</p>" for note in said)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(item)) + "</tr>"
        for item in comparisons
    )
    head = "".join(f"<th>{name}</th>" for name in HEADER)
    shown = [(item.benchmark, *pair) for item in comparisons for pair in item.changed]
    sections = "".join(_section(*entry) for entry in shown[:SHOWN])
    more = f"<p>... and {len(shown) - SHOWN} more</p>" if len(shown) > SHOWN else ""
    return (
        f"<!doctype html><meta charset=utf-8><title>Comparison</title><style>{STYLE}</style>"
        "<h1>Comparison</h1>"
        f"<p>A: {escape(str(one))}<br>B: {escape(str(other))}</p>{remarks}"
        f"<table><tr>{head}</tr>{rows}</table>"
        f"<h2>Changed verdicts, B's losses first</h2>{sections}{more}\n"
    )


def _section(benchmark: str, first: dict, second: dict) -> str:
    pictures = "".join(_picture(Path(first["folder"]) / name) for name in first["pictures"])
    answers = "".join(
        f"<div class={'right' if _mean(record) >= 0.5 else 'wrong'}><b>{title}, {_mean(record):.2f}</b>\n"
        + "\n\n".join(
            f"{score:g}: {escape(response)}"
            for score, response in zip(record["scores"][:SAMPLES], record["responses"], strict=False)
        )
        + "</div>"
        for title, record in (("A", first), ("B", second))
    )
    return (
        f"<section><h3>{escape(benchmark)} {escape(first['id'])}</h3>{pictures}"
        f"<p>{escape(first['problem'])}</p>"
        f"<p>Gold: <b>{escape(first['answer'])}</b></p><div class=pair>{answers}</div></section>"
    )


def _picture(path: Path) -> str:
    if not path.is_file():
        return f"<p>{escape(str(path))} is missing</p>"
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _cells(item: Comparison) -> list[str]:
    low, high = item.ci95
    return [
        item.benchmark,
        str(item.n),
        f"{item.first:.3f}",
        f"{item.second:.3f}",
        f"{item.difference:+.3f}",
        f"{low:+.3f} to {high:+.3f}",
        str(item.wins),
        str(item.losses),
        f"{item.p:.2g}",
    ]


def _mean(record: dict) -> float:
    return float(np.mean(record["scores"]))
