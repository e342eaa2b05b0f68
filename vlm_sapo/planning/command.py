"""What `vlm-sapo doctor` does: looks at every row that a run would use, prints and writes what it finds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.data.rows import ExampleSet
from vlm_sapo.data.sources import build_examples
from vlm_sapo.evaluation.benchmarks import build_benchmarks
from vlm_sapo.evaluation.preflight import Inspected, check_golds, inspect
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import load_outline
from vlm_sapo.plugins import locate
from vlm_sapo.reporting.console import Console
from vlm_sapo.rewards.pool import Reward
from vlm_sapo.tools.doctor import RowSet, describe, diagnose, report


def doctor_command(config: TrainConfig, against: Sequence[str], out: Path) -> bool:
    """Examines training rows, held-out rows, the config's benchmarks and those of `against`; returns whether
    a run would go through."""
    console = Console()
    vlm = load_outline(str(locate(config.model.path)))
    encode = Encoder(
        vlm,
        min_pixels=config.model.min_pixels,
        max_pixels=config.model.max_pixels,
        max_tokens=config.data.max_prompt_tokens,
    )
    label = config.eval.part or config.reward.measured
    part = config.reward.parts[config.reward.labels.index(label)]
    spec = part.model_dump() | {"label": "verdict", "weight": 1.0, "gate": None}
    longest = config.rollout.max_tokens
    sets = [
        _examine(task.task, build_examples(task), encode, spec, longest, console, evaluated=False)
        for task in config.data.tasks
    ]
    if config.eval.data:
        examples = build_examples(config.eval.data, task="held-out")
        sets.append(_examine("held-out", examples, encode, spec, longest, console, evaluated=True))
    for item in build_benchmarks(config.eval.benchmarks, limit=config.eval.limit):
        name, spec = f"benchmark {item.name}", item.parts[0]
        sets.append(_examine(name, item.examples, encode, spec, item.max_tokens, console, evaluated=True))
    for item in build_benchmarks(against):
        rows = _inspect(f"pictures of {item.name}", item.examples, encode, console)
        sets.append(RowSet(f"benchmark {item.name}", rows, evaluated=True, only_pictures=True))
    findings = diagnose(
        sets,
        context=vlm.context,
        skip=config.data.on_error == "skip",
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report(sets, findings), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _print(sets, findings, out, console)
    return all(finding.level != "breaks" for finding in findings)


def _examine(
    name: str,
    examples: ExampleSet,
    encode: Encoder,
    spec: dict,
    longest: int,
    console: Console,
    *,
    evaluated: bool,
) -> RowSet:
    rows = _inspect(name, examples, encode, console)
    with closing(Reward([spec], on_error="zero")) as reward:
        [graded] = reward.parts
        rows = check_golds(examples, rows, reward, spec)
    return RowSet(name, rows, evaluated, max_tokens=longest, own_function=not graded.builtin)


def _inspect(name: str, examples: ExampleSet, encode: Encoder, console: Console) -> list[Inspected]:
    with console.progress(f"examine {name}", len(examples), lines=2) as show:
        return inspect(examples, encode, pictures=True, progress=lambda done: show(done, "rows"))


def _print(sets: Sequence[RowSet], findings, out: Path, console: Console) -> None:
    header = [
        "set",
        "rows",
        "usable",
        "pictures",
        "tokens p50",
        "p95",
        "max",
        "for pictures",
        "answers",
        "most frequent",
    ]
    table = []
    for rows in sets:
        found = describe(rows)
        counts = [found["rows"], found["usable"], found["pictures"], *found["tokens"].values()]
        frequent = f"{found['most_frequent_answer'][:20]!r} {found['most_frequent_share']:.0%}"
        table.append(
            [rows.name, *map(str, counts), str(found["image_tokens_max"]), str(found["answers"]), frequent]
        )
    console.table(header, table)
    for finding in findings:
        ids = ", ".join(finding.rows) + (", ..." if finding.count > len(finding.rows) else "")
        console.say(f"{finding.level}: {finding.where}: {finding.name}: {finding.count} ({ids})")
        console.say("\n".join(f"    {line}" for line in finding.text.splitlines()))
    breaks = sum(finding.level == "breaks" for finding in findings)
    verdict = f"{breaks} findings would break the run" if breaks else "nothing would break the run"
    console.say(f"{verdict}; {len(findings)} findings in all, in {out}")
