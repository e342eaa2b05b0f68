"""Measures of the stability study's runs, tables with intervals over seeds, and figures.

Definitions, fixed before the runs: pass@1 is the held-out rate over 16 samples a problem. `last` is that of
the last evaluation, `best` that of the best, `area` the mean height of the curve between first and last step.
A run has collapsed at the first step at which the mean training accuracy of the last 5 steps is under
COLLAPSE of the best such mean before; or where its numbers were none any more, after which all counts as 0.
Intervals are 95 % percentile bootstraps over seeds; differences are paired by seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from eval.stability import Arm, Plan, Store

COLLAPSE = 0.7
WINDOW = 5
RESAMPLES = 10_000
FEWEST = 3
"""Seeds from which a difference may be more than a tie."""
Interval = tuple[float, float, float]
"""Mean, low, high."""


@dataclass(frozen=True)
class Measures:
    """Of one run."""

    last: float
    best: float
    area: float
    collapsed: int | None
    """The step, or None."""


def measure(row: dict[str, Any]) -> Measures:
    """The measures of a result."""
    steps, rates = map(list, zip(*row["evaluations"], strict=True))
    done = len(row["series"]["accuracy"])
    if row.get("stopped"):
        steps, rates = [*steps, done + 1, row["steps"] + 1], [*rates, 0.0, 0.0]
    area = np.trapezoid(rates, steps) / (steps[-1] - steps[0])
    collapsed = collapse(row["series"]["accuracy"])
    if collapsed is None and row.get("stopped"):
        collapsed = done + 1
    return Measures(float(rates[-1]), float(max(rates)), float(area), collapsed)


def collapse(accuracy: Sequence[float]) -> int | None:
    """The first step (from 1) at which the last WINDOW steps' mean is under COLLAPSE of the best before."""
    means = np.convolve(accuracy, np.full(WINDOW, 1 / WINDOW), "valid")
    low = np.flatnonzero(means < COLLAPSE * np.maximum.accumulate(means))
    return int(low[0]) + WINDOW if len(low) else None


def interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % percentile bootstrap interval, with a fixed seed."""
    given = np.asarray(values, dtype=float)
    draws = np.random.default_rng(0).integers(0, len(given), (RESAMPLES, len(given)))
    low, high = np.quantile(given[draws].mean(1), [0.025, 0.975])
    return float(given.mean()), float(low), float(high)


@dataclass(frozen=True)
class Result:
    """An arm with what its finished runs came to, by seed."""

    arm: Arm
    rows: dict[int, dict[str, Any]]

    @property
    def measures(self) -> dict[int, Measures]:
        return {seed: measure(row) for seed, row in self.rows.items()}


def results(plan: Plan, name: str, store: Store) -> list[Result]:
    """A study's arms in the plan's order."""
    found = []
    for arm in plan.arms(name):
        runs = arm.runs(plan.config)
        found.append(Result(arm, {run.seed: store.rows[run.key] for run in runs if run.key in store.rows}))
    return found


def table(plan: Plan, name: str, found: Sequence[Result]) -> str:
    """Markdown: each arm's measures, and the difference of `last` to its counterpart."""
    against = plan.studies[name].against
    by_options = {result.arm.options: result for result in found}
    lines = [
        f"| arm | seeds | last | best | area | collapsed | last, and area, less `{against}`'s | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in found:
        if not result.rows:
            lines.append(f"| {' '.join(result.arm.options)} | 0 |  |  |  |  |  |  |")
            continue
        measures = result.measures
        cells = [
            _interval([getattr(item, key) for item in measures.values()]) for key in ("last", "best", "area")
        ]
        steps = sorted(item.collapsed for item in measures.values() if item.collapsed is not None)
        gone = f"{len(steps)} of {len(measures)}" + (f" (step {steps[len(steps) // 2]})" if steps else "")
        other = by_options.get((against, *result.arm.options[1:]))
        differs = other is not None and other is not result
        differences = [
            _difference(measures, other.measures, key) if differs else "" for key in ("last", "area")
        ]
        told = [" ".join(result.arm.options), len(measures), *cells, gone if steps else 0, *differences]
        lines.append(f"| {' | '.join(map(str, told))} |")
    return "\n".join(lines)


def _interval(values: Sequence[float]) -> str:
    mean, low, high = interval(values)
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _difference(one: dict[int, Measures], other: dict[int, Measures], key: str) -> str:
    """Of a measure, over the seeds that both have, and at how many of them `one` is ahead; in bold where the
    interval of at least FEWEST seeds leaves 0 out."""
    gains = [getattr(one[seed], key) - getattr(other[seed], key) for seed in one if seed in other]
    if not gains:
        return ""
    mean, low, high = interval(gains)
    text = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
    text = f"**{text}**" if len(gains) >= FEWEST and (low > 0 or high < 0) else text
    return f"{text}, {sum(gain > 0 for gain in gains)} of {len(gains)}"


def curves(found: Sequence[Result], title: str) -> Figure:
    """Held-out pass@1 by step: a panel for what is alike, a colour for each first option, thin lines for
    seeds and a thick one for their mean."""
    found = [result for result in found if result.rows]
    panels = list(dict.fromkeys(result.arm.options[1:] for result in found))
    firsts = list(dict.fromkeys(result.arm.options[0] for result in found))
    figure, axes = grid(len(panels), title)
    for axis, panel in zip(axes, panels, strict=True):
        axis.set_title(" ".join(panel), fontsize=9)
        for result in (result for result in found if result.arm.options[1:] == panel):
            place = firsts.index(result.arm.options[0])
            color, style = f"C{place % 10}", "-" if place < 10 else "--"
            rows = list(result.rows.values())
            for row in rows:
                axis.plot(*zip(*row["evaluations"], strict=True), color=color, lw=0.5, alpha=0.4)
            whole = [
                row for row in rows if len(row["evaluations"]) == max(len(r["evaluations"]) for r in rows)
            ]
            steps = [step for step, _ in whole[0]["evaluations"]]
            mean = np.mean([[rate for _, rate in row["evaluations"]] for row in whole], axis=0)
            axis.plot(steps, mean, color=color, ls=style, lw=2, label=result.arm.options[0])
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylim(0, 1)
    axes[0].set_ylabel("held-out pass@1", fontsize=8)
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8)
    return figure


