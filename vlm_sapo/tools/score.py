"""Grades a file of responses, and compares the scores with the verdicts of its rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from PIL.Image import Image

from vlm_sapo.config.evaluation import ScoreOptions
from vlm_sapo.data.images import decode
from vlm_sapo.hub import local_model
from vlm_sapo.models.loading import load_outline
from vlm_sapo.plugins import resolve
from vlm_sapo.reporting.console import Console
from vlm_sapo.rewards.parts import ENTRY_POINTS, Item
from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.rewards.verifiers.boxes import BOX_VERIFIERS, missing_coordinates, needs_family
from vlm_sapo.rewards.verifiers.options import multiple_choice
from vlm_sapo.rewards.verifiers.table import VERIFIERS
from vlm_sapo.types import Example, ResponseText

ROWS_PER_WRITE = 512
"""Rows that are graded before they are written."""
PROBLEM_COLUMNS = ("problem", "question")
GOLD_COLUMNS = ("gold", "answer")
VERDICT_TOLERANCE = 0.01
"""Verdicts that are numbers agree with scores within this much."""


class NoGold(ValueError):
    """A row without gold answer."""


@dataclass
class Agreement:
    """How scores compare with the verdicts of one source."""

    rows: int = 0
    agree: int = 0
    false_positives: int = 0
    false_negatives: int = 0
    with_verdict: int = 0
    outcomes: Counter = field(default_factory=Counter)

    def add(self, score: float, outcome: str, verdict: Any) -> None:
        self.rows += 1
        self.outcomes[outcome] += 1
        if not isinstance(verdict, bool | int | float):
            return
        self.with_verdict += 1
        close = (
            abs(score - verdict) <= VERDICT_TOLERANCE
            if not isinstance(verdict, bool)
            else (score >= 0.5) == verdict
        )
        self.agree += close
        self.false_positives += not close and score > verdict
        self.false_negatives += not close and score < verdict


@dataclass(frozen=True)
class ResponseFile:
    """A file of JSON lines, and the columns that hold responses and gold answers."""

    path: Path
    responses: Sequence[str]
    """Columns with the response; the first that is not empty counts."""
    gold: str | None = None
    """Column with the gold answer; GOLD_COLUMNS by default."""
    count: Callable[[str], int] | None = None
    """Tokens of a response whose row has no `tokens`; None if they can't be counted."""

    def item(self, row: Mapping[str, Any], line: int, *, with_images: bool) -> Item:
        """A row as its response and example. Raises NoGold, or ValueError for an image that can't be read."""
        text = next((str(row[name]) for name in self.responses if row.get(name) not in (None, "")), "")
        tokens, source = row.get("tokens"), f"{self.path}, line {line}"
        if not isinstance(tokens, int):
            tokens = self.count(text) if self.count is not None else None
        problem = str(next((row[name] for name in PROBLEM_COLUMNS if row.get(name)), ""))
        problem, answer = multiple_choice(problem, self._answer(row), row)
        example = Example(
            id=str(row.get("id", line)),
            problem=problem,
            answer=answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False),
            images=self._images(row) if with_images else (),
            columns=row,
            source=source,
        )
        resized = row.get("resized") or [image.size for image in example.images]
        sizes = tuple(map(tuple, resized))
        return ResponseText(text, tokens=tokens, resized=sizes), example

    def _answer(self, row: Mapping[str, Any]) -> Any:
        names = (self.gold,) if self.gold else GOLD_COLUMNS
        answer = next((row[name] for name in names if row.get(name) not in (None, "")), None)
        if answer in (None, []):
            raise NoGold(f"no gold answer in {' or '.join(names)}")
        return answer

    def _images(self, row: Mapping[str, Any]) -> tuple[Image, ...]:
        value = row.get("images") or row.get("image") or []
        images = value if isinstance(value, list) else [value]
        return tuple(decode(image, self.path.parent) for image in images)

    def chunks(self) -> Iterator[list[tuple[int, str]]]:
        """Numbers and text of the lines that are not empty, some at a time."""
        chunk: list[tuple[int, str]] = []
        with self.path.open(encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    chunk.append((number, line))
                if len(chunk) == ROWS_PER_WRITE:
                    yield chunk
                    chunk = []
        if chunk:
            yield chunk

    def check_columns(self) -> None:
        """Raises ValueError where no row has any of the columns: the option is misspelt."""
        for option, names in (
            ("--response", self.responses),
            ("--gold", [self.gold] if self.gold else GOLD_COLUMNS),
        ):
            columns = self._columns(set(names))
            if not set(names) & columns.keys():
                raise ValueError(
                    f"{option} ({', '.join(names)}) must be a column of {self.path}; "
                    f"it has {', '.join(columns)}"
                )

    def _columns(self, names: set[str]) -> dict[str, None]:
        """The file's columns in order, read until one of the names appears."""
        columns: dict[str, None] = {}
        for chunk in self.chunks():
            for row, outcome in (_read(line) for _, line in chunk):
                columns |= dict.fromkeys(row) if outcome is None else {}
            if names & columns.keys():
                break
        return columns


def score_file(
    file: ResponseFile, reward: RewardPool, *, out: Path | None, console: Console
) -> dict[str, Agreement]:
    """Grades every row, writes it with `score` and `outcome` to `out` as it is graded, and returns the
    agreement by `source`; sources of rows with `flags` are counted apart.

    A line that is no JSON object, or a row without gold answer, is an outcome of its own (`bad_row`,
    `bad_gold`), and the others go on.
    """
    agreements: dict[str, Agreement] = {}
    done = 0
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    total = sum(1 for _ in file.path.open("rb"))
    with (
        out.open("w", encoding="utf-8") if out else nullcontext() as output,
        console.progress("score", total) as show,
    ):
        for chunk in file.chunks():
            for row in _grade(chunk, reward, file):
                if output:
                    output.write(json.dumps(row) + "\n")
                source = str(row.get("source") or file.path.name) + (" (flagged)" if row.get("flags") else "")
                agreement = agreements.setdefault(source, Agreement())
                agreement.add(row["score"], row["outcome"], row.get("verdict"))
            if output:
                output.flush()
            done += len(chunk)
            show(done)
    return agreements


def score_command(path: Path, options: ScoreOptions) -> None:
    """What `vlm-sapo score` does: grades a file by a verifier or function, and prints a table."""
    if not path.is_file():
        raise ValueError(f"FILE ({path}) must be a file of JSON lines; there is none")
    if options.out and options.out.resolve() == path.resolve():
        raise ValueError(f"--out ({options.out}) must be another file than the one that is graded")
    arguments = _mapping(options.args)
    count = token_counter(options.model) if options.model is not None else None
    file = ResponseFile(path, options.response.split(","), options.gold or None, count)
    file.check_columns()
    function = resolve(options.reward, field="--reward", builtin=VERIFIERS, group=ENTRY_POINTS)
    if "finding" in signature(function).parameters:
        arguments.setdefault("finding", "stated")
    if needs_family(options.reward, arguments):
        raise ValueError(missing_coordinates(f"--args ({options.args})"))
    part = {"name": options.reward, "args": arguments}
    console = Console()
    with closing(RewardPool([part], on_error=options.on_error, timeout=options.timeout)) as reward:
        agreements = score_file(file, reward, out=options.out, console=console)
    console.table(*report(agreements))


def token_counter(model: str) -> Callable[[str], int]:
    """Counts the tokens of a text as this model writes it, with the end that stops it."""
    tokenizer = load_outline(local_model(model, weights=False, field="--model")).tokenizer
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False)) + 1


