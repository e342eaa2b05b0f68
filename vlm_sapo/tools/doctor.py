"""Checks the rows of a config before a run: unreadable rows, wrong gold answers, leakage."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.data.holdout import TaskRows, apply, split
from vlm_sapo.data.rows import ExampleSet
from vlm_sapo.data.sources import build_examples, build_tasks
from vlm_sapo.evaluation.benchmarks import benchmarks_of, build_benchmarks
from vlm_sapo.evaluation.preflight import (
    Fingerprint,
    Inspected,
    Trial,
    check_golds,
    failure_of,
    inspect,
    try_reward,
)
from vlm_sapo.hub import local_model
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import load_outline
from vlm_sapo.reporting.console import Console
from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.rewards.verifiers.choice import is_multiple_choice
from vlm_sapo.rewards.verifiers.layout import ResponseLayout
from vlm_sapo.rewards.verifiers.table import VERIFIERS, own_verifier
from vlm_sapo.rollout.build import build_tools
from vlm_sapo.training.build_policy import build_encoder
from vlm_sapo.types import RowError, one_line

IDS_PER_FINDING = 5
"""Rows that a finding names."""
ERRORS_PER_FINDING = 20
"""Rows whose own error a finding gives."""
SHRINK_WARNING_FACTOR = 3.0
"""Images whose sides shrink by more than this factor are reported: their small print is gone."""
FREQUENT_ANSWER_SHARE = 0.5
"""Share of a set's answers above which one answer is too frequent."""
IMAGE_MENTION = re.compile(
    r"\b(?:figure|diagram|image|picture|graph|chart|photo|as shown|table below)\b", re.IGNORECASE
)
PREVIEW_LENGTH = 1000
"""Characters of a prompt that are printed."""
NEVER_POSITIVE = {"length"}
"""Parts that take away only."""
ANSWER_STATED = r"(?:\\boxed\s*\{{|<answer>|\banswer\s*(?:is|:|=))[\s$(*]*{}(?!\w)"
CHOICE_LABEL = re.compile(r"^\(?[A-Za-z]\)?$|^(?:yes|no|true|false)$", re.IGNORECASE)
Level = Literal["breaks", "warning", "note"]
"""`breaks`: the run would stop or could never reward the row."""
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Finding:
    """A problem with some rows of a set."""

    level: Level
    name: str
    where: str
    count: int
    rows: list[str]
    """Ids of the worst or first of them."""
    text: str


@dataclass(frozen=True)
class RowSet:
    """The rows of a task, of the held-out set or of a benchmark."""

    name: str
    rows: list[Inspected]
    evaluated: bool
    """Whether they measure the model instead of training it."""
    max_tokens: int = 0
    """Longest response to them."""
    only_images: bool = False
    """Whether only their images are compared, since no run uses the rows."""
    own_function: bool = False
    """Whether a user's function grades them, whose answer format is not known."""
    trials: Sequence[Trial] = ()
    """What the whole reward says of right and wrong responses to some of them."""
    format: str = ""
    """What their columns were recognised as."""
    preview: Preview | None = None
    """One of them as the model reads it; None if none can be read."""

    def finding(self, level: Level, name: str, rows: Sequence[Inspected], text: str) -> list[Finding]:
        """A finding about some rows of the set; none where there are no such rows."""
        if not rows:
            return []
        return [Finding(level, name, self.name, len(rows), [row.id for row in rows[:IDS_PER_FINDING]], text)]


@dataclass(frozen=True)
class Preview:
    """A row as the model reads it, and what its verifier makes of it."""

    row: str
    prompt: str
    """The rendered chat template, with sizes and tokens of the images where they are."""
    tokens: int
    gold: str
    verifier: str
    scores: dict[str, str]
    """What the gold answer and a wrong one earn, by response."""
    asks_for_no_mark: bool
    """Whether a built-in verifier reads marked answers only, and the prompt asks for no mark."""

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        yield f"row {self.row} as the model reads it ({self.tokens} tokens):"
        yield from (f"    {line}" for line in _shortened(self.prompt).splitlines())
        scores = "; ".join(f"{text!r} earns {score}" for text, score in self.scores.items())
        yield f"  gold answer {self.gold!r}, graded by {self.verifier}: {scores or 'nothing to try'}"
        if self.asks_for_no_mark:
            yield "  the prompt asks for no \\boxed{} and no <answer> tags, and an answer without them earns"
            yield "  nothing; unless the model writes them by itself, ask for them in data.template"


