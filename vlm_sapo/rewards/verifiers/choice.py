"""The verifier of multiple-choice answers."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_sapo.rewards.verifiers.answers import (
    TAIL,
    BadGold,
    Finding,
    NoAnswer,
    marked_answer,
    stated_answer,
)
from vlm_sapo.rewards.verifiers.math import equal
from vlm_sapo.rewards.verifiers.normalize import plain
from vlm_sapo.rewards.verifiers.number import read_number
from vlm_sapo.types import Example

OPTION_COLUMNS = ("choices", "options", "option")
LETTERED = re.compile(r"^\(?([A-Za-z])\s*(?:[.:)\]]|\)\s*[.:]?)\s*(.*)$", re.DOTALL)
PREFIX = re.compile(
    r"^(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)(?:\s+is)?\s*:?\s*(?=\S)", re.IGNORECASE
)
SEVERAL = re.compile(r"[A-H]{2,8}")
DENIED = re.compile(r"\b(?:not|wrong|incorrect|false)\b|n't", re.IGNORECASE)
NOTHING = {"", "null", "nan", "none"}
LEADING = re.compile(r"^(?:option|choice|answer)?\s*\(?([A-Z])\)?(?=[\s.,:;)\]]|$)")
LONGEST_VALUE = 60
BRACKETED = re.compile(r"\(([A-Z])\)")


def choice(response: str, example: Example, *, finding: Finding = "marked") -> float:
    """1.0 where the answer names the gold option or options, by letter, by letter and text, or by text.

    Options come from the row's `choices` or `options`; without them only letters are compared. A response
    that names no option, or a letter with another option's text, has no answer; it is never guessed. A letter
    that is also the text of another option is read as the letter.
    """
    given = options(example)
    gold = named(example.answer, given)
    if gold is None:
        raise BadGold(f"the gold answer {example.answer!r} is none of the options {given or 'A to Z'}")
    chosen = _chosen(response, given, finding)
    if chosen is None:
        raise NoAnswer
    return float(chosen == gold)


def options(example: Example) -> list[str]:
    """The row's options without their letters; empty where it has none."""
    found = _listed(option_column(example.columns)) or _in_problem(example.problem)
    texts = [str(option).strip() for option in found]
    lettered = [LETTERED.match(text) for text in texts]
    in_order = all(
        match and match[1].upper() == letter
        for match, letter in zip(lettered, string.ascii_uppercase, strict=False)
    )
    return [match[2] for match in lettered] if texts and in_order else texts


def _in_problem(problem: str) -> list[str]:
    """The options that a problem lists as `(A) one (B) two`; empty unless the letters are in order."""
    marks = list(re.finditer(r"\(([A-Z])\)\s*", problem))
    if len(marks) < 2 or [mark[1] for mark in marks] != list(string.ascii_uppercase[: len(marks)]):
        return []
    ends = [*(mark.start() for mark in marks[1:]), len(problem)]
    found = [problem[mark.end() : end].strip(" \n.;,") for mark, end in zip(marks, ends, strict=True)]
    return found if all(found) else []


def option_column(columns: Mapping[str, Any]) -> list | tuple | str | None:
    """What the row holds as options: a list, or a text that lists them; None where it holds none."""
    held = (columns.get(name) for name in OPTION_COLUMNS)
    return next((value for value in held if _listed(value)), None)


def _listed(value: Any) -> list:
    """The options that a column's value lists, as a list or as text; empty where it lists none."""
    if isinstance(value, str):
        if value.strip().casefold() in NOTHING:
            return []
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            parts = [part for part in re.split(r";\s*|\n", value) if part.strip()]
            return parts if len(parts) > 1 else []
    if isinstance(value, Mapping) and list(value) == list(string.ascii_uppercase[: len(value)]):
        value = list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def named(text: str, given: Sequence[str]) -> frozenset[int] | None:
    """Indices of the options that a short text names, and nothing else; None where it names none."""
    plainly = [_key(option) for option in given]
    own = re.fullmatch(r"\(?([A-Z])\)?", text.strip())
    if _key(text) in plainly and not (own and _within({string.ascii_uppercase.index(own[1])}, given)):
        return frozenset({plainly.index(_key(text))})
    text = re.sub(r"[\"'`*{}\[\]]", "", plain(text)).strip(" .?")
    text = PREFIX.sub("", text)
    if SEVERAL.fullmatch(text) and list(text) == sorted(set(text)):
        text = ",".join(text)
    letters = re.fullmatch(r"\(?([A-Za-z])\)?(?:(?:\s*(?:,|;|&|and)\s*|\s+)\(?([A-Za-z])\)?)*", text)
    if letters and all(len(word) == 1 for word in re.findall(r"[A-Za-z]+", text.replace("and", " "))):
        found = [
            string.ascii_lowercase.index(c) for c in re.findall("[a-z]", text.replace("and", "").lower())
        ]
        return frozenset(found) if not given or max(found) < len(given) else None
    squeezed = _letters_and_digits(text)
    both = [
        _letters_and_digits(f"{letter} {option}")
        for letter, option in zip(string.ascii_lowercase, given, strict=False)
    ]
    if squeezed in both:
        return frozenset({both.index(squeezed)})
    if (match := LETTERED.match(text)) and match[2]:
        index = string.ascii_lowercase.index(match[1].lower())
        if not given or (index < len(given) and not _contradicts(match[2], given, index)):
            return frozenset({index})
    return _of_value(text, given)


