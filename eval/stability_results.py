"""Measures of the stability study's runs, tables with intervals over seeds, and figures.

Definitions: pass@1 is the held-out rate over 16 samples a problem. `last` is that of
the last evaluation, `best` that of the best, `area` the mean height of the curve between first and last step.
A run has collapsed at the first step at which the mean training accuracy of the last 5 steps is under
COLLAPSE of the best such mean before; or where its numbers were not finite any more: pass@1 is constant up to
there, and 0 afterwards. Intervals are 95 % percentile bootstraps over seeds. Differences are paired by
seed; one whose paired t interval contains 0 is a tie.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

if TYPE_CHECKING:
    from eval.stability import Arm, Plan, Store

COLLAPSE = 0.7
WINDOW = 5
RESAMPLES = 10_000
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
    steps, rates = curve(row)
    area = np.trapezoid(rates, steps) / (steps[-1] - steps[0])
    collapsed = collapse(row["series"]["accuracy"])
    if collapsed is None and row.get("stopped"):
        collapsed = len(row["series"]["accuracy"]) + 1
    return Measures(float(rates[-1]), float(max(rates)), float(area), collapsed)


def curve(row: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Steps and held-out pass@1, 0 from where the numbers ended to the planned last step."""
    steps, rates = map(list, zip(*row["evaluations"], strict=True))
    if row.get("stopped"):
        done = len(row["series"]["accuracy"])
        steps, rates = [*steps, done, done, row["steps"]], [*rates, rates[-1], 0.0, 0.0]
    return steps, rates


def collapse(accuracy: Sequence[float]) -> int | None:
    """The first step (from 1) at which the last WINDOW steps' mean is under COLLAPSE of the best before."""
    if len(accuracy) < WINDOW:
        return None
    means = np.convolve(accuracy, np.full(WINDOW, 1 / WINDOW), "valid")
    low = np.flatnonzero(means < COLLAPSE * np.maximum.accumulate(means))
    return int(low[0]) + WINDOW if len(low) else None


def interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % percentile bootstrap interval, with a fixed seed."""
    sample = np.asarray(values, dtype=float)
    indices = np.random.default_rng(0).integers(0, len(sample), (RESAMPLES, len(sample)))
    low, high = np.quantile(sample[indices].mean(1), [0.025, 0.975])
    return float(sample.mean()), float(low), float(high)


@dataclass(frozen=True)
class Result:
    """An arm with the results of its finished runs, by seed."""

    arm: Arm
    rows: dict[int, dict[str, Any]]

    @property
    def measures(self) -> dict[int, Measures]:
        return {seed: measure(row) for seed, row in self.rows.items()}


def results(plan: Plan, name: str, store: Store) -> list[Result]:
    """A study's arms in the plan's order."""
    by_arm = []
    for arm in plan.arms(name):
        runs = arm.runs(plan.config)
        by_arm.append(Result(arm, {run.seed: store.rows[run.key] for run in runs if run.key in store.rows}))
    return by_arm


def table(plan: Plan, name: str, arms: Sequence[Result]) -> str:
    """Markdown: each arm's measures, and the differences to its counterparts."""
    against = plan.studies[name].against
    by_options = {result.arm.options: result for result in arms}
    head = ["arm", "seeds", "updates", "last", "best", "area", "collapsed"]
    head += [f"{key}, less `{option}`'s" for option in against for key in ("last", "area")]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for result in (result for result in arms if result.rows):
        measures = result.measures
        values = [[getattr(item, key) for item in measures.values()] for key in ("last", "best", "area")]
        steps = sorted(item.collapsed for item in measures.values() if item.collapsed is not None)
        cells = [" ".join(result.arm.options), str(len(measures))]
        cells += [f"{np.mean([row['updates'] for row in result.rows.values()]):.0f}", *map(_interval, values)]
        cells.append(f"{len(steps)}, at step {', '.join(map(str, steps))}" if steps else "0")
        for option in against:
            other = counterpart(result.arm.options, option, by_options)
            cells += [_difference(measures, other, key) for key in ("last", "area")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def counterpart(
    options: tuple[str, ...], option: str, by_options: dict[tuple[str, ...], Result]
) -> dict[int, Measures]:
    """The measures of the arm that has `option` instead of one of these options, and is otherwise the same;
    empty where there is no such arm."""
    for index in range(len(options)):
        other = (*options[:index], option, *options[index + 1 :])
        if other in by_options and option not in options:
            return by_options[other].measures
    return {}


def _interval(values: Sequence[float]) -> str:
    mean, low, high = interval(values)
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _difference(one: dict[int, Measures], other: dict[int, Measures], key: str) -> str:
    """Of a measure, over the seeds that both have, and at how many of them `one` is ahead; in bold unless
    it is a tie."""
    gains = [getattr(one[seed], key) - getattr(other[seed], key) for seed in one if seed in other]
    if not gains:
        return ""
    mean, low, high = interval(gains)
    text = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
    text = text if tied(gains) else f"**{text}**"
    return f"{text}, {sum(gain > 0 for gain in gains)} of {len(gains)}"


def tied(gains: Sequence[float]) -> bool:
    """Whether the 95 % t interval of the mean contains 0. A percentile bootstrap of five seeds would call
    16 % of ties a difference, the t interval 5 %."""
    if len(gains) < 2:
        return True
    reach = stats.t.ppf(0.975, len(gains) - 1) * np.std(gains, ddof=1) / len(gains) ** 0.5
    return bool(abs(np.mean(gains)) <= reach)


def kinds(arms: Sequence[Result]) -> str:
    """Markdown: pass@1 at the end by kind of question."""
    names = sorted({kind for result in arms for row in result.rows.values() for kind in row["kinds"]})
    lines = [f"| arm | {' | '.join(names)} |", "| --- " * (1 + len(names)) + "|"]
    for result in (result for result in arms if result.rows):
        rows = [row["kinds"] for row in result.rows.values()]
        by_kind = [[row[name] for row in rows if name in row] for name in names]
        cells = [_interval(values) if values else "" for values in by_kind]
        lines.append(f"| {' '.join(result.arm.options)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(arms: Sequence[Result], title: str) -> Figure:
    """Held-out pass@1 by step: a panel for each setting, a colour for each first option, thin lines for
    seeds and a thick one for their mean."""
    arms = [result for result in arms if result.rows]
    panels = list(dict.fromkeys(result.arm.options[1:] for result in arms))
    firsts = list(dict.fromkeys(result.arm.options[0] for result in arms))
    figure, axes = grid(len(panels), title)
    for axis, panel in zip(axes, panels, strict=True):
        axis.set_title(" ".join(panel), fontsize=9)
        for result in (result for result in arms if result.arm.options[1:] == panel):
            index = firsts.index(result.arm.options[0])
            color, style = f"C{index % 10}", "-" if index < 10 else "--"
            plot(axis, list(result.rows.values()), result.arm.options[0], color=color, ls=style)
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


def plot(axis: Axes, rows: Sequence[dict[str, Any]], label: str, **style: Any) -> None:
    """Thin lines for runs and a thick one for their mean at the evaluations of the longest."""
    for row in rows:
        axis.plot(*curve(row), lw=0.5, alpha=0.4, **style)
    steps = max((curve(row)[0] for row in rows), key=len)
    mean = np.mean([np.interp(steps, *curve(row)) for row in rows], axis=0)
    axis.plot(steps, mean, lw=2, label=label, **style)


def grid(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, five in a row."""
    columns = min(count, 5)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(max(2.9 * columns, 5.5) + 1.4, 2.6 * lines + 0.4), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10)
    return figure, axes[:count]


ASSUMPTIONS = (
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


def assumptions(arms: Sequence[Result]) -> str:
    """Markdown: metrics by the index of the update in its step, as means over steps and seeds. Groups without
    variance make no update, so a step may have fewer updates than mini-batches; indices that under half of
    the steps have are left out."""
    lines = ["| arm | update | " + " | ".join(ASSUMPTIONS) + " |", "| --- " * (2 + len(ASSUMPTIONS)) + "|"]
    for result in (result for result in arms if result.rows):
        rows = [row["minibatches"] for row in result.rows.values()]
        half = sum(len(row["series"]["accuracy"]) for row in result.rows.values()) / 2
        counts = [
            sum(column) for column in itertools.zip_longest(*(row["steps"] for row in rows), fillvalue=0)
        ]
        last = max((index for index, count in enumerate(counts) if count >= half), default=0)
        for index in sorted({0, min(1, last), last // 2, last}):
            cells = [_typical(rows, name, index) for name in ASSUMPTIONS]
            lines.append(f"| {' '.join(result.arm.options)} | {index + 1} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _typical(rows: Sequence[dict[str, list]], name: str, index: int) -> str:
    measured = [row for row in rows if index < len(row.get(name, ())) and row[name][index] is not None]
    weights = [row["steps"][index] for row in measured]
    return f"{np.average([row[name][index] for row in measured], weights=weights):.3g}" if measured else ""


def ratios(groups: dict[str, Result]) -> Figure:
    """By model: the tokens' |log r| by mini-batch, and responses' gate deviation with its bound."""
    from vlm_sapo.algo.diagnostics import DECADES

    figure = Figure(figsize=(4.5 * len(groups), 6), layout="constrained")
    axes = figure.subplots(2, len(groups), squeeze=False, sharex="row", sharey="row")
    middle = len(DECADES)
    for (name, result), upper, lower in zip(groups.items(), *axes, strict=True):
        rows = [row for row in result.rows.values() if "log_ratio" in row]
        for index in range(len(rows[0]["log_ratio"])):
            counts = np.sum([row["log_ratio"][index] for row in rows if row["log_ratio"][index]], axis=0)
            share = (counts[middle + 1 :] + counts[:middle][::-1]) / counts.sum()
            upper.step(DECADES, share, where="post", label=f"update {index + 1}")
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


def compare_with_trl(ours: Result, theirs: list[dict[str, Any]]) -> tuple[Figure, str]:
    """The learning curves of the same task under TRL and here, and a Markdown table."""
    figure = Figure(figsize=(4.6, 3), layout="constrained")
    axis = figure.subplots()
    lines = ["| trainer | seeds | last | area |", "| --- | --- | --- | --- |"]
    for name, rows, color in (("vlm_sapo", list(ours.rows.values()), "C0"), ("TRL", theirs, "C1")):
        plot(axis, rows, name, color=color)
        lasts = [curve(row)[1][-1] for row in rows]
        areas = [np.trapezoid(*reversed(curve(row))) / curve(row)[0][-1] for row in rows]
        lines.append(f"| {name} | {len(rows)} | {_interval(lasts)} | {_interval(areas)} |")
    axis.set(xlabel="step", ylabel="held-out pass@1", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure, "\n".join(lines)


BASE = ("sapo", "4-updates", "lr-3e-5")
"""The arm that is shown in detail, and compared with TRL's."""


def show(plan: Plan, store: Store, folder: Path) -> None:
    """Writes tables.md and a figure for each study that has results, and prints the tables."""
    studies = {name: results(plan, name, store) for name in plan.studies}
    planned = {
        row["key"]: row for arms in studies.values() for result in arms for row in result.rows.values()
    }
    hours = sum(row["seconds"] for row in planned.values()) / 3600
    parts = [
        "# Tables of the stability study\n\nWritten by `python eval/stability.py show`; "
        f"[../results.md](../results.md) says what they mean. {len(planned)} runs, {hours:.1f} hours of one "
        "core in training steps. Differences in bold are no ties.\n"
    ]
    for name, arms in studies.items():
        if any(result.rows for result in arms):
            curves(arms, plan.studies[name].title).savefig(folder / f"{name}.png", dpi=100)
            parts += [f"## {name}: {plan.studies[name].title}\n", f"![{name}]({name}.png)\n"]
            parts += [table(plan, name, arms) + "\n", assumptions(arms) + "\n", kinds(arms) + "\n"]
    parts += _details(studies, folder)
    parts += _unplanned([row for key, row in store.rows.items() if key not in planned])
    (folder / "tables.md").write_text("\n".join(parts) + "\n")
    print("\n".join(parts))


def _details(studies: dict[str, list[Result]], folder: Path) -> list[str]:
    """Writes the figures of BASE by model; Markdown that compares the dense model's with TRL's."""
    titles = {"methods": "dense", "mixture": "mixture of experts"}
    by_model = {
        title: result
        for name, title in titles.items()
        for result in studies.get(name, ())
        if result.arm.options == BASE and result.rows
    }
    if by_model:
        ratios(by_model).savefig(folder / "ratios.png", dpi=100)
    path = folder / "trl.json"
    if "dense" not in by_model or not path.is_file():
        return []
    figure, text = compare_with_trl(by_model["dense"], json.loads(path.read_text()))
    figure.savefig(folder / "trl.png", dpi=100)
    return ["## The same task under TRL\n", "![trl](trl.png)\n", text + "\n"]


def _unplanned(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: the results that belong to no arm."""
    if not rows:
        return []
    return [
        "## Runs of no arm\n",
        "Trained, and left out of the plan afterwards.\n",
        "| model | seed | overrides | pass@1 |",
        "| --- | --- | --- | --- |",
        *(
            f"| {row['model']} | {row['seed']} | {' '.join(row['overrides'][1:-1])} | "
            f"{', '.join(f'{rate:.3f}' for _, rate in row['evaluations'])} |"
            for row in rows
        ),
    ]
