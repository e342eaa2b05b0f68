"""What is wrong with the rows of a config, found before any GPU hour."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.data.rows import ExampleSet
from vlm_sapo.data.sources import build_examples
from vlm_sapo.evaluation.benchmarks import build_benchmarks
from vlm_sapo.evaluation.preflight import Fingerprint, Inspected, check_golds, inspect
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import load_outline
from vlm_sapo.plugins import locate
from vlm_sapo.reporting.console import Console
from vlm_sapo.rewards.pool import RewardPool

WORST = 5
"""Rows that a finding names."""
LISTED = 20
"""Rows whose own error a finding gives."""
SHRUNK = 3.0
"""Pictures whose sides lose more than this factor are worth a look: their small print is gone."""
ONE_ANSWER = 0.5
"""Share from which one answer is too frequent."""
MENTION = re.compile(
    r"\b(?:figure|diagram|image|picture|graph|chart|photo|as shown|table below)\b", re.IGNORECASE
)
GIVEN_AWAY = r"(?:\\boxed\s*\{{|<answer>|\banswer\s*(?:is|:|=))[\s$(*]*{}(?!\w)"
CHOSEN = re.compile(r"^\(?[A-Za-z]\)?$|^(?:yes|no|true|false)$", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """Something about some rows of a set."""

    level: Literal["breaks", "warning", "note"]
    """`breaks`: the run would stop or could never reward the row."""
    name: str
    where: str
    count: int
    rows: list[str]
    """The worst or first of them, by id."""
    text: str


@dataclass(frozen=True)
class RowSet:
    """The rows of a task, of the held-out rows or of a benchmark."""

    name: str
    rows: list[Inspected]
    evaluated: bool
    """Whether they measure the model instead of training it."""
    max_tokens: int = 0
    """Longest response to them."""
    only_pictures: bool = False
    """Whether their pictures alone matter, since no run uses them."""
    own_function: bool = False
    """Whether a user's function grades them, whose form of an answer is not known."""


def diagnose(sets: Sequence[RowSet], *, context: int, skip: bool) -> list[Finding]:
    """Everything there is to say of the sets, the worst first. `context` is the model's; with `skip`, rows
    that can't be used are left out by the run."""
    found = []
    for rows in (rows for rows in sets if not rows.only_pictures):
        found += _unusable(rows, skip) + _over_context(rows, context - rows.max_tokens) + _golds(rows)
        found += _pictures(rows) + _prompts(rows) + _answers(rows) + _repeated(rows)
    for rows in (rows for rows in sets if rows.only_pictures):
        unread = [row for row in rows.rows if row.example is None]
        found += _finding("warning", "pictures not compared", rows.name, unread, _each(unread))
    trained = [rows for rows in sets if not rows.evaluated]
    for rows in trained:
        for other in (rows for rows in sets if rows.evaluated):
            found += _leaked(rows, other)
    order = ["breaks", "warning", "note"]
    return sorted(found, key=lambda finding: order.index(finding.level))


def describe(rows: RowSet) -> dict[str, Any]:
    """Counts and percentiles of a set, for the table and the JSON file."""
    usable = [row for row in rows.rows if row.tokens and not row.error]
    tokens = np.array([row.tokens for row in rows.rows if row.tokens] or [0])
    answers = Counter(row.example.answer.strip() for row in usable)
    longest = sorted(rows.rows, key=lambda row: -row.tokens)[:WORST]
    [(answer, times)] = answers.most_common(1) or [("", 0)]
    return {
        "rows": len(rows.rows),
        "usable": len(usable),
        "pictures": sum(len(row.resized) for row in usable),
        "tokens": {
            name: int(np.percentile(tokens, q)) for name, q in (("p50", 50), ("p95", 95), ("max", 100))
        },
        "image_tokens_max": max((row.image_tokens for row in rows.rows), default=0),
        "longest": {row.id: row.tokens for row in longest if row.tokens},
        "answers": len(answers),
        "most_frequent_answer": answer,
        "most_frequent_share": times / max(sum(answers.values()), 1),
    }


def report(sets: Sequence[RowSet], findings: Sequence[Finding]) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "sets": {rows.name: describe(rows) for rows in sets},
        "findings": [asdict(finding) for finding in findings],
    }


def _finding(level, name: str, where: str, rows: Sequence[Inspected], text: str) -> list[Finding]:
    if not rows:
        return []
    return [Finding(level, name, where, len(rows), [row.id for row in rows[:WORST]], text)]


