"""Verifiers of plain text: equality, edit distance, JSON fields, length and language."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any, Literal

from rapidfuzz.distance import Levenshtein

from vlm_sapo.rewards.verifiers.answers import (
    BadGold,
    Finding,
    NoAnswer,
    fenced_json,
    find_answer,
    reads_answers,
)
from vlm_sapo.rewards.verifiers.lists import parse_list
from vlm_sapo.rewards.verifiers.normalize import Level, normalize
from vlm_sapo.rewards.verifiers.number import read_number
from vlm_sapo.types import Example, ResponseText

PLAIN_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
FILLERS = {"a", "an", "the", "is", "are", "was", "were", "it", "it's", "its", "this", "that"}
FILLERS |= {"these", "they", "answer", "final", "about", "approximately", "roughly"}
"""Words that are allowed around a short answer in training."""
HEDGES = re.compile(r"\b(?:not|no|nor|neither|never|and|or)\b|n't", re.IGNORECASE)


def gold_texts(example: Example) -> list[str]:
    """The accepted answers: the texts of a JSON list, or the answer itself. Raises BadGold when empty."""
    text = example.answer.strip()
    items = parse_list(text)
    if items and all(isinstance(item, str) for item in items):
        return items
    if not text:
        raise BadGold("the gold answer is empty")
    return [text]


def readings(answer: str) -> list[str]:
    """The answer as it was written, and without LaTeX's commands around it."""
    bare = normalize(answer, "latex")
    return [answer] if bare == answer else [answer, bare]


@reads_answers
def exact(response: str, example: Example, *, case: bool = False, finding: Finding = "marked") -> float:
    """1.0 where the answer is one of the gold texts, by Unicode form, spaces (in a list all of them) and
    (unless `case`) case; a full stop at the end and quotation marks around it don't count."""
    level: Level = "text" if case else "folded"
    answers = {undressed(normalize(reading, level)) for reading in readings(find_answer(response, finding))}
    golds = {undressed(normalize(gold, level)) for gold in gold_texts(example)}
    gold_lists = {gold.replace(" ", "") for gold in golds if gold.startswith("[")}
    return float(any(answer in golds or answer.replace(" ", "") in gold_lists for answer in answers))


def undressed(text: str) -> str:
    """A text without the full stop that ends it as a sentence, and without quotation marks around it."""
    text = text.removesuffix(".")
    quoted = re.fullmatch(r"([\"'“‘])([^\"'“”‘’]+)[\"'”’]", text)
    return quoted[2] if quoted else text


@reads_answers
def short(response: str, example: Example, *, finding: Finding = "marked") -> float:
    """1.0 where the answer is one of the gold texts with at most filler words around it, or contains the gold
    number to two decimals and no other number. Numbers count from the last side of an equation; a gold text
    of one letter must appear in its own case.

    A stated answer may contain other words and numbers too (MMMU's open questions); in training that would
    reward listing everything."""
    answer = find_answer(response, finding)
    matches = _contains if finding == "stated" else _states
    return float(any(matches(reading, gold) for reading in readings(answer) for gold in gold_texts(example)))


def _contains(answer: str, gold: str) -> bool:
    """Whether the gold text or number is anywhere in the answer."""
    gold_number = read_number(gold, percent=False)
    if gold_number is not None:
        numbers = [
            float(digits.replace(",", "")) for digits in PLAIN_NUMBER.findall(answer.rpartition("=")[2])
        ]
        return any(round(number, 2) == round(gold_number, 2) for number in numbers)
    return _words_around(answer, gold) is not None


def _states(answer: str, gold: str) -> bool:
    """Whether the answer is the gold text or number and nothing else of weight."""
    gold_number = read_number(gold, percent=False)
    if gold_number is None:
        around = _words_around(answer, gold)
        return around is not None and FILLERS.issuperset(word.casefold() for word in around)
    side = answer.rpartition("=")[2]
    number, matches = read_number(side, percent=False), list(PLAIN_NUMBER.finditer(side))
    if number is None and len(matches) == 1:
        number = read_number(side[matches[0].start() :], percent=False)
    if number is None or HEDGES.search(answer):
        return False
    if abs(gold_number) < 0.01:
        return abs(number - gold_number) <= 0.01 * abs(gold_number)
    return round(number, 2) == round(gold_number, 2)


