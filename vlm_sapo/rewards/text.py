"""Verifiers of plain text: equality, edit distance, JSON fields, layout, length and language."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

from vlm_sapo.rewards.answers import BadGold, Finding, NoAnswer, find_answer
from vlm_sapo.rewards.numeric import read_number
from vlm_sapo.types import Example, Response

PLAIN = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def golds(example: Example) -> list[str]:
    """The accepted answers: the texts of a JSON list, or the answer itself. Raises BadGold when empty."""
    text = example.answer.strip()
    if text.startswith("["):
        try:
            listed = json.loads(text)
        except ValueError:
            listed = None
        if isinstance(listed, list) and listed and all(isinstance(item, str) for item in listed):
            return listed
    if not text:
        raise BadGold("the gold answer is empty")
    return [text]


def exact(response: str, example: Example, *, case: bool = False, finding: Finding = "marked") -> float:
    """1.0 where the answer is one of the gold texts, by Unicode form, spaces and (unless `case`) case."""
    answer = _squash(find_answer(response, finding), case)
    return float(any(answer == _squash(gold, case) for gold in golds(example)))


def short(response: str, example: Example, *, finding: Finding = "marked") -> float:
    """1.0 where the answer holds one of the gold texts as words, or the gold number to two decimals (MMMU's
    open questions). Numbers count from the last side of an equation; a gold text of one letter must stand
    there in its own case."""
    answer = find_answer(response, finding)
    words = f" {' '.join(_words(answer))} "
    numbers = [float(found.replace(",", "")) for found in PLAIN.findall(answer.rpartition("=")[2])]
    for gold in golds(example):
        wanted = read_number(gold, percent=False)
        if wanted is not None:
            if any(round(number, 2) == round(wanted, 2) for number in numbers):
                return 1.0
            continue
        text = f" {' '.join(_words(gold))} "
        if text.strip() and (
            text in words if len(gold.strip()) == 1 else text.casefold() in words.casefold()
        ):
            return 1.0
    return 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[^\s,;:!?()\"'*$]+", unicodedata.normalize("NFKC", text).rstrip("."))


def anls(response: str, example: Example, *, threshold: float = 0.5, finding: Finding = "marked") -> float:
    """Average normalised Levenshtein similarity (Biten et al., 2019): the best over the gold texts of
    1 - distance / longer length, lower-cased and with single spaces; 0 where that distance is `threshold` or
    more."""
    answer = _squash(find_answer(response, finding))
    best = 0.0
    for gold in map(_squash, golds(example)):
        longest = max(len(answer), len(gold))
        limit = int(threshold * longest) + 1
        distance = levenshtein(answer, gold, limit=limit) / longest if longest else 0.0
        best = max(best, 1.0 - distance if distance < threshold else 0.0)
    return best


def edit_distance(
    response: str,
    example: Example,
    *,
    unit: Literal["character", "word"] = "character",
    finding: Finding = "marked",
) -> float:
    """1 - error rate (insertions, deletions and substitutions over the gold's length), at least 0; the best
    over the gold texts."""
    answer = _squash(find_answer(response, finding), case=True)
    best = 0.0
    for gold in golds(example):
        wanted = _squash(gold, case=True)
        one, other = (answer, wanted) if unit == "character" else (answer.split(), wanted.split())
        if not other:
            raise BadGold(f"the gold answer {gold!r} is empty")
        best = max(best, 1 - levenshtein(one, other, limit=len(other)) / len(other))
    return best


def levenshtein(one: Sequence, other: Sequence, *, limit: int | None = None) -> int:
    """Edit distance; where it reaches `limit`, `limit`."""
    if len(one) < len(other):
        one, other = other, one
    limit = len(one) if limit is None else limit
    if len(one) - len(other) >= limit:
        return limit
    row = list(range(len(other) + 1))
    for place, item in enumerate(one, 1):
        previous, row[0] = row[0], place
        for column, wanted in enumerate(other, 1):
            previous, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, previous + (item != wanted)),
            )
        if min(row) >= limit:
            return limit
    return min(row[-1], limit)


def json_fields(response: str, example: Example, *, finding: Finding = "marked") -> float:
    """The share of the gold JSON object's fields that the answer's object has with the same value; texts are
    compared without case and doubled spaces, numbers by value. The answer may stand in a code fence."""
    try:
        gold = json.loads(example.answer)
    except ValueError as error:
        raise BadGold(f"the gold answer must be a JSON object; {error}") from error
    if not isinstance(gold, dict) or not gold:
        raise BadGold("the gold answer must be a JSON object with at least one field")
    given = _json_object(response, finding)
    right = sum(name in given and _same(given[name], wanted) for name, wanted in gold.items())
    return right / len(gold)


def _json_object(response: str, finding: Finding) -> dict:
    fence = re.findall(r"```(?:json)?\s*(\{.*?\})\s*```", response, re.DOTALL)
    text = fence[-1] if fence else find_answer(response, finding)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise NoAnswer from None
    if not isinstance(found, dict):
        raise NoAnswer
    return found


def _same(given, wanted) -> bool:
    if isinstance(given, int | float) and isinstance(wanted, int | float):
        return float(given) == float(wanted)
    if isinstance(given, str) or isinstance(wanted, str):
        return _squash(str(given)) == _squash(str(wanted))
    return given == wanted


def format(response: str, example: Example, *, pattern: str = r"<think>.*</think>.*\\boxed\{.*\}.*") -> float:
    """1.0 where the whole response has the layout `pattern` (a regular expression, `.` matching newlines)."""
    return float(re.fullmatch(pattern, response.strip(), re.DOTALL) is not None)


def length(response: Response, example: Example, *, allowed: int, buffer: int) -> float:
    """Soft overlong penalty (DAPO, arXiv 2503.14476): 0 up to `allowed` tokens, falling to -1 over the next
    `buffer`, -1 from there."""
    if response.tokens is None:
        raise ValueError("length needs the number of tokens of a response; give the row a `tokens` column")
    return -min(max(response.tokens - allowed, 0) / buffer, 1.0)


SCRIPTS = {
    "latin": ("LATIN",),
    "chinese": ("CJK",),
    "japanese": ("HIRAGANA", "KATAKANA", "CJK"),
    "korean": ("HANGUL",),
    "cyrillic": ("CYRILLIC",),
    "arabic": ("ARABIC",),
    "greek": ("GREEK",),
}


def language(response: str, example: Example, *, script: str = "latin", share: float = 0.9) -> float:
    """1.0 where at least `share` of the response's letters are of the script; without letters 1.0.

    Tells scripts apart, not languages that share one.
    """
    if script not in SCRIPTS:
        raise ValueError(f"script ({script}) must be one of {', '.join(SCRIPTS)}")
    letters = [unicodedata.name(char, "") for char in response if char.isalpha()]
    wanted = sum(name.startswith(SCRIPTS[script]) for name in letters)
    return float(wanted >= share * len(letters))


def _squash(text: str, case: bool = False) -> str:
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return text if case else text.casefold()
