"""`vlm-sapo check`: compares generation engine and trainer on the same prompts and prints a table."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.models.packing import GroupSlice
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.rollout.engine import RolloutError, as_contexts
from vlm_sapo.training.build import build_parity, build_training
from vlm_sapo.training.checks import Comparison, Difference, Parity
from vlm_sapo.training.launch import join
from vlm_sapo.types import Prompt


@dataclass(frozen=True)
class Finding:
    """A line of the table; `passed` is None for a measurement without a limit."""

    check: str
    result: str
    passed: bool | None = None


def check_command(config: TrainConfig, *, rows: int, samples: int) -> bool:
    """Prints the table. Returns whether engine and trainer agree."""
    console = Console()
    with tempfile.TemporaryDirectory(prefix="check_") as folder:
        config = in_folder(config, folder)
        run, _ = build_training(config, RunFolder(Path(folder)), join(config, console))
        with closing(run):
            parity = build_parity(config, run)
            prompts = run.stream.take(rows)
            findings = list(examine(parity, prompts, samples, config.rollout.max_tokens))
    marks = {True: "ok", False: "FAILS", None: ""}
    rows_of_table = [[item.check, marks[item.passed], item.result] for item in findings]
    console.table(["check", "", "result"], rows_of_table)
    failed = [item for item in findings if item.passed is False]
    verdict = f"{len(failed)} checks fail" if failed else "engine and trainer agree"
    console.say(f"{config.rollout.engine.type} on {rows} rows with {samples} responses each: {verdict}")
    return not failed


def in_folder(config: TrainConfig, folder: str) -> TrainConfig:
    """The config with its run in `folder`. Weights for servers are written where the run itself does."""
    rollout = config.rollout
    if rollout.engine.type == "vllm_server" and rollout.engine.folder is None:
        weights = str(config.run.folder / "weights")
        engine = rollout.engine.model_copy(update={"folder": weights})
        rollout = rollout.model_copy(update={"engine": engine})
    run = config.run.model_copy(update={"dir": folder})
    return config.model_copy(update={"run": run, "rollout": rollout})


def examine(parity: Parity, prompts: Sequence[Prompt], samples: int, max_tokens: int) -> Iterator[Finding]:
    """Yields the findings; checks that can't run after a failure are left out."""
    vlm, engine = parity.policy.vlm, parity.engine
    try:
        engine.sync(vlm)
        sampling = replace(parity.sampling, group=samples, max_tokens=max_tokens)
        engine.generate(as_contexts(prompts), sampling)  # the first call is slower than the rest
        started = time.perf_counter()
        groups = engine.generate(as_contexts(prompts), sampling)
    except RolloutError as error:
        yield Finding("responses sampled", str(error), False)
        return
    seconds = time.perf_counter() - started
    slices = [GroupSlice(prompt, tuple(items)) for prompt, items in zip(prompts, groups, strict=True)]
    image_token = vlm.model.config.image_token_id
    tokens = sum(int((prompt.ids == image_token).sum()) for prompt in prompts)
    images = sum(len(prompt.images) for prompt in prompts)
    yield Finding("prompt ids equal", f"{sum(len(prompt.ids) for prompt in prompts)} tokens", True)
    yield Finding("image grids equal", f"{images} images, {tokens} image tokens", True)
    compared = list(compare(parity, slices))
    yield from compared
    yield from check_bans(parity, slices)
    if all(finding.passed for finding in compared):  # else changed weights would differ as well
        yield from check_sync(parity, prompts)
    count = sum(len(item.ids) for items in groups for item in items)
    yield Finding("speed", f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} a second")


def compare(parity: Parity, groups: Sequence[GroupSlice]) -> Iterator[Finding]:
    """Log-prob differences over all rows, and if some rows have no image, also with and without images."""
    parts = {
        "log-probs": groups,
        "log-probs, rows with images": [group for group in groups if group.prompt.images],
        "log-probs, rows without": [group for group in groups if not group.prompt.images],
    }
    mixed = all(parts.values())
    for name, part in parts.items():
        if name == "log-probs" or mixed:
            comparison = Comparison(parity.policy, part)
            trainer = comparison.trainer()
            difference = comparison.against(trainer)
            off = parity.servers_out_of_tolerance(comparison, trainer) if name == "log-probs" else []
            agrees = difference.mean <= parity.tolerance and not off
            yield Finding(name, describe(difference), agrees)
            turns = comparison.by_turn(trainer) if name == "log-probs" else []
            for number, part in enumerate(turns if len(turns) > 1 else (), 1):
                yield Finding(f"log-probs, turn {number}", describe(part), part.mean <= parity.tolerance)
            yield from (Finding("likely cause", line, False) for line in off)
            if name == "log-probs" and not agrees:
                causes = parity.explain(
                    comparison, difference, [group.prompt.example for group in groups[:2]]
                )
                yield from (Finding("likely cause", cause, False) for cause in causes)


def describe(difference: Difference) -> str:
    """All numbers of a difference."""
    return (
        f"max {difference.maximum:.1e}, mean {difference.mean:.1e}, p50 {difference.p50:.1e}, "
        f"p99 {difference.p99:.1e}, correlation {difference.correlation:.6f} ({difference.tokens} tokens)"
    )


def check_bans(parity: Parity, groups: Sequence[GroupSlice]) -> Iterator[Finding]:
    """Whether banned tokens are excluded from the engine's distribution."""
    vlm = parity.policy.vlm
    responses = [response for group in groups for response in group.responses]
    sampled = sum(int(item.ids.eq(token).sum()) for item in responses for token in vlm.banned)
    comparison = Comparison(parity.policy, groups)
    banned, unbanned = comparison.trainer(), comparison.without_bans()
    mass = float((1 - (unbanned - banned).exp()).clamp(min=0).mean())
    leaks = comparison.against(unbanned).mean < comparison.against(banned).mean and mass > parity.tolerance
    yield Finding(
        "banned tokens",
        f"{sampled} sampled; without the ban they would have {mass:.1e} of the probability",
        not sampled and not leaks,
    )


def check_sync(parity: Parity, prompts: Sequence[Prompt]) -> Iterator[Finding]:
    """Whether changed weights reach the engine, and how long a weight sync takes."""
    examples = [prompt.example for prompt in prompts[: parity.groups]]
    update = parity.check_weight_update(examples)
    yield Finding(
        "changed weights arrive",
        f"{update.share:.1%} of the change; mean {update.changed.mean:.1e} from the changed trainer, "
        f"{update.unchanged.mean:.1e} from the unchanged",
        update.arrived,
    )
    if not update.arrived:
        yield Finding("likely cause", parity.unsynced(examples, update.unchanged), False)
    started = time.perf_counter()
    parity.engine.sync(parity.policy.vlm)
    yield Finding("weight sync", f"{time.perf_counter() - started:.2f} s")
