"""What `vlm-sapo plan` does: prints the memory that a config takes on given GPUs, how long a step may take,
and the nearest setting that fits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vlm_sapo.config.load import check_processes, load
from vlm_sapo.config.rollout import VllmConfig, VllmServerConfig
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.reporting.console import Console
from vlm_sapo.tools.plan.cards import Card, card_of
from vlm_sapo.tools.plan.duration import StepEstimator
from vlm_sapo.tools.plan.estimate import Estimator
from vlm_sapo.tools.plan.launch import launch_commands, quote
from vlm_sapo.tools.plan.memory import GB, PHASES, Estimate, Gpus
from vlm_sapo.tools.plan.nearest import Recommendation, nearest
from vlm_sapo.tools.plan.write import check_target, config_text

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
    name: str, overrides: Sequence[str], gpus: Gpus, write: Path | None, *, card: Card | None = None
) -> bool:
    """Prints the tables and, where the config does not fit, the nearest setting that does; then the command
    that starts it. Returns whether the config fits as it is. The config that fits is written to `write`.
    `card` is by default the one whose size is nearest."""
    console = Console()
    config = load(TrainConfig, name, overrides)
    check_processes(config, gpus.count)
    _check_engine(config, gpus)
    if write is not None:
        check_target(write)
    card = card or card_of(gpus.memory)
    estimator = Estimator(config, gpus)
    best = Recommendation(config, estimator, estimator.estimate())
    fits = best.estimate.fits
    _print(config, best.estimate, console)
    if not fits:
        console.say("looking for the nearest setting that fits, which may take two minutes")
        best = nearest(name, overrides, gpus)
        console.say(f"the nearest setting that fits, with {_totals(best.estimate)}:")
        console.say(f"    {quote(best.overrides)}")
        for change in best.changes:
            console.say(f"    {change.override}: {change.reason}")
    _print_step(best.estimator, card, console)
    steps, prompts = config.train.steps, config.train.prompts_per_step
    console.say(
        f"{steps} steps of {prompts} prompts read {steps * prompts:,} rows; with N rows, these are "
        f"{steps * prompts:,} / N epochs"
    )
    words = (name, *overrides, *best.overrides)
    if write is not None:
        text = config_text(name, overrides, best.changes, run_name=write.stem, about=[_summary(best, card)])
        write.parent.mkdir(parents=True, exist_ok=True)
        write.write_text(text, encoding="utf-8")
        words = (str(write),)
        console.say(f"the config that fits is in {write}")
    *servers, start = launch_commands(best.config, gpus, words)
    if servers:
        console.say(f"to start its servers, on GPUs beside the {gpus.count} that train:")
        for command in servers:
            console.say(f"    {command}")
    console.say("to start it" + (", on each node that trains:" if gpus.nodes > 1 else ":"))
    console.say(f"    {start}")
    return fits


def _check_engine(config: TrainConfig, gpus: Gpus) -> None:
    """Raises ValueError for an engine on more GPUs than the one that trains, which isn't counted."""
    engine = config.rollout.engine
    if isinstance(engine, VllmConfig) and engine.tensor_parallel > gpus.count:
        raise ValueError(
            f"rollout.engine.tensor_parallel ({engine.tensor_parallel}) takes more GPUs than the one that "
            "trains, and plan counts only that; set it to 1, or plan rollout.engine=vllm_server"
        )


def _summary(best: Recommendation, card: Card) -> str:
    """One line on what it takes."""
    estimate, seconds = best.estimate, step_seconds(best.estimator, card)
    return (
        f"{estimate.gpus.name}: {_totals(estimate)} per GPU; {_gb(estimate.host_total)} GB of host memory "
        f"per node; a step takes about {seconds:.0f} s ({card.name}, estimated)"
    )


def step_seconds(estimator: Estimator, card: Card) -> float:
    """The estimated duration of a step."""
    times = StepEstimator(estimator.config, estimator.model, estimator.batch, gpus=estimator.gpus, card=card)
    return times.estimate().total


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