def _shortened(text: str) -> str:
    """A long text without its middle."""
    if len(text) <= PREVIEW_LENGTH:
        return text
    return f"{text[: PREVIEW_LENGTH // 2]}\n... ({len(text)} characters)\n{text[-PREVIEW_LENGTH // 2 :]}"


def diagnose(sets: Sequence[RowSet], *, context: int, skip: bool) -> list[Finding]:
    """All findings about the sets, the worst first. `context` is the model's; with `skip`, the run leaves out
    rows that can't be used."""
    findings: list[Finding] = []
    for rows in sets:
        if rows.only_images:
            unreadable = [row for row in rows.rows if row.example is None]
            findings += rows.finding("warning", "pictures not compared", unreadable, _errors(unreadable))
            continue
        findings += _check_usable(rows, skip)
        findings += _check_context(rows, context - rows.max_tokens)
        findings += _check_verdicts(rows)
        findings += _check_trials(rows)
        findings += _check_images(rows)
        findings += _check_prompts(rows)
        findings += _check_answers(rows)
        findings += _check_duplicates(rows)
    for rows in (rows for rows in sets if not rows.evaluated):
        for evaluated in (rows for rows in sets if rows.evaluated):
            findings += _check_leakage(rows, evaluated)
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def describe(rows: RowSet) -> dict[str, Any]:
    """Counts and percentiles of a set, for the table and the JSON file."""
    usable = [row for row in rows.rows if row.tokens and not row.error]
    tokens = np.array([row.tokens for row in rows.rows if row.tokens] or [0])
    answers = Counter(row.example.answer.strip() for row in usable)
    longest = sorted(rows.rows, key=lambda row: -row.tokens)[:IDS_PER_FINDING]
    [(answer, count)] = answers.most_common(1) or [("", 0)]
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
        "most_frequent_share": count / max(sum(answers.values()), 1),
        "format": rows.format,
        "preview": asdict(rows.preview) if rows.preview else None,
    }


def report(sets: Sequence[RowSet], findings: Sequence[Finding]) -> dict[str, Any]:
    """The content of the JSON file."""
    return {
        "sets": {rows.name: describe(rows) for rows in sets},
        "findings": [asdict(finding) for finding in findings],
    }


def _check_usable(rows: RowSet, skip: bool) -> list[Finding]:
    broken = [row for row in rows.rows if row.error and not row.tokens]
    long = sorted((row for row in rows.rows if row.error and row.tokens), key=lambda row: -row.tokens)
    none_usable = len(broken) + len(long) == len(rows.rows)
    level = "warning" if skip and not none_usable else "breaks"
    return [
        *rows.finding(level, "unreadable rows", broken, _errors(broken)),
        *rows.finding(level, "prompts over the limit", long, _errors(long)),
    ]


def _errors(rows: Sequence[Inspected]) -> str:
    """What is wrong with each row, a line each."""
    more = f"\n... and {len(rows) - ERRORS_PER_FINDING} more" if len(rows) > ERRORS_PER_FINDING else ""
    return "\n".join(row.error for row in rows[:ERRORS_PER_FINDING]) + more


def _check_context(rows: RowSet, limit: int) -> list[Finding]:
    """`limit` is the context that the longest response leaves for a prompt, in tokens."""
    long = sorted((row for row in rows.rows if row.tokens > limit), key=lambda row: -row.tokens)
    text = (
        f"a response of {rows.max_tokens} tokens leaves {limit} of the model's context for a prompt; lower "
        "model.max_pixels, or the longest response: rollout.max_tokens, or a benchmark's max_tokens"
    )
    return rows.finding("breaks", "over the context", long, text)