def _unusable(rows: RowSet, skip: bool) -> list[Finding]:
    broken = [row for row in rows.rows if row.error and not row.tokens]
    long = sorted((row for row in rows.rows if row.error and row.tokens), key=lambda row: -row.tokens)
    all_bad = len(broken) + len(long) == len(rows.rows)
    level = "warning" if skip and not all_bad else "breaks"
    return [
        *_finding(level, "unreadable rows", rows.name, broken, _each(broken)),
        *_finding(level, "prompts over the limit", rows.name, long, _each(long)),
    ]


def _each(rows: Sequence[Inspected]) -> str:
    """What is wrong with each row, a line each."""
    more = f"\n... and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
    return "\n".join(row.error for row in rows[:LISTED]) + more


def _over_context(rows: RowSet, room: int) -> list[Finding]:
    long = sorted((row for row in rows.rows if row.tokens > room), key=lambda row: -row.tokens)
    text = (
        f"a response of {rows.max_tokens} tokens leaves {room} of the model's context for a prompt; lower "
        "model.max_pixels, or the longest response: rollout.max_tokens, or a benchmark's max_tokens"
    )
    return _finding("breaks", "over the context", rows.name, long, text)


def _golds(rows: RowSet) -> list[Finding]:
    rejected = [row for row in rows.rows if row.gold]
    passed = [row for row in rows.rows if row.wrong]
    level = "note" if rows.own_function else "breaks"
    text = f"{rejected[0].gold}; no response can be right" if rejected else ""
    if rows.own_function:
        text += " if your function reads \\boxed{} answers"
    return [
        *_finding(level, "gold answers rejected", rows.name, rejected, text),
        *_finding("warning", "wrong answers accepted", rows.name, passed, passed[0].wrong if passed else ""),
    ]


def _pictures(rows: RowSet) -> list[Finding]:
    blank = [row for row in rows.rows if any(mark.blank for mark in row.prints)]
    factors = {row.index: _factor(row) for row in rows.rows}
    shrunk = sorted(
        (row for row in rows.rows if factors[row.index] > SHRUNK), key=lambda row: -factors[row.index]
    )
    text = ""
    if shrunk:
        most = factors[shrunk[0].index]
        text = f"sides shrink up to {most:.1f} times; small print may be gone, raise model.max_pixels"
    without = [
        row
        for row in rows.rows
        if row.example and not row.example.images and MENTION.search(row.example.problem)
    ]
    return [
        *_finding("warning", "blank pictures", rows.name, blank, "the picture has one colour only"),
        *_finding("note", "pictures much reduced", rows.name, shrunk, text),
        *_finding(
            "warning", "picture missing", rows.name, without, "the text speaks of a picture; the row has none"
        ),
    ]


def _factor(row: Inspected) -> float:
    pairs = zip(row.example.images, row.resized, strict=False) if row.example else ()
    return max((max(image.size) / max(size) for image, size in pairs), default=0.0)


def _prompts(rows: RowSet) -> list[Finding]:
    told = [row for row in rows.rows if row.example and _gives_away(row)]
    numbers = {row.index for row in told}
    quoted = [row for row in rows.rows if row.example and row.index not in numbers and _quotes_answer(row)]
    return [
        *_finding("warning", "answer in the prompt", rows.name, told, "the problem says what the answer is"),
        *_finding(
            "note",
            "answer's text in the prompt",
            rows.name,
            quoted,
            "the gold answer stands word for word in the problem",
        ),
    ]


def _gives_away(row: Inspected) -> bool:
    pattern = GIVEN_AWAY.format(re.escape(row.example.answer.strip()))
    return re.search(pattern, row.example.problem, re.IGNORECASE) is not None


def _quotes_answer(row: Inspected) -> bool:
    answer, columns = row.example.answer.strip(), row.example.columns
    if len(answer) < 3 or CHOSEN.match(answer) or any(columns.get(name) for name in ("choices", "options")):
        return False
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", row.example.problem) is not None


def _answers(rows: RowSet) -> list[Finding]:
    found = describe(rows)
    share, answer = found["most_frequent_share"], found["most_frequent_answer"]
    if share <= ONE_ANSWER or found["rows"] < 10:
        return []
    same = [row for row in rows.rows if row.example and row.example.answer.strip() == answer]
    text = f"{share:.0%} of the answers are {answer[:40]!r}: a model that always says so scores {share:.2f}"
    return _finding("warning", "one answer prevails", rows.name, same, text)


