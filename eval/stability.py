"""The stability study: trains tiny models by many methods and seeds and compares them (docs/results.md).

    python eval/stability.py run                     # every study of eval/stability.yaml, two runs at a time
    python eval/stability.py run quick               # one of them, by name
    python eval/stability.py show                    # tables and figures of what is there

A study is a table of arms in the YAML file; an arm is a model and overrides of a config, and each seed of it
is an ordinary `vlm-sapo train`. Arms with the same config are trained once. Results are added to
docs/stability/runs.json as they come, so that the same command continues after an interruption. A result
belongs to a config and its initial model; after a change of code, --again trains anew.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.plugins import locate, resolve

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs/stability"
STEP_METRICS = {
    "entropy": "policy/entropy",
    "effective_update": "policy/effective_update",
    "tokens": "response/tokens",
}
"""Metrics stored of every step, by their name there, beside `accuracy`: the mean of the reward part that
evaluations measure."""
UPDATE_METRICS = (
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
    "kl_old_k3",
    "experts_changed",
    "grad_norm",
)
"""Metrics stored by the index of the update in its step, as means over the steps that had so many."""
CLOUD_SIZE = 40
"""Sequences of each mini-batch index whose variance and gate deviation are stored."""


class Study(BaseModel):
    """Arms that are compared."""

    model_config = ConfigDict(extra="forbid")
    title: str
    model: str
    arms: list[list[str | list[str]]]
    """Each entry is a product: an option's name, or several of which each is taken in turn."""
    against: list[str]
    """Options: an arm is compared with the one that has this option instead of one of its own."""
    common: list[str] = []
    """Overrides of all its arms."""
    seeds: list[int] | None = None


class Plan(BaseModel):
    """eval/stability.yaml."""

    model_config = ConfigDict(extra="forbid")
    config: str
    models: dict[str, str]
    seeds: list[int]
    options: dict[str, list[str]]
    """Overrides by name."""
    studies: dict[str, Study]

    @model_validator(mode="after")
    def _names_are_known(self):
        for name, study in self.studies.items():
            if study.model not in self.models:
                raise ValueError(
                    f"studies.{name}.model ({study.model}) must be one of {', '.join(self.models)}"
                )
            named = {option for arm in study.arms for axis in arm for option in _axis(axis)}
            named |= set(study.against)
            if unknown := named - self.options.keys():
                raise ValueError(f"studies.{name} names options that are none: {', '.join(sorted(unknown))}")
        return self

    def arms(self, name: str) -> list[Arm]:
        """The arms of a study."""
        study = self.studies[name]
        arms = []
        for product in study.arms:
            for options in itertools.product(*map(_axis, product)):
                overrides = [*study.common, *(text for option in options for text in self.options[option])]
                seeds = self.seeds if study.seeds is None else study.seeds
                arms.append(
                    Arm(study.model, options, [f"model.path={self.models[study.model]}", *overrides], seeds)
                )
        return arms


@dataclass(frozen=True)
class Arm:
    """A model and options that are compared with others."""

    model: str
    options: tuple[str, ...]
    overrides: list[str]
    seeds: list[int]

    def runs(self, config: str) -> list[Run]:
        return [Run(config, self.model, [*self.overrides, f"run.seed={seed}"], seed) for seed in self.seeds]


@dataclass(frozen=True)
class Run:
    """An arm with a seed."""

    config: str
    model: str
    overrides: list[str]
    seed: int
    key: str = field(default="", compare=False)
    """Checksum of the config and of the initial model, without the code."""

    def __post_init__(self) -> None:
        from vlm_sapo import load_config

        config = load_config(self.config, *self.overrides)
        excluded = {"run": {"name", "dir"}, "log": True, "checkpoint": True}
        text = config.model_dump_json(exclude=excluded, exclude_defaults=True)  # new fields change no key
        model = (path.read_bytes() for path in sorted(locate(config.model.path).iterdir()))
        object.__setattr__(self, "key", hashlib.sha256(b"".join([text.encode(), *model])).hexdigest()[:12])


def _axis(axis: str | Sequence[str]) -> list[str]:
    return [axis] if isinstance(axis, str) else list(axis)


