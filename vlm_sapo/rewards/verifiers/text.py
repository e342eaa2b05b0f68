"""Verifiers of plain text: equality, edit distance, JSON fields, layout, length and language."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

from vlm_sapo.rewards.verifiers.answers import BadGold, Finding, NoAnswer, fenced_json, find_answer
from vlm_sapo.rewards.verifiers.normalize import plain
from vlm_sapo.rewards.verifiers.number import read_number
from vlm_sapo.types import Example, ResponseText

PLAIN = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
FILLERS = {"a", "an", "the", "is", "are", "was", "were", "it", "it's", "its", "this", "that"}
FILLERS |= {"these", "they", "answer", "final", "about", "approximately", "roughly"}
"""Words that may stand around a short answer in training."""
HEDGES = re.compile(r"\b(?:not|no|nor|neither|never|and|or)\b|n't", re.IGNORECASE)


def golds(example: Example) -> list[str]:
    """The accepted answers: the texts of a JSON list, or the answer itself. Raises BadGold when empty."""
    text = example.answer.strip()
    if text.startswith("["):
        listed = _listed(text)
        if isinstance(listed, list) and listed and all(isinstance(item, str) for item in listed):
            return listed
    if not text:
        raise BadGold("the gold answer is empty")
    return [text]


def readings(answer: str) -> list[str]:
    """The answer as it stands, and without LaTeX's commands around it."""
    bare = plain(answer)
    return [answer] if bare == answer else [answer, bare]


def _listed(text: str) -> Any:
    """The value of a JSON list, or of a Python list in a text, as MMMU stores one."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError):
            continue
    return None


def exact(response: str, example: Example, *, case: bool = False, finding: Finding = "marked") -> float:
    """1.0 where the answer is one of the gold texts, by Unicode form, spaces (in a list all of them) and
    (unless `case`) case."""
    given = [_squash(reading, case) for reading in readings(find_answer(response, finding))]
    wanted = [_squash(gold, case) for gold in golds(example)]
    lists = {_tight(gold) for gold in wanted if gold.startswith("[")}
    return float(any(answer in wanted or _tight(answer) in lists for answer in given))


def _tight(text: str) -> str:
    return re.sub(r"\s+", "", text)


def short(response: str, example: Example, *, finding: Finding = "marked") -> float:
    """1.0 where the answer is one of the gold texts with at most filler words around it, or holds the gold
    number to two decimals and no other number. Numbers count from the last side of an equation; a gold text
    of one letter must stand there in its own case.

    A stated answer may hold any other words and numbers too (MMMU's open questions); in training that would
    reward listing everything."""
    answer = find_answer(response, finding)
    matches = _holds if finding == "stated" else _states
    return float(any(matches(reading, gold) for reading in readings(answer) for gold in golds(example)))


def _holds(answer: str, gold: str) -> bool:
    """Whether the gold text or number stands anywhere in the answer."""
    wanted = read_number(gold, percent=False)
    if wanted is not None:
        numbers = [float(found.replace(",", "")) for found in PLAIN.findall(answer.rpartition("=")[2])]
        return any(round(number, 2) == round(wanted, 2) for number in numbers)
    return _around(answer, gold) is not None


def _states(answer: str, gold: str) -> bool:
    """Whether the answer is the gold text or number and nothing else of weight."""
    wanted = read_number(gold, percent=False)
    if wanted is None:
        around = _around(answer, gold)
        return around is not None and FILLERS.issuperset(word.casefold() for word in around)
    side = answer.rpartition("=")[2]
    given, numbers = read_number(side, percent=False), list(PLAIN.finditer(side))
    if given is None and len(numbers) == 1:
        given = read_number(side[numbers[0].start() :], percent=False)
    if given is None or HEDGES.search(answer):
        return False
    if abs(wanted) < 0.01:
        return abs(given - wanted) <= 0.01 * abs(wanted)
    return round(given, 2) == round(wanted, 2)


def _around(answer: str, gold: str) -> list[str] | None:
    """The words around the gold text in the answer; None where it doesn't stand there."""
    words, wanted = _words(answer), _words(gold)
    if len(gold.strip()) == 1:
        same, sought = words, wanted
    else:
        same, sought = [word.casefold() for word in words], [word.casefold() for word in wanted]
    for start in range(len(same) - len(sought) + 1) if sought else ():
        if same[start : start + len(sought)] == sought:
            return words[:start] + words[start + len(sought) :]
    return None


def _words(text: str) -> list[str]:
    return re.findall(r"[^\s,;:!?()\"'*$]+", unicodedata.normalize("NFKC", text).rstrip("."))


def anls(response: str, example: Example, *, threshold: float = 0.5, finding: Finding = "marked") -> float:
    """Average normalised Levenshtein similarity (Biten et al., 2019): the best over the gold texts of
    1 - distance / longer length, lower-cased and with single spaces; 0 where that distance is `threshold` or
    more."""
    best = 0.0
    for answer in map(_squash, readings(find_answer(response, finding))):
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
    best = 0.0
    for reading in readings(find_answer(response, finding)):
        for gold in golds(example):
            one, other = _squash(reading, case=True), _squash(gold, case=True)
            if unit == "word":
                one, other = one.split(), other.split()
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
    compared without case and doubled spaces, numbers by value. The answer may stand in a code fence; of a
    fence and a mark the last counts."""
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
    try:
        found = json.loads(fenced_json(response) or find_answer(response, finding))
    except (ValueError, RecursionError):
        raise NoAnswer from None
    if not isinstance(found, dict):
        raise NoAnswer
    return found


def _same(given, wanted) -> bool:
    """Equal as JSON: numbers by value, a text and a number by their spelling; true is no number, null no
    text."""
    if given is None or wanted is None or isinstance(given, bool) or isinstance(wanted, bool):
        return given is wanted
    if isinstance(given, str) or isinstance(wanted, str):
        return _squash(str(given)) == _squash(str(wanted))
    if isinstance(given, list) and isinstance(wanted, list):
        return len(given) == len(wanted) and all(map(_same, given, wanted))
    return given == wanted


def format(response: str, example: Example, *, pattern: str = r"<think>.*</think>.*\\boxed\{.*\}.*") -> float:
    """1.0 where the whole response has the layout `pattern` (a regular expression, `.` matching newlines)."""
    return float(re.fullmatch(pattern, response.strip(), re.DOTALL) is not None)


def length(response: ResponseText, example: Example, *, allowed: int, buffer: int) -> float:
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
