"""Benchmarks: definition files to examples, verdicts and measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from vlm_sapo import dataconfig as cfg
from vlm_sapo.data.sources import build_examples
from vlm_sapo.evaluation.metrics import METRICS
from vlm_sapo.evaluation.results import Measure
from vlm_sapo.plugins import resolve
from vlm_sapo.types import Example
from vlm_sapo.yamlfile import find, read_mapping

FOLDER = "eval/benchmarks"
VERDICT, OFFICIAL = "verdict", "official"


@dataclass(frozen=True)
class Benchmark:
    """Problems with the way they are scored."""

    name: str
    about: str
    examples: Sequence[Example]
    parts: list[dict]
    """Reward parts: our verdict, and the authors' rule where there is one."""
    measure: Measure
    max_tokens: int


def read_definition(name: str) -> tuple[str, cfg.Benchmark]:
    """The name to report under and the definition that `NAME[:VARIANT][=FILE]` asks for.

    Raises ValueError naming the file and its field.
    """
    asked, _, file = name.partition("=")
    stem, _, variant = asked.partition(":")
    path = find(stem, FOLDER, field="benchmark")
    try:
        definition = cfg.Benchmark.model_validate(read_mapping(path))
    except ValidationError as error:
        fields = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{path}: {fields}") from error
    if variant:
        definition = definition.model_copy(update={definition.variant: variant})
    title = f"{path.stem}:{variant}" if variant else path.stem
    return title, definition.at(file) if file else definition


def build_benchmark(name: str, *, limit: int | None = None) -> Benchmark:
    """The benchmark that `NAME[:VARIANT][=FILE]` asks for, its first `limit` problems."""
    title, definition = read_definition(name)
    if limit:
        definition = definition.model_copy(update={"limit": limit})
    parts = [definition.verifier.model_dump() | {"label": VERDICT}]
    if definition.official:
        parts.append(definition.official.model_dump() | {"label": OFFICIAL})
    metric = definition.metric
    return Benchmark(
        name=title,
        about=definition.about,
        examples=build_examples(definition, task=title),
        parts=parts,
        measure=Measure(
            part=VERDICT,
            official=OFFICIAL if definition.official else None,
            by=tuple(definition.by),
            metric=resolve(metric, field="metric", builtin=METRICS) if metric else None,
        ),
        max_tokens=definition.max_tokens,
    )