def _words_around(answer: str, gold: str) -> list[str] | None:
    """The words around the gold text in the answer; None where the answer doesn't contain it."""
    words, gold_words = _split_words(answer), _split_words(gold)
    compared = words
    if len(gold.strip()) > 1:
        compared, gold_words = ([word.casefold() for word in side] for side in (words, gold_words))
    for start in range(len(compared) - len(gold_words) + 1) if gold_words else ():
        if compared[start : start + len(gold_words)] == gold_words:
            return words[:start] + words[start + len(gold_words) :]
    return None


def _split_words(text: str) -> list[str]:
    """Full stops inside stay: `U.S` and `3.5` are one word."""
    return re.findall(r"[^\s,;:!?()\"'*$]+", normalize(text, "unicode").rstrip("."))


@reads_answers
def anls(response: str, example: Example, *, threshold: float = 0.5, finding: Finding = "marked") -> float:
    """Average normalised Levenshtein similarity (Biten et al., 2019): the best over the gold texts of
    1 - distance / longer length, lower-cased and with single spaces; 0 where that distance is `threshold` or
    more."""
    best = 0.0
    for answer in readings(find_answer(response, finding)):
        for gold in gold_texts(example):
            distance = Levenshtein.normalized_distance(normalize(answer, "folded"), normalize(gold, "folded"))
            best = max(best, 1.0 - distance if distance < threshold else 0.0)
    return best


@reads_answers
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
        for gold in gold_texts(example):
            answer_units, gold_units = normalize(reading, "text"), normalize(gold, "text")
            if unit == "word":
                answer_units, gold_units = answer_units.split(), gold_units.split()
            if not gold_units:
                raise BadGold(f"the gold answer {gold!r} is empty")
            best = max(best, 1 - Levenshtein.distance(answer_units, gold_units) / len(gold_units))
    return best


@reads_answers
def json_fields(response: str, example: Example, *, finding: Finding = "marked") -> float:
    """The share of the gold JSON object's fields that the answer's object has with the same value; texts are
    compared without case and doubled spaces, numbers by value. The answer may be in a code fence; of a
    fence and a mark the last counts."""
    try:
        gold = json.loads(example.answer)
    except ValueError as error:
        raise BadGold(f"the gold answer must be a JSON object; {error}") from error
    if not isinstance(gold, dict) or not gold:
        raise BadGold("the gold answer must be a JSON object with at least one field")
    answer = _json_object(response, finding)
    correct = sum(name in answer and _values_match(answer[name], value) for name, value in gold.items())
    return correct / len(gold)


def _json_object(response: str, finding: Finding) -> dict:
    try:
        value = json.loads(fenced_json(response) or find_answer(response, finding))
    except (ValueError, RecursionError):
        raise NoAnswer from None
    if not isinstance(value, dict):
        raise NoAnswer
    return value


def _values_match(value: Any, gold: Any) -> bool:
    """Equal as JSON: numbers by value, a text and a number by their spelling; true is no number, null no
    text."""
    if value is None or gold is None or isinstance(value, bool) or isinstance(gold, bool):
        return value is gold
    if isinstance(value, str) or isinstance(gold, str):
        return normalize(str(value), "folded") == normalize(str(gold), "folded")
    if isinstance(value, list) and isinstance(gold, list):
        return len(value) == len(gold) and all(map(_values_match, value, gold))
    return value == gold


def length(response: ResponseText, example: Example, *, allowed: int, buffer: int) -> float:
    """Soft overlong penalty (DAPO, arXiv 2503.14476): 0 up to `allowed` tokens, falling to -1 over the next
    `buffer`, -1 from there."""
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

    Distinguishes scripts, not languages that share one.
    """
    if script not in SCRIPTS:
        raise ValueError(f"script ({script}) must be one of {', '.join(SCRIPTS)}")
    letters = [unicodedata.name(char, "") for char in response if char.isalpha()]
    in_script = sum(name.startswith(SCRIPTS[script]) for name in letters)
    return float(in_script >= share * len(letters))