def _check_verdicts(rows: RowSet) -> list[Finding]:
    """Gold answers must score 1, wrong answers 0."""
    rejected = [row for row in rows.rows if row.gold]
    accepted = [row for row in rows.rows if row.wrong]
    level = "note" if rows.own_function else "breaks"
    text = f"{rejected[0].gold}; no response can be right" if rejected else ""
    wrong = accepted[0].wrong if accepted else ""
    if rows.own_function:
        text += " if your function reads \\boxed{} answers"
        wrong += "; right if your function pays that to any response"
    accepted_level = "note" if rows.own_function else "warning"
    return [
        *_check_failures(rows),
        *rows.finding(level, "gold answers rejected", rejected, text),
        *rows.finding(accepted_level, "wrong answers accepted", accepted, wrong),
    ]


def _check_failures(rows: RowSet) -> list[Finding]:
    """The reward must give every row a value: each kind of error once."""
    failed: dict[str, list[Inspected]] = defaultdict(list)
    for row in (row for row in rows.rows if row.failure):
        failed[":".join(row.failure.split(":")[:2])].append(row)
    findings = []
    for own in failed.values():
        text = f"the first of them ends with {own[0].failure}; mend the function"
        findings += rows.finding("breaks", "reward fails", own, text)
    return findings


def _check_trials(rows: RowSet) -> list[Finding]:
    """Every part of the reward must run, and give something to the gold answer in the prompt's layout."""
    findings = []
    labels = {label for trial in rows.trials for label in trial.rewards[0].parts if "/" not in label}
    for label in sorted(labels):
        failed = {
            trial.row.index: (trial.row, failure)
            for trial in rows.trials
            for reward in trial.rewards
            if (failure := failure_of(reward, label))
        }
        if failed:
            tried, failures = zip(*failed.values(), strict=True)
            if failures[0] not in {row.failure for row in rows.rows}:  # else all rows with it are listed
                text = f"{label} ends with {failures[0]}; mend the function"
                findings += rows.finding("breaks", "reward fails", tried, text)
        elif label not in NEVER_POSITIVE and all(trial.rewards[0].parts[label] <= 0 for trial in rows.trials):
            shown = one_line(rows.trials[0].right)
            text = f"{label} gives nothing to {shown!r}, the gold answer in the layout that the prompt asks "
            text += "for; let prompt and part ask for the same"
            findings += rows.finding("warning", "reward never earned", [t.row for t in rows.trials], text)
    return findings


def _check_images(rows: RowSet) -> list[Finding]:
    blank = [row for row in rows.rows if any(item.blank for item in row.prints)]
    factors = {row.index: _shrink_factor(row) for row in rows.rows}
    shrunk = sorted(
        (row for row in rows.rows if factors[row.index] > SHRINK_WARNING_FACTOR),
        key=lambda row: -factors[row.index],
    )
    text = ""
    if shrunk:
        largest = factors[shrunk[0].index]
        text = f"sides shrink up to {largest:.1f} times; small print may be gone, raise model.max_pixels"
    missing = [
        row
        for row in rows.rows
        if row.example and not row.example.images and IMAGE_MENTION.search(row.example.problem)
    ]
    missing_text = "the problem mentions an image; the row has none"
    without = [row for row in rows.rows if row.example and not row.example.images]
    mentioned = {row.index for row in missing}
    some = [row for row in without if row.index not in mentioned] if len(without) < len(rows.rows) / 2 else []
    return [
        *rows.finding("warning", "blank pictures", blank, "the image has one colour only"),
        *rows.finding("note", "pictures much reduced", shrunk, text),
        *rows.finding("warning", "picture missing", missing, missing_text),
        *rows.finding("note", "rows without an image", some, "the others have images"),
    ]


