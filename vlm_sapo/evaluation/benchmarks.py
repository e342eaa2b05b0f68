"""Benchmarks: definition files to examples, verdicts and measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_sapo.config import data as cfg
from vlm_sapo.config.files import find, read_mapping
from vlm_sapo.config.load import check
from vlm_sapo.config.paths import Paths, split_benchmark
from vlm_sapo.config.schema import SftConfig, TrainConfig
from vlm_sapo.data.rows import ExampleSet
from vlm_sapo.data.sources import build_examples
from vlm_sapo.evaluation.results import METRICS, Measure
from vlm_sapo.evaluation.samples import stamp
from vlm_sapo.plugins import resolve, searched
from vlm_sapo.rewards.parts import resolve_reward

FOLDER = "eval/benchmarks"
VERDICT, OFFICIAL = "verdict", "official"


@dataclass(frozen=True)
class Benchmark:
    """Problems and how they are scored."""

    name: str
    about: str
    examples: ExampleSet
    parts: list[dict]
    """Reward parts: our verdict, and the authors' rule where there is one; or those of the run."""
    measure: Measure
    max_tokens: int
    graded_by_run: bool
    """Whether the parts are those of the run's reward."""
    origin: dict
    """The definition, and size and time of its local file: samples belong to these."""


def read_definition(name: str) -> tuple[str, cfg.BenchmarkConfig]:
    """The name to report under and the definition that `NAME[:VARIANT][=FILE]` asks for.

    Raises ValueError naming the file and its field.
    """
    stem, variant, file = split_benchmark(name)
    path = find(stem, FOLDER, field="benchmark")
    values = Paths(path.parent).absolute(cfg.BenchmarkConfig, read_mapping(path))
    try:
        definition = check(cfg.BenchmarkConfig, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if variant:
        definition = definition.model_copy(update={definition.variant: variant})
    if file and not Path(file).exists():
        raise ValueError(
            f"the rows of {path.stem} ({file}) must be a file or folder; there is none{searched(file)}"
        )
    title = f"{path.stem}:{variant}" if variant else path.stem
    return title, definition.at(file) if file else definition


Run = TrainConfig | SftConfig


def build_benchmarks(
    names: Sequence[str], *, limit: int | None = None, run: Run | None = None
) -> list[Benchmark]:
    """The benchmarks that `NAME[:VARIANT][=FILE]` ask for. Raises ValueError if two have one name."""
    benchmarks = [build_benchmark(name, limit=limit, run=run) for name in names]
    titles = [benchmark.name for benchmark in benchmarks]
    if len(set(titles)) < len(titles):
        raise ValueError(f"two benchmarks of one name ({', '.join(titles)}); evaluate them one by one")
    return benchmarks


def benchmarks_of(run: Run) -> list[Benchmark]:
    """The benchmarks that a run evaluates on."""
    return build_benchmarks(run.eval.benchmarks, limit=run.eval.limit, run=run)


def build_benchmark(name: str, *, limit: int | None = None, run: Run | None = None) -> Benchmark:
    """The benchmark that `NAME[:VARIANT][=FILE]` asks for, its first `limit` problems. Raises ValueError
    where it asks for the reward of a run and there is none."""
    title, definition = read_definition(name)
    if limit:
        definition = definition.model_copy(update={"limit": limit})
    graded_by_run = definition.verifier.name == cfg.OF_RUN
    if graded_by_run:
        parts, part = _parts_of(run, title)
        verifier = run.data.verifier if not run.data.mixture else None  # `auto` means the training rows' own
        examples = build_examples(definition.model_copy(update={"verifier": verifier}), task=title)
    else:
        parts, part = [definition.verifier.model_dump() | {"label": VERDICT}], VERDICT
        examples = build_examples(definition, task=title)
    if definition.official:
        parts.append(definition.official.model_dump() | {"label": OFFICIAL})
        resolve_reward(definition.official.name, definition.official.args, field=f"{title}: official")
    metric = definition.metric
    _, variant, file = split_benchmark(name)
    if file and variant and definition.variant == "split" and not examples.has_split:
        raise ValueError(
            f"{name}: {file} has no column that names the split; give the split's own rows as NAME=FILE"
        )
    return Benchmark(
        name=title,
        about=definition.about or f"rows of {definition.source}",
        examples=examples,
        parts=parts,
        measure=Measure(
            part=part,
            official=OFFICIAL if definition.official else None,
            by=tuple(definition.by),
            metric=resolve(metric, field="metric", builtin=METRICS) if metric else None,
        ),
        max_tokens=definition.max_tokens,
        graded_by_run=graded_by_run,
        origin=definition.model_dump(mode="json") | {"file": stamp(file)},
    )


def _parts_of(run: Run | None, title: str) -> tuple[list[dict], str]:
    """The parts of a run's reward and the label of the one that is reported."""
    if run is None or not run.reward.parts:
        raise ValueError(
            f"{title}: verifier ({cfg.OF_RUN}) is the reward of a training run that has {title} in "
            "eval.benchmarks, and here is none; name a verifier or FILE.py:NAME"
        )
    return [part.model_dump() for part in run.reward.parts], run.eval.part or run.reward.measured