def _mapping(text: str) -> dict:
    try:
        mapping = yaml.safe_load(text)
    except yaml.YAMLError:
        mapping = None
    if not isinstance(mapping, dict):
        raise ValueError(f"--args ({text}) must be a YAML mapping, such as '{{tolerance: 0.1}}'")
    return mapping


def report(agreements: Mapping[str, Agreement]) -> tuple[list[str], list[list[str]]]:
    """The agreement by source as a table: header and rows."""
    header = ["source", "rows", "agreement", "false positives", "false negatives", "not graded"]
    rows = []
    for source, item in sorted(agreements.items()):
        shares = ["", "", ""]
        if item.with_verdict:
            shares = [
                f"{item.agree / item.with_verdict:.1%}",
                str(item.false_positives),
                str(item.false_negatives),
            ]
        others = ", ".join(f"{name} {n}" for name, n in item.outcomes.most_common() if name != "graded")
        rows.append([source, str(item.rows), *shares, others])
    return header, rows


def _grade(chunk: Sequence[tuple[int, str]], reward: RewardPool, file: ResponseFile) -> list[dict]:
    """The rows of a chunk of lines with `score` and `outcome`."""
    rows: list[dict] = []
    items: dict[int, Item] = {}
    with_images = any(not part.builtin or part.label in BOX_VERIFIERS for part in reward.parts)
    for line, text in chunk:
        row, outcome = _read(text)
        if outcome is None:
            try:
                items[len(rows)] = file.item(row, line, with_images=with_images)
            except NoGold as error:
                row, outcome = row | {"error": str(error)}, "bad_gold"
            except ValueError as error:
                row, outcome = row | {"error": str(error)}, "bad_row"
        rows.append(row | {"score": 0.0, "outcome": outcome} | ({"line": line} if "error" in row else {}))
    for index, score in zip(items, reward(list(items.values())), strict=True):
        outcomes = [outcome for outcome in score.outcomes.values() if outcome != "graded"]
        rows[index] |= {"score": score.total, "outcome": outcomes[0] if outcomes else "graded"}
    return rows


def _read(line: str) -> tuple[dict, str | None]:
    """A line's row and None, or a row that holds the error and its outcome."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {"error": f"not JSON: {error}", "text": line[:200]}, "bad_row"
    if not isinstance(row, dict):
        return {
            "error": f"a JSON object is needed, this is {type(row).__name__}",
            "text": line[:200],
        }, "bad_row"
    return row, None