def _shrink_factor(row: Inspected) -> float:
    """How many times longer the sides of the row's images are than after resizing, at most."""
    pairs = zip(row.example.images, row.resized, strict=False) if row.example else ()
    return max((max(image.size) / max(size) for image, size in pairs), default=0.0)


def _check_prompts(rows: RowSet) -> list[Finding]:
    stated = [row for row in rows.rows if row.example and _states_answer(row)]
    indices = {row.index for row in stated}
    quoted = [row for row in rows.rows if row.example and row.index not in indices and _quotes_answer(row)]
    quoted_text = "the gold answer appears word for word in the problem"
    return [
        *rows.finding("warning", "answer in the prompt", stated, "the problem says what the answer is"),
        *rows.finding("note", "answer's text in the prompt", quoted, quoted_text),
    ]


def _states_answer(row: Inspected) -> bool:
    pattern = ANSWER_STATED.format(re.escape(row.example.answer.strip()))
    return re.search(pattern, row.example.problem, re.IGNORECASE) is not None


def _quotes_answer(row: Inspected) -> bool:
    answer = row.example.answer.strip()
    if len(answer) < 3 or CHOICE_LABEL.match(answer) or is_multiple_choice(row.example):
        return False
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", row.example.problem) is not None


def _check_answers(rows: RowSet) -> list[Finding]:
    summary = describe(rows)
    share, answer = summary["most_frequent_share"], summary["most_frequent_answer"]
    if share <= FREQUENT_ANSWER_SHARE or summary["rows"] < 10:
        return []
    same = [row for row in rows.rows if row.example and row.example.answer.strip() == answer]
    text = f"{share:.0%} of the answers are {answer[:40]!r}: a model that always says so scores {share:.2f}"
    return rows.finding("warning", "one answer prevails", same, text)


def _check_duplicates(rows: RowSet) -> list[Finding]:
    by_id: dict[str, list[Inspected]] = defaultdict(list)
    by_content: dict[tuple, list[Inspected]] = defaultdict(list)
    for row in (row for row in rows.rows if row.example):
        by_id[row.example.id].append(row)
        images = tuple(item.exact for item in row.prints)
        by_content[(images, " ".join(row.example.problem.split()))].append(row)
    shared = [row for group in by_id.values() if len(group) > 1 for row in group]
    repeated, contradicting = [], []
    for group in by_content.values():
        if len(group) > 1:
            same_answer = len({row.example.answer for row in group}) == 1
            (repeated if same_answer else contradicting).extend(group)
    contradiction = "same image and problem, but different gold answers"
    return [
        *rows.finding("note", "ids shared", shared, "several rows have one id; map data.columns.id"),
        *rows.finding("note", "rows repeated", repeated, "same image, problem and answer"),
        *rows.finding("warning", "answers contradict", contradicting, contradiction),
    ]


def _check_leakage(trained: RowSet, evaluated: RowSet) -> list[Finding]:
    pairs = shared_images(trained.rows, evaluated.rows)
    same = sum(match == "same" for _, _, match in pairs)
    leaked = [row for row, _, _ in pairs]
    named = "; ".join(f"{a.id} and {b.id} ({match})" for a, b, match in pairs[:IDS_PER_FINDING])
    text = f"{same} with the same pixels, {len(pairs) - same} nearly: {named}; take them out of the file"
    return trained.finding("warning", f"pictures of {evaluated.name} in training", leaked, text)


MAX_HASH_DISTANCE = 4
"""Bits of 64 in which the perceptual hashes of near duplicates may differ. On real geometry, charts, cells
and receipts all pairs within 4 bits were the same image, and pairs from 5 bits on were not."""

MIN_CORRELATION = 0.9
"""Least correlation of the grey thumbnails of near duplicates."""