def _of_value(text: str, given: Sequence[str]) -> frozenset[int] | None:
    """The one option with the text's mathematical value; None where none or several have it."""
    if len(text) > LONGEST_VALUE or not re.search(r"\d|\\", text) or len(given) > len(string.ascii_uppercase):
        return None
    found = set()
    for index, option in enumerate(given):
        try:
            if equal(text.replace(":", "/"), option.replace(":", "/")):
                found.add(index)
        except BadGold:
            continue
    return frozenset(found) if len(found) == 1 else None


def _agrees(text: str, given: Sequence[str], index: int) -> bool:
    """Whether the text behind a letter isn't another option's, and no other number than its own option's."""
    plainly = [_key(option) for option in given]
    if _key(text) in plainly:
        return plainly.index(_key(text)) == index
    stated, own = read_number(text), read_number(given[index])
    return stated is None or own is None or stated == own


def _contradicts(rest: str, given: Sequence[str], index: int) -> bool:
    """Whether what follows a letter names another option, by its letter or its text, or denies."""
    others = string.ascii_uppercase[: len(given) or None].replace(string.ascii_uppercase[index], "")
    rest = rest.strip(" .,:;)-\"'`*}]")
    if re.search(rf"(?<![A-Za-z])[{others}](?![A-Za-z'])", rest) or DENIED.search(rest):
        return True
    mentioned = _mentioned(rest, given)
    return bool(given) and not (_agrees(rest, given, index) and mentioned in (None, frozenset({index})))


def _chosen(response: str, given: list[str], finding: Finding) -> frozenset[int] | None:
    if (marked := marked_answer(response)) is not None:
        return named(marked, given) or _leading(marked, given, alone=True)
    if finding == "marked":
        return None
    whole = response.strip()[-TAIL:]
    if (chosen := named(whole, given)) is not None:
        return chosen
    last = whole.splitlines()[-1] if whole else ""
    letters = set(BRACKETED.findall(last))
    concluded = _within({string.ascii_uppercase.index(*letters)}, given) if len(letters) == 1 else None
    stated = stated_answer(whole)
    if stated is not None and stated != whole and (stated in last or concluded is None):
        found = named(stated, given) or _leading(stated, given) or _mentioned(stated, given)
        if found is not None:
            return found
    return concluded or _leading(whole, given) or _mentioned(last, given)


def _leading(text: str, given: list[str], *, alone: bool = False) -> frozenset[int] | None:
    """The option whose letter opens the text: `C. 40`, `(C) because ...`; a sentence's `A` doesn't count.
    With `alone`, None where the rest speaks of another option."""
    text = plain(text).lstrip(" *:{[\"'`")
    match = LEADING.match(text)
    if not match:
        bracketed = re.match(r"^\W*\(([A-Z])\)", text)
        return _within({string.ascii_uppercase.index(bracketed[1])}, given) if bracketed else None
    rest = text[match.end() :]
    if match[1] in "AI" and re.match(r"^\s+[a-z]", rest) and "(" not in match[0]:
        return None
    index = string.ascii_uppercase.index(match[1])
    if (given and index >= len(given)) or (alone and _contradicts(rest, given, index)):
        return None
    letters = {match[1], *re.findall(r"^(?:\s*(?:,|and|&)\s*\(?([A-Z])\)?)(?![a-zA-Z])", rest)}
    return _within({string.ascii_uppercase.index(letter) for letter in letters}, given)


def _mentioned(text: str, given: Sequence[str]) -> frozenset[int] | None:
    """The one option whose text stands in the text; None where none or several do. Longer options are looked
    for first and taken out, so that one inside another doesn't count twice."""
    text = f" {_words(text)} "
    found = set()
    for index in sorted(range(len(given)), key=lambda index: -len(given[index])):
        words = f" {_words(given[index])} "
        if words.strip() and words in text:
            found.add(index)
            text = text.replace(words, "  ")
    return frozenset(found) if len(found) == 1 else None


def _within(found: set[int], given: list[str]) -> frozenset[int] | None:
    return frozenset(found) if not given or max(found) < len(given) else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\s.,:;!?()\"'*$]+(?:[.,]\d+)*", plain(text).casefold()))


def _letters_and_digits(text: str) -> str:
    """For answers whose spaces and marks were lost on the way, such as `bfe\\frac{1}{8}`."""
    return re.sub(r"mathrm|mathbf|textbf|text|quad|bf|\W", "", plain(text).casefold())


def _key(text: str) -> str:
    return re.sub(r"\s+", "", plain(text)).strip(".,;:()*\"'").casefold()