def read_plan(path: Path) -> Plan:
    return Plan(**yaml.safe_load(path.read_text()))


class Store:
    """The results, a JSON list with a line for each."""

    def __init__(self, path: Path):
        self.path = path
        rows = json.loads(path.read_text()) if path.is_file() else []
        self.rows: dict[str, dict[str, Any]] = {row["key"]: row for row in rows}

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["key"]] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in self.rows.values())
        temporary = self.path.with_suffix(".part")
        temporary.write_text(f"[\n{lines}\n]\n")
        temporary.replace(self.path)


def train_one(run: Run, folder: Path) -> dict[str, Any]:
    """Trains or resumes a run in a process of its own, and returns its result. A run that stopped at numbers
    that are not finite is a result, too; other errors are raised."""
    import torch

    from vlm_sapo import load_config
    from vlm_sapo.api import silence_libraries
    from vlm_sapo.training.policy import NumbersError
    from vlm_sapo.training.trainer import train

    silence_libraries()
    torch.set_num_threads(1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = load_config(run.config, *run.overrides, f"run.dir={folder}")
    stopped = None
    with folder.with_suffix(".log").open("a") as log, contextlib.redirect_stdout(log), exclusive_lock(log):
        try:
            train(config)
        except NumbersError as error:
            stopped = str(error)
        except BaseException:
            traceback.print_exc(file=log)
            raise
    return summarize(run, folder, config) | ({"stopped": stopped} if stopped else {})


@contextlib.contextmanager
def exclusive_lock(file: IO) -> Iterator[None]:
    """Locks the file. Raises SystemExit where another process has the lock, since two would overwrite each
    other's files."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"another study has {file.name}; wait for it, or end it") from None
    yield


def summarize(run: Run, folder: Path, config: TrainConfig) -> dict[str, Any]:
    """The result of a run, read from its folder."""
    part = config.eval.part or config.reward.measured
    series = STEP_METRICS | {"accuracy": f"reward/{part}"}
    metrics, evaluations, histograms = (
        _lines(folder / f"{name}.jsonl") for name in ("metrics", "evaluations", "histograms")
    )
    updates = [
        sum(re.fullmatch(r"minibatch\d+/grad_norm", key) is not None for key in line) for line in metrics
    ]
    count = max(updates, default=0)
    row: dict[str, Any] = {
        "key": run.key,
        "model": run.model,
        "seed": run.seed,
        "overrides": run.overrides,
        "date": time.strftime("%Y-%m-%d"),
        "steps": config.train.steps,
        "updates": sum(updates),
        "seconds": round(sum(line["time/step"] for line in metrics), 1),
        "evaluations": [[line["step"], _short(line["pass@1"])] for line in evaluations],
        "kinds": by_kind(folder / "evaluations"),
        "series": {name: [_short(line.get(key)) for line in metrics] for name, key in series.items()},
        "minibatches": by_update(metrics, updates),
    }
    if 1 < count <= 4:
        by_index = [
            [line["minibatches"][index] for line in histograms if index < len(line["minibatches"])]
            for index in range(count)
        ]
        row["log_ratio"] = [
            [sum(bin_) for bin_ in zip(*(line["log_ratio"] for line in lines), strict=True)]
            for lines in by_index
        ]
        row["clouds"] = [cloud(lines) for lines in by_index]
    return row


def by_update(metrics: list[dict], updates: list[int]) -> dict[str, list[float | int | None]]:
    """UPDATE_METRICS as means by the index of the update in its step, and how many `steps` had such an
    update; `updates` is the number of updates of each step."""
    count = max(updates, default=0)
    means: dict[str, list[float | int | None]] = {}
    for name in UPDATE_METRICS:
        keys = [f"minibatch{index}/{name}" for index in range(count)]
        if any(key in line for line in metrics for key in keys):
            means[name] = [_mean(line.get(key) for line in metrics) for key in keys]
    means["steps"] = [sum(index < number for number in updates) for index in range(count)]
    return means


def cloud(lines: list[dict]) -> list[list[float]]:
    """Variance of log r, gate deviation and tau^2/4 of some sequences, evenly over the steps; empty where the
    objective has no gate."""
    sequences = [sequence for line in lines for sequence in line.get("sequences", [])]
    sample = sequences[:: max(1, len(sequences) // CLOUD_SIZE)][:CLOUD_SIZE]
    return [[float(f"{value:.3g}") for value in item] for item in sample]


def by_kind(folder: Path) -> dict[str, float]:
    """Last pass@1 by kind of question."""
    last = max(folder.glob("step_*/samples.jsonl"), default=None)
    scores: dict[str, list[float]] = {}
    for line in _lines(last) if last else ():
        scores.setdefault(line["columns"].get("kind", "all"), []).extend(line["scores"])
    return {kind: _short(sum(values) / len(values)) for kind, values in sorted(scores.items())}


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _mean(values: Iterable[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return _short(sum(numbers) / len(numbers)) if numbers else None


def run_studies(
    plan: Plan, names: Sequence[str], store: Store, *, workers: int, folder: Path, keep_folders: bool = False
) -> None:
    """Trains the runs that are not in the store, seed by seed, so that early results cover all arms. An
    interruption also interrupts the runs, which leave checkpoints; with `keep_folders` all folders stay."""
    from vlm_sapo.reporting.console import Console

    runs = {run.key: run for name in names for arm in plan.arms(name) for run in arm.runs(plan.config)}
    missing = sorted((run for key, run in runs.items() if key not in store.rows), key=lambda run: run.seed)
    console = Console()
    console.say(f"{len(runs)} runs in {', '.join(names)}; {len(runs) - len(missing)} are there already")
    context = multiprocessing.get_context("spawn")
    queue, running = iter(missing), {}
    with (
        ProcessPoolExecutor(workers, mp_context=context) as pool,
        console.progress("study", len(missing)) as show,
        storing_finished(store, running),
    ):
        for run in itertools.islice(queue, workers):  # no more, or an interruption would start others
            running[pool.submit(train_one, run, folder / run.key)] = run
        for done in range(1, len(missing) + 1):
            future = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            row = future.result()
            store.add(row)
            run = running.pop(future)
            if not keep_folders:
                shutil.rmtree(folder / run.key)
            for following in itertools.islice(queue, 1):
                running[pool.submit(train_one, following, folder / following.key)] = following
            last = row["evaluations"][-1][1] if row["evaluations"] else float("nan")
            show(done, f"{last:.3f} after {row['seconds']:.0f} s: {' '.join(run.overrides[1:])}")


@contextlib.contextmanager
def storing_finished(store: Store, running: dict[Future, Run]) -> Iterator[None]:
    """If the block fails or is interrupted, stores the runs that still finish."""
    try:
        yield
    except BaseException:
        for future in as_completed(running):
            if future.exception() is None:
                store.add(future.result())
        raise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["run", "show"])
    parser.add_argument("studies", nargs="*", help="names of studies; by default all")
    parser.add_argument("--plan", type=Path, default=HERE / "stability.yaml")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of runs.json, tables and figures"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/stability"), help="where runs are written")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--keep", action="store_true", help="keep the runs' folders, for vlm-sapo report")
    parser.add_argument(
        "--again", action="store_true", help="train finished runs again: after a change of code"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    plan = read_plan(args.plan)
    if unknown := set(args.studies) - plan.studies.keys():
        raise SystemExit(f"studies ({', '.join(sorted(unknown))}) must be of {', '.join(plan.studies)}")
    args.results.mkdir(parents=True, exist_ok=True)
    results = args.results / "runs.json"
    if args.verb == "run":
        with results.with_suffix(".lock").open("w") as lock, exclusive_lock(lock):
            run(plan, args.studies or list(plan.studies), Store(results), args)
    show = resolve(f"{HERE}/stability_results.py:show", field="show")
    show(plan, Store(results), args.results)


def run(plan: Plan, names: Sequence[str], store: Store, args: argparse.Namespace) -> None:
    """The verb `run`."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.again:
        for key in {run.key for name in names for arm in plan.arms(name) for run in arm.runs(plan.config)}:
            store.rows.pop(key, None)
            shutil.rmtree(args.folder / key, ignore_errors=True)
    try:
        run_studies(plan, names, store, workers=args.workers, folder=args.folder, keep_folders=args.keep)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None


if __name__ == "__main__":
    main()