def shared_images(
    rows: Sequence[Inspected], others: Sequence[Inspected]
) -> list[tuple[Inspected, Inspected, str]]:
    """For every row that shares an image with one of `others`, the first such pair: with the `same` pixels,
    else a `near` duplicate such as another size, compression or border."""
    candidates = [(row, item) for row in others for item in row.prints if not item.blank]
    exact = {item.exact: row for row, item in reversed(candidates)}
    hashes = np.array([item.perceptual for _, item in candidates], dtype=np.uint64)
    pairs = []
    for row in rows:
        prints = [item for item in row.prints if not item.blank]
        same = next((exact[item.exact] for item in prints if item.exact in exact), None)
        twin = same or next(filter(None, (_near(item, candidates, hashes) for item in prints)), None)
        if twin is not None:
            pairs.append((row, twin, "same" if same else "near"))
    return pairs


def _near(
    item: Fingerprint, candidates: Sequence[tuple[Inspected, Fingerprint]], hashes: np.ndarray
) -> Inspected | None:
    """The first row with nearly the same image."""
    close = np.bitwise_count(hashes ^ np.uint64(item.perceptual)) <= MAX_HASH_DISTANCE
    for index in close.nonzero()[0]:
        row, twin = candidates[index]
        if float(item.thumbnail @ twin.thumbnail) >= MIN_CORRELATION:
            return row
    return None


@dataclass(frozen=True)
class Inspector:
    """Inspects every row of a set, with a progress bar."""

    encode: Encoder
    console: Console

    def inspect(self, name: str, examples: ExampleSet) -> list[Inspected]:
        with self.console.progress(f"examine {name}", len(examples), lines=2) as show:
            return inspect(examples, self.encode, fingerprints=True, progress=lambda done: show(done, "rows"))

    def check(
        self,
        name: str,
        examples: ExampleSet,
        spec: dict,
        *,
        max_tokens: int,
        evaluated: bool,
        parts: Sequence[dict] = (),
    ) -> RowSet:
        """The inspected rows, what the reward part `spec` says of gold and wrong answers, and what all
        `parts` of the reward (by default that one) say of some."""
        rows = self.inspect(name, examples)
        with closing(RewardPool([spec], on_error="zero")) as reward:
            [part] = reward.parts
            rows = check_golds(examples, rows, reward, spec)
            trials = [] if parts else try_reward(examples, rows, reward, spec)
        if parts:
            with closing(RewardPool(parts, on_error="zero")) as reward:
                trials = try_reward(examples, rows, reward, spec)
        return RowSet(
            name,
            rows,
            evaluated,
            max_tokens=max_tokens,
            own_function=not part.builtin,
            trials=trials,
            format=examples.format,
            preview=self._preview(examples, rows, trials, spec),
        )

    def _preview(
        self, examples: ExampleSet, rows: Sequence[Inspected], trials: Sequence[Trial], spec: dict
    ) -> Preview | None:
        usable = [trial.row for trial in trials] or [row for row in rows if row.tokens and not row.error]
        if not usable:
            return None
        row = usable[0]
        prompt = self.encode(examples[row.index])
        name, args = own_verifier(row.example, spec["name"], spec["args"])
        verifier = f"{name} ({', '.join(f'{key}={value}' for key, value in args.items())})" if args else name
        scores = {
            one_line(response): f"{reward.total:g}"
            for trial in trials[:1]
            for response, reward in zip((trial.right, trial.wrong), trial.rewards, strict=True)
        }
        layout, marked = ResponseLayout.asked(row.example), args.get("finding", "marked") == "marked"
        return Preview(
            row.id,
            self.encode.describe(prompt),
            row.tokens,
            row.example.answer,
            verifier,
            scores,
            asks_for_no_mark=name in VERIFIERS and marked and not (layout.box or layout.tag),
        )