def grid(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """So many panels, five in a row."""
    columns = min(count, 5)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(2.9 * columns + 1.4, 2.6 * lines + 0.4), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    return figure, axes[:count]


ASSUMED = (
    "effective_update",
    "abs_log_ratio_p50",
    "abs_log_ratio_p99",
    "sequence_variance_p50",
    "sequence_variance_p99",
    "sequence_variance_over_02",
    "gate_deviation",
    "gate_deviation_bound",
    "grpo_would_clip",
    "gspo_would_clip",
    "experts_changed",
)


def assumptions(found: Sequence[Result]) -> str:
    """Markdown: what the updates saw by mini-batch, means over steps and seeds."""
    lines = ["| arm | mini-batch | " + " | ".join(ASSUMED) + " |", "| --- " * (2 + len(ASSUMED)) + "|"]
    for result in (result for result in found if result.rows):
        rows = [row["minibatches"] for row in result.rows.values()]
        count = max(len(values) for row in rows for values in row.values())
        for place in sorted({0, 1, count // 2, count - 1}):
            cells = [_typical(rows, name, place) for name in ASSUMED]
            lines.append(f"| {' '.join(result.arm.options)} | {place + 1} of {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _typical(rows: Sequence[dict[str, list]], name: str, place: int) -> str:
    values = [row[name][place] for row in rows if name in row and row[name][place] is not None]
    return f"{np.mean(values):.3g}" if values else ""


def ratios(groups: dict[str, Result]) -> Figure:
    """By model: the tokens' |log r| by mini-batch, and responses' gate deviation with its bound."""
    from vlm_sapo.algo.diagnostics import DECADES

    figure = Figure(figsize=(4.5 * len(groups), 6), layout="constrained")
    axes = figure.subplots(2, len(groups), squeeze=False, sharex="row", sharey="row")
    middle = len(DECADES)
    for (name, result), upper, lower in zip(groups.items(), *axes, strict=True):
        rows = [row for row in result.rows.values() if "log_ratio" in row]
        for place in range(len(rows[0]["log_ratio"])):
            counts = np.sum([row["log_ratio"][place] for row in rows if row["log_ratio"][place]], axis=0)
            share = (counts[middle + 1 :] + counts[:middle][::-1]) / counts.sum()
            upper.step(DECADES, share, where="post", label=f"mini-batch {place + 1}")
        upper.set(xscale="log", title=name, xlabel="|log r|", ylabel="share of tokens")
        points = [point for row in rows for cloud in row["clouds"][1:] for point in cloud]
        variance, deviation, factor = np.array(points).T
        order = np.argsort(variance)
        lower.plot(variance[order], (factor * variance)[order], "k-", lw=0.8, label="bound: tau²/4 variance")
        lower.plot(variance, np.maximum(deviation, 1e-9), ".", ms=3, alpha=0.6, label="responses")
        lower.axvline(0.02, color="grey", lw=0.8, ls=":")
        lower.set(
            xscale="log",
            yscale="log",
            xlabel="variance of log r",
            ylabel="|mean gate - gate of mean|",
            title=name,
        )
        upper.legend(fontsize=7), lower.legend(fontsize=7)
    return figure


def beside_trl(ours: Result, theirs: list[dict[str, Any]]) -> tuple[Figure, str]:
    """The learning curves of the same task under TRL and here, and a Markdown table with the times."""
    figure = Figure(figsize=(4.6, 3), layout="constrained")
    axis = figure.subplots()
    lines = ["| trainer | seeds | last | area | seconds a run |", "| --- | --- | --- | --- | --- |"]
    for name, rows, color in (("vlm_sapo", list(ours.rows.values()), "C0"), ("TRL", theirs, "C1")):
        for row in rows:
            axis.plot(*zip(*row["evaluations"], strict=True), color=color, lw=0.5, alpha=0.5)
        steps = [step for step, _ in rows[0]["evaluations"]]
        rates = np.array([[rate for _, rate in row["evaluations"]] for row in rows])
        axis.plot(steps, rates.mean(0), color=color, lw=2, label=name)
        areas = [np.trapezoid(row, steps) / steps[-1] for row in rates]
        seconds = np.mean([row["seconds"] for row in rows])
        cells = [name, len(rows), _interval(rates[:, -1]), _interval(areas), f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    axis.set(xlabel="step", ylabel="held-out pass@1", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure, "\n".join(lines)


BASE = ("sapo", "4-updates", "lr-3e-5")
"""The arm that is looked at closely, and set beside TRL's."""


def show(plan: Plan, store: Store, folder: Path) -> None:
    """Writes tables.md and a figure for each study that has results, and prints the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    hours = sum(row["seconds"] for row in store.rows.values()) / 3600
    parts = [
        "# Tables of the stability study\n\nWritten by `python eval/stability.py show`; "
        f"[../results.md](../results.md) says what they mean. {len(store.rows)} runs, {hours:.1f} hours of "
        "one core in training steps. Differences in bold have an interval without 0.\n"
    ]
    for name in plan.studies:
        found = results(plan, name, store)
        if any(result.rows for result in found):
            curves(found, plan.studies[name].title).savefig(folder / f"{name}.png", dpi=100)
            parts += [f"## {name}: {plan.studies[name].title}\n", f"![{name}]({name}.png)\n"]
            parts += [table(plan, name, found) + "\n", assumptions(found) + "\n"]
    groups = {
        name: result
        for name in ("methods", "mixture")
        if name in plan.studies
        for result in results(plan, name, store)
        if result.arm.options == BASE and result.rows
    }
    if groups:
        ratios(groups).savefig(folder / "ratios.png", dpi=100)
    path = folder / "trl.json"
    if "methods" in groups and path.is_file():
        figure, text = beside_trl(groups["methods"], json.loads(path.read_text()))
        figure.savefig(folder / "trl.png", dpi=100)
        parts += ["## The same task under TRL\n", "![trl](trl.png)\n", text + "\n"]
    (folder / "tables.md").write_text("\n".join(parts))
    print("\n".join(parts))
