"""Plots a run's metrics into `curves.png`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PANELS = (
    ("Reward in training", ("reward/mean",)),
    ("Response length (tokens)", ("response/tokens",)),
    ("Entropy (nats per token)", ("policy/entropy",)),
    ("Effective update f'(r)", ("policy/effective_update_pos", "policy/effective_update_neg")),
    ("Groups without variance", ("reward/zero_variance",)),
    ("Seconds per step", ("time/step", "time/rollout", "time/update")),
    ("Loss", ("loss",)),
)


def plot_curves(path: Path, metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> None:
    """Writes a PNG with one panel per logged quantity, and the evaluations with their 95 % intervals."""
    panels = [
        (title, [name for name in names if any(name in row for row in metrics)]) for title, names in PANELS
    ]
    panels = [(title, names) for title, names in panels if names]
    count = len(panels) + bool(evaluations)
    columns = min(3, max(count, 1))
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    axes = iter(figure.subplots(rows, columns, squeeze=False).flat)
    if evaluations:
        _plot_evaluations(next(axes), evaluations)
    for title, names in panels:
        axis = next(axes)
        axis.set_title(title, fontsize=10)
        for name in names:
            points = [(row["step"], row[name]) for row in metrics if name in row]
            axis.plot(*zip(*points, strict=True), label=name.rpartition("/")[2], linewidth=1.2)
        if len(names) > 1:
            axis.legend(fontsize=8)
    for axis in figure.axes:
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes:
        axis.remove()
    figure.savefig(path, dpi=110)


def _plot_evaluations(axis, evaluations: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["name"] for row in evaluations):
        rows = [row for row in evaluations if row["name"] == name]
        steps, values = [row["step"] for row in rows], [row["pass@1"] for row in rows]
        low = [row["pass@1"] - row["ci95"][0] for row in rows]
        high = [row["ci95"][1] - row["pass@1"] for row in rows]
        axis.errorbar(
            steps, values, yerr=[low, high], marker="o", markersize=4, capsize=3, linewidth=1.2, label=name
        )
    axis.set_title("Evaluation: pass@1 (95 % interval)", fontsize=10)
    axis.legend(fontsize=8)
    axis.set_ylim(0, 1.02)