def doctor_command(config: TrainConfig, against: Sequence[str], out: Path) -> bool:
    """Examines training rows, held-out rows, the config's benchmarks and those of `against`; returns whether
    a run would go through."""
    console = Console()
    vlm = load_outline(local_model(config.model.path, config.model.revision, weights=False))
    tools = build_tools(config.rollout.environment, vlm)
    encode = build_encoder(vlm, config.model, max_tokens=config.data.max_prompt_tokens, tools=tools)
    tasks, parts = build_tasks(config.data), None
    if config.data.holdout is not None:
        with (
            console.progress("split by image", sum(map(len, tasks.values())), lines=2) as show,
            suppress(RowError),  # no row can be read, which is a finding
        ):
            parts = split(tasks, config.data.holdout, lambda done: show(done, "rows"))
    rows = apply(parts, tasks, mixture=bool(config.data.mixture))
    sets = list(_inspect_sets(config, rows, against, Inspector(encode, console)))
    findings = diagnose(sets, context=vlm.context, skip=config.data.on_error == "skip")
    out.parent.mkdir(parents=True, exist_ok=True)
    content = report(sets, findings)
    if parts is not None:
        content["holdout"] = {
            "rows": sum(map(len, rows.held_out.values())),
            "images": parts.images,
            "trained_rows": sum(map(len, rows.trained.values())),
            "trained_images": parts.trained_images,
        }
        console.say(
            "data.holdout: {rows:,} rows with {images:,} images held out, {trained_rows:,} with "
            "{trained_images:,} trained; none of the images is on both sides".format(**content["holdout"])
        )
    out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _print(sets, findings, out, console)
    return all(finding.level != "breaks" for finding in findings)


def _inspect_sets(
    config: TrainConfig, rows: TaskRows, against: Sequence[str], inspector: Inspector
) -> Iterator[RowSet]:
    label = config.eval.part or config.reward.measured
    part = config.reward.parts[config.reward.labels.index(label)]
    spec = part.model_dump() | {"label": "verdict", "weight": 1.0, "gate": None}
    longest = config.rollout.max_tokens
    parts = [item.model_dump() for item in config.reward.parts]
    for name, examples in rows.trained.items():
        yield inspector.check(name, examples, spec, max_tokens=longest, evaluated=False, parts=parts)
    held_out = dict(rows.held_out) | {item.task: build_examples(item) for item in config.eval.data}
    for name, examples in held_out.items():
        yield inspector.check(name, examples, spec, max_tokens=longest, evaluated=True)
    for item in benchmarks_of(config):
        name, limit = f"benchmark {item.name}", item.max_tokens
        own = spec if item.graded_by_run else item.parts[0]
        yield inspector.check(name, item.examples, own, max_tokens=limit, evaluated=True)
    for item in build_benchmarks(against):
        rows = inspector.inspect(f"images of {item.name}", item.examples)
        yield RowSet(f"benchmark {item.name}", rows, evaluated=True, only_images=True)


HEADER = [
    "set",
    "rows",
    "usable",
    "images",
    "tokens p50",
    "p95",
    "max",
    "image tokens",
    "answers",
    "most frequent",
]


def _print(sets: Sequence[RowSet], findings: Sequence[Finding], out: Path, console: Console) -> None:
    table = []
    for rows in sets:
        summary = describe(rows)
        counts = [summary["rows"], summary["usable"], summary["pictures"], *summary["tokens"].values()]
        counts += [summary["image_tokens_max"], summary["answers"]]
        frequent = f"{summary['most_frequent_answer'][:20]!r} {summary['most_frequent_share']:.0%}"
        table.append([rows.name, *map(str, counts), frequent])
    console.table(HEADER, table)
    for rows in sets:
        if rows.format:
            console.say(f"{rows.name}: {rows.format}")
        if rows.preview:
            console.say("\n".join(f"  {line}" for line in rows.preview.lines()))
    for finding in findings:
        ids = ", ".join(finding.rows) + (", ..." if finding.count > len(finding.rows) else "")
        console.say(f"{finding.level}: {finding.where}: {finding.name}: {finding.count} ({ids})")
        console.say("\n".join(f"    {line}" for line in finding.text.splitlines()))
    breaks = sum(finding.level == "breaks" for finding in findings)
    verdict = f"{_findings(breaks)} would break the run" if breaks else "nothing would break the run"
    console.say(f"{verdict}; {_findings(len(findings))} in all, in {out}")


def _findings(count: int) -> str:
    return f"{count} finding{'s' * (count != 1)}"
