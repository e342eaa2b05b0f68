"""Grades a file of responses, and compares with the verdicts that its rows carry."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import yaml

from vlm_sapo.data.images import decode
from vlm_sapo.plugins import resolve
from vlm_sapo.reporting.console import Console
from vlm_sapo.rewards.parts import ENTRY_POINTS, Item
from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.rewards.verifiers.table import VERIFIERS
from vlm_sapo.types import Example, ResponseText

BATCH = 512
"""Rows that are graded before they are written."""
PROBLEM_COLUMNS = ("problem", "question")
GOLD_COLUMNS = ("gold", "answer")
SEE_PICTURES = ("box", "point_in_box")
"""Built-in verifiers that need a row's pictures; functions of users always get them."""
TOLERANCE = 0.01
"""Verdicts that are numbers agree within this much."""


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
            abs(score - verdict) <= TOLERANCE if not isinstance(verdict, bool) else (score >= 0.5) == verdict
        )
        self.agree += close
        self.false_positives += not close and score > verdict
        self.false_negatives += not close and score < verdict


def score_file(
    path: Path,
    reward: RewardPool,
    *,
    responses: Sequence[str],
    gold: str | None,
    out: Path | None,
    progress=lambda done: None,
) -> dict[str, Agreement]:
    """Grades every row, writes it with `score` and `outcome` to `out` as it is graded, and returns the
    agreement by `source`; sources of rows with `flags` are counted apart.

    A line that is no JSON object, or a row without gold answer, is an outcome of its own (`bad_row`,
    `bad_gold`), and the others go on.
    """
    found: dict[str, Agreement] = {}
    done = 0
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") if out else nullcontext() as file:
        for chunk in _chunks(path):
            graded = _grade(chunk, reward, path, responses, gold)
            for row in graded:
                if file:
                    file.write(json.dumps(row) + "\n")
                source = str(row.get("source") or path.name) + (" (flagged)" if row.get("flags") else "")
                found.setdefault(source, Agreement()).add(row["score"], row["outcome"], row.get("verdict"))
            if file:
                file.flush()
            done += len(chunk)
            progress(done)
    return found


def score_command(
    path: Path,
    name: str,
    *,
    args: str,
    responses: str,
    gold: str,
    out: Path | None,
    timeout: float,
    on_error: str,
) -> None:
    """What `vlm-sapo score` does: grades, prints a table, names what went wrong."""
    if not path.is_file():
        raise ValueError(f"FILE ({path}) must be a file of JSON lines; there is none")
    if out and out.resolve() == path.resolve():
        raise ValueError(f"--out ({out}) must be another file than the one that is graded")
    if on_error not in ("stop", "zero"):
        raise ValueError(f"--on-error ({on_error}) must be stop or zero")
    if not 0 < timeout < math.inf:
        raise ValueError(f"--timeout ({timeout}) must be a number of seconds over 0")
    given = _mapping(args)
    _check_columns(path, responses.split(","), "--response")
    _check_columns(path, [gold] if gold else GOLD_COLUMNS, "--gold")
    takes = signature(resolve(name, field="--reward", builtin=VERIFIERS, group=ENTRY_POINTS)).parameters
    if "finding" in takes and "finding" not in given:
        given["finding"] = "stated"
    console = Console()
    total = sum(1 for _ in path.open("rb"))
    with (
        closing(RewardPool([{"name": name, "args": given}], on_error=on_error, timeout=timeout)) as reward,
        console.progress("score", total) as show,
    ):
        found = score_file(
            path, reward, responses=responses.split(","), gold=gold or None, out=out, progress=show
        )
    console.table(*report(found))


def _mapping(text: str) -> dict:
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError:
        given = None
    if not isinstance(given, dict):
        raise ValueError(f"--args ({text}) must be a YAML mapping, such as '{{tolerance: 0.1}}'")
    return given


def _check_columns(path: Path, names: Sequence[str], option: str) -> None:
    """Raises ValueError where no row has any of the columns: a misspelt name, not a file of bad rows."""
    known: dict[str, None] = {}
    for chunk in _chunks(path):
        for row, outcome in (_read(line) for _, line in chunk):
            known |= dict.fromkeys(row) if outcome is None else {}
        if set(names) & set(known):
            return
    raise ValueError(f"{option} ({', '.join(names)}) must be a column of {path}; it has {', '.join(known)}")


def report(found: Mapping[str, Agreement]) -> tuple[list[str], list[list[str]]]:
    """The agreement as a table: header and rows."""
    header = ["source", "rows", "agreement", "false positives", "false negatives", "not graded"]
    rows = []
    for source, item in sorted(found.items()):
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


def _grade(chunk, reward: RewardPool, path: Path, responses: Sequence[str], gold: str | None) -> list[dict]:
    rows: list[dict] = []
    items: dict[int, Item] = {}
    pictures = any(not part.builtin or part.label in SEE_PICTURES for part in reward.parts)
    for number, line in chunk:
        row, outcome = _read(line)
        if outcome is None:
            try:
                items[len(rows)] = _item(row, number, path, responses, gold, pictures)
            except NoGold as error:
                row, outcome = row | {"error": str(error)}, "bad_gold"
            except ValueError as error:
                row, outcome = row | {"error": str(error)}, "bad_row"
        rows.append(row | {"score": 0.0, "outcome": outcome} | ({"line": number} if "error" in row else {}))
    for place, score in zip(items, reward(list(items.values())), strict=True):
        outcomes = [outcome for outcome in score.outcomes.values() if outcome != "graded"]
        rows[place] |= {"score": score.total, "outcome": outcomes[0] if outcomes else "graded"}
    return rows


def _read(line: str) -> tuple[dict, str | None]:
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


def _item(
    row: Mapping, number: int, path: Path, responses: Sequence[str], gold: str | None, pictures: bool
) -> Item:
    name = gold or next((name for name in GOLD_COLUMNS if row.get(name) not in (None, "")), None)
    answer = None if name is None else row.get(name)
    if answer in (None, "", []):
        raise NoGold(f"no gold answer in {gold or ' or '.join(GOLD_COLUMNS)}")
    text = next((str(row[name]) for name in responses if row.get(name) not in (None, "")), "")
    tokens, held = row.get("tokens"), row.get("images") or row.get("image") or []
    listed = held if isinstance(held, list) else [held]
    example = Example(
        id=str(row.get("id", number)),
        problem=str(next((row[name] for name in PROBLEM_COLUMNS if row.get(name)), "")),
        answer=answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False),
        images=tuple(decode(picture, path.parent) for picture in listed) if pictures else (),
        columns=row,
        source=f"{path}, line {number}",
    )
    resized = row.get("resized") or [image.size for image in example.images]
    return ResponseText(
        text, tokens=tokens if isinstance(tokens, int) else None, resized=tuple(map(tuple, resized))
    ), example


def _chunks(path: Path) -> Iterator[list[tuple[int, str]]]:
    chunk: list[tuple[int, str]] = []
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                chunk.append((number, line))
            if len(chunk) == BATCH:
                yield chunk
                chunk = []
    if chunk:
        yield chunk
