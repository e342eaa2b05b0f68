"""What `vlm-sapo plan` does: says what a config takes on given GPUs, and the nearest setting that fits."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from vlm_sapo.config.load import check_processes, dump, load
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.reporting.console import Console
from vlm_sapo.tools.plan.estimate import Estimator
from vlm_sapo.tools.plan.memory import GB, PHASES, Estimate, Gpus
from vlm_sapo.tools.plan.nearest import nearest


def parse_gpus(text: str) -> Gpus:
    """`1x24GB`, `8x80GB` or `4x8x141GB`: nodes, GPUs of each, memory of each."""
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+)GB", text, re.IGNORECASE)
    if match is None or not all(int(number) for number in match.groups("1")):
        raise ValueError(
            f"--gpus ({text}) must look like 1x24GB, 8x80GB or 4x8x141GB (nodes x GPUs x memory)"
        )
    nodes, each, size = (int(number) for number in match.groups("1"))
    return Gpus(nodes, each, int(size * GB))


NARROW = 0.05
"""Share of a GPU's memory that is little to have left."""


def plan_command(name: str, overrides: Sequence[str], gpus: Gpus, recommend: Path | None) -> bool:
    """Prints the table and, where the config does not fit, the nearest setting that does; returns whether it
    fits as it is. `recommend` is where the config that fits is written."""
    console = Console()
    config = load(TrainConfig, name, overrides)
    check_processes(config, gpus.count)
    found = Estimator(config, gpus).estimate()
    _print(config, found, console)
    changes: tuple[str, ...] = ()
    if not found.fits:
        changes, nearer = nearest(name, overrides, gpus)
        console.say(f"the nearest setting that fits, with {_totals(nearer)}:")
        console.say(f"    {shlex.join(changes)}")
        if any(change.startswith("model.lora=") for change in changes):
            console.say(
                f"    adapters want a larger learning rate, which is left to you: try "
                f"train.lr={10 * config.train.lr:g}"
            )
    if recommend is not None:
        recommend.parent.mkdir(parents=True, exist_ok=True)
        named = (*overrides, *changes, f"run.name={recommend.stem}")
        recommend.write_text(dump(load(TrainConfig, name, named)), encoding="utf-8")
        console.say(f"the config that fits is in {recommend}")
    return found.fits


def _print(config: TrainConfig, found: Estimate, console: Console) -> None:
    used = [phase for phase in PHASES if phase != "sync" or config.rollout.engine.type != "hf"]
    rows = [[row.name, *(_gb(vars(row)[phase]) for phase in used), row.note] for row in found.rows]
    totals = [_gb(found.totals[phase]) for phase in used]
    console.table(["GB of each GPU", *used, ""], [*rows, ["in all", *totals, ""]])
    console.table(["GB of each node's host memory", ""], [[name, _gb(size)] for name, size in found.host])
    gpus = f"{found.gpus.count} GPU{'s' * (found.gpus.count > 1)} of {found.gpus.memory / GB:.0f} GB"
    verdict = "fits" if found.fits else "does not fit"
    reason = f"; {found.short}" if found.short else ""
    spare = found.gpus.memory - found.peak
    if found.fits and spare < NARROW * found.gpus.memory:
        reason = f"; only {_gb(spare)} GB to spare, less than a prediction is sure of (docs/plan.md)"
    console.say(f"{config.model.path} {verdict} on {gpus}: {_totals(found)}{reason}")


def _totals(found: Estimate) -> str:
    return ", ".join(f"{_gb(size)} GB {phase}" for phase, size in found.totals.items() if phase != "sync")


def _gb(size: float) -> str:
    return f"{size / GB:.2f}" if size else ""
