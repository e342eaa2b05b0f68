"""What `vlm-sapo plan` does: prints the memory that a config takes on given GPUs, how long a step may take,
and the nearest setting that fits."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from vlm_sapo.config.load import check_processes, dump, load
from vlm_sapo.config.rollout import VllmServerConfig
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.reporting.console import Console
from vlm_sapo.tools.plan.cards import Card, card_of
from vlm_sapo.tools.plan.duration import StepEstimator
from vlm_sapo.tools.plan.estimate import Estimator
from vlm_sapo.tools.plan.memory import GB, PHASES, Estimate, Gpus
from vlm_sapo.tools.plan.nearest import nearest

NARROW_MARGIN = 0.05
"""A config that leaves a smaller share of a GPU's memory free gets a warning."""


def parse_gpus(text: str) -> Gpus:
    """`1x24GB`, `8x80GB` or `4x8x141GB`: nodes, GPUs per node, memory of each."""
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+)GB", text, re.IGNORECASE)
    if match is None or not all(int(number) for number in match.groups("1")):
        raise ValueError(
            f"--gpus ({text}) must look like 1x24GB, 8x80GB or 4x8x141GB (nodes x GPUs x memory)"
        )
    nodes, per_node, size = (int(number) for number in match.groups("1"))
    return Gpus(nodes, per_node, int(size * GB))


def plan_command(
    name: str, overrides: Sequence[str], gpus: Gpus, recommend: Path | None, *, card: Card | None = None
) -> bool:
    """Prints the tables and, where the config does not fit, the nearest setting that does; returns whether
    the config fits as it is. The config that fits is written to `recommend`. `card` is by default the one
    whose size is nearest."""
    console = Console()
    config = load(TrainConfig, name, overrides)
    check_processes(config, gpus.count)
    estimator = Estimator(config, gpus)
    estimate = estimator.estimate()
    _print(config, estimate, console)
    _print_step(estimator, card or card_of(gpus.memory), console)
    changes: tuple[str, ...] = ()
    if not estimate.fits:
        changes, nearest_estimate = nearest(name, overrides, gpus)
        console.say(f"the nearest setting that fits, with {_totals(nearest_estimate)}:")
        console.say(f"    {shlex.join(changes)}")
        if any(change.startswith("model.lora=") for change in changes):
            console.say(f"    LoRA: set train.lr={10 * config.train.lr:g} (not changed for you)")
    if recommend is not None:
        recommend.parent.mkdir(parents=True, exist_ok=True)
        named = (*overrides, *changes, f"run.name={recommend.stem}")
        recommend.write_text(dump(load(TrainConfig, name, named)), encoding="utf-8")
        console.say(f"the config that fits is in {recommend}")
    return estimate.fits


def _print(config: TrainConfig, estimate: Estimate, console: Console) -> None:
    phases = [phase for phase in PHASES if phase != "sync" or config.rollout.engine.type != "hf"]
    rows = [[row.name, *(_gb(vars(row)[phase]) for phase in phases), row.note] for row in estimate.rows]
    totals = [_gb(estimate.totals[phase]) for phase in phases]
    console.table(["GB per GPU", *phases, ""], [*rows, ["total", *totals, ""]])
    host = [*estimate.host, ("total", estimate.host_total)]
    console.table(["GB of host memory per node", ""], [[name, _gb(size)] for name, size in host])
    gpus = f"{estimate.gpus.count} GPU{'s' * (estimate.gpus.count > 1)} of {estimate.gpus.memory / GB:.0f} GB"
    verdict = "fits" if estimate.fits else "does not fit"
    reason = f"; {estimate.shortage}" if estimate.shortage else ""
    spare = estimate.gpus.memory - estimate.peak
    if estimate.fits and spare < NARROW_MARGIN * estimate.gpus.memory:
        reason = f"; only {_gb(spare)} GB are left, less than the error of the prediction (docs/plan.md)"
    console.say(f"{config.model.path} {verdict} on {gpus}: {_totals(estimate)}{reason}")


PARTS = {
    "data": "images that are not ready in time",
    "sampling": "",
    "reward": "",
    "old_logprobs": "and the reference's",
    "update": "",
    "sync": "new weights for the engine",
    "rest": "metrics and files",
}
"""The parts of a step, with what they are."""


def _print_step(estimator: Estimator, card: Card, console: Console) -> None:
    """The estimated seconds of a step."""
    config = estimator.config
    times = StepEstimator(config, estimator.model, estimator.batch, gpus=estimator.gpus, card=card)
    step, group = times.estimate(), times.setting.group
    rows = [[part, f"{vars(step)[part]:.1f}", note] for part, note in PARTS.items() if vars(step)[part]]
    total = ["step", f"{step.total:.1f}", "sampling beside training" if step.ahead else ""]
    console.table(["estimated seconds", "", ""], [*rows, total])
    per_server = isinstance(config.rollout.engine, VllmServerConfig)
    servers = f", {len(config.rollout.engine.servers)} servers of one such card each" if per_server else ""
    console.say(
        f"estimate, not measured: {card.name} (--card), prompts of {group.prompt:,} and responses of "
        f"{group.response:,.0f} tokens{servers}; docs/plan.md has the arithmetic"
    )


def _totals(estimate: Estimate) -> str:
    return ", ".join(f"{_gb(size)} GB {phase}" for phase, size in estimate.totals.items() if phase != "sync")


def _gb(size: float) -> str:
    return f"{size / GB:.2f}" if size else ""
