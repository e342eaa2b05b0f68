"""Benchmarks: definition files to examples, verdicts and measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from vlm_sapo.config import data as cfg
from vlm_sapo.config.files import find, read_mapping
from vlm_sapo.data.sources import build_examples
from vlm_sapo.evaluation.results import METRICS, Measure
from vlm_sapo.evaluation.samples import stamp
from vlm_sapo.plugins import resolve
from vlm_sapo.rewards.parts import resolve_reward
from vlm_sapo.types import Example

FOLDER = "eval/benchmarks"
VERDICT, OFFICIAL = "verdict", "official"


@dataclass(frozen=True)
class Benchmark:
    """Problems and how they are scored."""

    name: str
    about: str
    examples: Sequence[Example]
    parts: list[dict]
    """Reward parts: our verdict, and the authors' rule where there is one."""
    measure: Measure
    max_tokens: int
    origin: dict
    """The definition, and size and time of its local file: samples belong to these."""


def read_definition(name: str) -> tuple[str, cfg.BenchmarkConfig]:
    """The name to report under and the definition that `NAME[:VARIANT][=FILE]` asks for.

    Raises ValueError naming the file and its field.
    """
    definition_name, _, file = name.partition("=")
    stem, _, variant = definition_name.partition(":")
    path = find(stem, FOLDER, field="benchmark")
    try:
        definition = cfg.BenchmarkConfig.model_validate(read_mapping(path))
    except ValidationError as error:
        fields = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{path}: {fields}") from error
    if variant:
        definition = definition.model_copy(update={definition.variant: variant})
    if file and not Path(file).exists():
        raise ValueError(f"the rows of {path.stem} ({file}) must be a file or folder; there is none")
    title = f"{path.stem}:{variant}" if variant else path.stem
    return title, definition.at(file) if file else definition


def build_benchmarks(names: Sequence[str], *, limit: int | None = None) -> list[Benchmark]:
    """The benchmarks that `NAME[:VARIANT][=FILE]` ask for. Raises ValueError if two have one name."""
    benchmarks = [build_benchmark(name, limit=limit) for name in names]
    titles = [benchmark.name for benchmark in benchmarks]
    if len(set(titles)) < len(titles):
        raise ValueError(f"two benchmarks of one name ({', '.join(titles)}); evaluate them one by one")
    return benchmarks


def build_benchmark(name: str, *, limit: int | None = None) -> Benchmark:
    """The benchmark that `NAME[:VARIANT][=FILE]` asks for, its first `limit` problems."""
    title, definition = read_definition(name)
    if limit:
        definition = definition.model_copy(update={"limit": limit})
    parts = [definition.verifier.model_dump() | {"label": VERDICT}]
    if definition.official:
        parts.append(definition.official.model_dump() | {"label": OFFICIAL})
        resolve_reward(definition.official.name, definition.official.args, field=f"{title}: official")
    metric = definition.metric
    examples = build_examples(definition, task=title)
    file = name.partition("=")[2]
    if file and ":" in name.partition("=")[0] and definition.variant == "split" and not examples.has_split:
        raise ValueError(
            f"{name}: {file} has no column that names the split; give the split's own rows as NAME=FILE"
        )
    return Benchmark(
        name=title,
        about=definition.about,
        examples=examples,
        parts=parts,
        measure=Measure(
            part=VERDICT,
            official=OFFICIAL if definition.official else None,
            by=tuple(definition.by),
            metric=resolve(metric, field="metric", builtin=METRICS) if metric else None,
        ),
        max_tokens=definition.max_tokens,
        origin=definition.model_dump(mode="json") | {"file": stamp(file)},
    )