def _repeated(rows: RowSet) -> list[Finding]:
    ids: dict[str, list[Inspected]] = defaultdict(list)
    twins: dict[tuple, list[Inspected]] = defaultdict(list)
    for row in (row for row in rows.rows if row.example):
        ids[row.example.id].append(row)
        pictures = tuple(mark.exact for mark in row.prints)
        twins[(pictures, " ".join(row.example.problem.split()))].append(row)
    shared = [row for group in ids.values() if len(group) > 1 for row in group]
    groups = [group for group in twins.values() if len(group) > 1]
    unlike = [group for group in groups if len({row.example.answer for row in group}) > 1]
    return [
        *_finding("note", "ids shared", rows.name, shared, "several rows have one id; map data.columns.id"),
        *_finding(
            "note",
            "rows repeated",
            rows.name,
            [row for group in groups if len({row.example.answer for row in group}) == 1 for row in group],
            "same picture, problem and answer",
        ),
        *_finding(
            "warning",
            "answers contradict",
            rows.name,
            [row for group in unlike for row in group],
            "same picture and problem, other gold answers",
        ),
    ]


def _leaked(rows: RowSet, measured: RowSet) -> list[Finding]:
    pairs = matches(rows.rows, measured.rows)
    same = sum(kind == "same" for _, _, kind in pairs)
    leaked = [row for row, _, _ in pairs]
    named = "; ".join(f"{a.id} and {b.id} ({kind})" for a, b, kind in pairs[:WORST])
    text = f"{same} with the same pixels, {len(pairs) - same} nearly: {named}; filter them out of training"
    return _finding("warning", f"pictures of {measured.name} in training", rows.name, leaked, text)


BITS = 4
"""Perceptual hashes may differ in so many of 64 bits. On real geometry, charts, cells and receipts all pairs
within 4 bits were the same drawing, and pairs from 5 bits on were not."""

ALIKE = 0.9
"""Least correlation of the grey thumbnails."""


def matches(one: Sequence[Inspected], other: Sequence[Inspected]) -> list[tuple[Inspected, Inspected, str]]:
    """For every row of `one` that shares a picture with `other` the first such pair: with the `same` pixels,
    else a `near` duplicate such as another size, compression or border."""
    right = [(row, mark) for row in other for mark in row.prints if not mark.blank]
    exact = {mark.exact: row for row, mark in reversed(right)}
    hashes = np.array([mark.perceptual for _, mark in right], dtype=np.uint64)
    found = []
    for row in one:
        marks = [mark for mark in row.prints if not mark.blank]
        same = next((exact[mark.exact] for mark in marks if mark.exact in exact), None)
        twin = same or next(filter(None, (_near(mark, right, hashes) for mark in marks)), None)
        if twin is not None:
            found.append((row, twin, "same" if same else "near"))
    return found


def _near(
    mark: Fingerprint, right: Sequence[tuple[Inspected, Fingerprint]], hashes: np.ndarray
) -> Inspected | None:
    """The first row with nearly the same picture."""
    close = np.bitwise_count(hashes ^ np.uint64(mark.perceptual)) <= BITS
    for place in close.nonzero()[0]:
        row, twin = right[place]
        if float(mark.thumbnail @ twin.thumbnail) >= ALIKE:
            return row
    return None


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
        rows = _inspect_rows(f"pictures of {item.name}", item.examples, encode, console)
        sets.append(RowSet(f"benchmark {item.name}", rows, evaluated=True, only_pictures=True))
    findings = diagnose(
        sets,
        context=vlm.context,
        skip=config.data.on_error == "skip",
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report(sets, findings), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _write(sets, findings, out, console)
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
    rows = _inspect_rows(name, examples, encode, console)
    with closing(RewardPool([spec], on_error="zero")) as reward:
        [graded] = reward.parts
        rows = check_golds(examples, rows, reward, spec)
    return RowSet(name, rows, evaluated, max_tokens=longest, own_function=not graded.builtin)


def _inspect_rows(name: str, examples: ExampleSet, encode: Encoder, console: Console) -> list[Inspected]:
    with console.progress(f"examine {name}", len(examples), lines=2) as show:
        return inspect(examples, encode, fingerprints=True, progress=lambda done: show(done, "rows"))


def _write(sets: Sequence[RowSet], findings, out: Path, console: Console) -> None:
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
