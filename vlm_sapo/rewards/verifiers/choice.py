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
from vlm_sapo.rewards.verifiers.math import answers_match
from vlm_sapo.rewards.verifiers.normalize import normalize
from vlm_sapo.rewards.verifiers.number import read_number
from vlm_sapo.types import Example

OPTION_COLUMNS = ("choices", "options", "option")
LETTERED = re.compile(r"^\(?([A-Za-z])\s*(?:[.:)\]]|\)\s*[.:]?)\s*(.*)$", re.DOTALL)
PREFIX = re.compile(
    r"^(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)(?:\s+is)?\s*:?\s*(?=\S)", re.IGNORECASE
)
LETTERS_TOGETHER = re.compile(r"[A-H]{2,8}")
DENIAL = re.compile(r"\b(?:not|wrong|incorrect|false)\b|n't", re.IGNORECASE)
EMPTY_VALUES = {"", "null", "nan", "none"}
LEADING_LETTER = re.compile(r"^(?:option|choice|answer)?\s*\(?([A-Z])\)?(?=[\s.,:;)\]]|$)")
LONGEST_VALUE = 60
BRACKETED = re.compile(r"\(([A-Z])\)")


def choice(response: str, example: Example, *, finding: Finding = "marked") -> float:
    """1.0 where the answer names the gold option or options, by letter, by letter and text, or by text.

    Options come from the row's `choices` or `options`; without them only letters are compared. A response
    that names no option, or a letter with another option's text, has no answer; it is never guessed. A letter
    that is also the text of another option is read as the letter.
    """
    options = read_options(example)
    gold = named_options(example.answer, options)
    if gold is None:
        raise BadGold(f"the gold answer {example.answer!r} is none of the options {options or 'A to Z'}")
    answer = _answered_options(response, options, finding)
    if answer is None:
        raise NoAnswer
    return float(answer == gold)


def read_options(example: Example) -> list[str]:
    """The row's options without their letters; empty where it has none."""
    listed = _as_list(option_column(example.columns)) or _options_in_problem(example.problem)
    texts = [str(option).strip() for option in listed]
    lettered = [LETTERED.match(text) for text in texts]
    in_order = all(
        match and match[1].upper() == letter
        for match, letter in zip(lettered, string.ascii_uppercase, strict=False)
    )
    return [match[2] for match in lettered] if texts and in_order else texts


def _options_in_problem(problem: str) -> list[str]:
    """The options that a problem lists as `(A) one (B) two`; empty unless the letters are in order."""
    marks = list(re.finditer(r"\(([A-Z])\)\s*", problem))
    if len(marks) < 2 or [mark[1] for mark in marks] != list(string.ascii_uppercase[: len(marks)]):
        return []
    ends = [*(mark.start() for mark in marks[1:]), len(problem)]
    options = [problem[mark.end() : end].strip(" \n.;,") for mark, end in zip(marks, ends, strict=True)]
    return options if all(options) else []


def option_column(columns: Mapping[str, Any]) -> list | tuple | str | None:
    """The value of the row's column of options, a list or a text that lists them; None if there is none."""
    values = (columns.get(name) for name in OPTION_COLUMNS)
    return next((value for value in values if _as_list(value)), None)


def _as_list(value: Any) -> list:
    """The options that a column's value lists, as a list or as text; empty where it lists none."""
    if isinstance(value, str):
        if value.strip().casefold() in EMPTY_VALUES:
            return []
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            parts = [part for part in re.split(r";\s*|\n", value) if part.strip()]
            return parts if len(parts) > 1 else []
    if isinstance(value, Mapping) and list(value) == list(string.ascii_uppercase[: len(value)]):
        value = list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def named_options(text: str, options: Sequence[str]) -> frozenset[int] | None:
    """Indices of the options that a short text names, and nothing else; None where it names none."""
    keys = [_key(option) for option in options]
    letter = re.fullmatch(r"\(?([A-Z])\)?", text.strip())
    if _key(text) in keys and not (letter and _in_range({_index(letter[1])}, options)):
        return frozenset({keys.index(_key(text))})
    text = re.sub(r"[\"'`*{}\[\]]", "", normalize(text, "latex")).strip(" .?")
    text = PREFIX.sub("", text)
    if LETTERS_TOGETHER.fullmatch(text) and list(text) == sorted(set(text)):
        text = ",".join(text)
    letters = re.fullmatch(r"\(?([A-Za-z])\)?(?:(?:\s*(?:,|;|&|and)\s*|\s+)\(?([A-Za-z])\)?)*", text)
    if letters and all(len(word) == 1 for word in re.findall(r"[A-Za-z]+", text.replace("and", " "))):
        return _in_range({_index(c) for c in re.findall("[A-Za-z]", text.replace("and", ""))}, options)
    # spaces and punctuation between letter and text may be lost, as in `bfe\frac{1}{8}`
    lettered_options = [
        normalize(f"{letter} {option}", "letters")
        for letter, option in zip(string.ascii_lowercase, options, strict=False)
    ]
    if (letters_only := normalize(text, "letters")) in lettered_options:
        return frozenset({lettered_options.index(letters_only)})
    if (match := LETTERED.match(text)) and match[2]:
        index = _index(match[1])
        if not options or (index < len(options) and not _contradicts(match[2], options, index)):
            return frozenset({index})
    return _option_of_equal_value(text, options)


def _option_of_equal_value(text: str, options: Sequence[str]) -> frozenset[int] | None:
    """The one option with the text's mathematical value; None where none or several have it."""
    if (
        len(text) > LONGEST_VALUE
        or not re.search(r"\d|\\", text)
        or len(options) > len(string.ascii_uppercase)
    ):
        return None
    equal = set()
    for index, option in enumerate(options):
        try:
            if answers_match(text.replace(":", "/"), option.replace(":", "/")):
                equal.add(index)
        except BadGold:
            continue
    return frozenset(equal) if len(equal) == 1 else None


def _agrees(text: str, options: Sequence[str], index: int) -> bool:
    """Whether the text after a letter isn't another option's, and no other number than its own option's."""
    keys = [_key(option) for option in options]
    if _key(text) in keys:
        return keys.index(_key(text)) == index
    stated, own = read_number(text), read_number(options[index])
    return stated is None or own is None or stated == own


def _contradicts(rest: str, options: Sequence[str], index: int) -> bool:
    """Whether what follows a letter names another option, by its letter or its text, or denies."""
    others = string.ascii_uppercase[: len(options) or None].replace(string.ascii_uppercase[index], "")
    rest = rest.strip(" .,:;)-\"'`*}]")
    if re.search(rf"(?<![A-Za-z])[{others}](?![A-Za-z'])", rest) or DENIAL.search(rest):
        return True
    mentioned = _mentioned_option(rest, options)
    return bool(options) and not (_agrees(rest, options, index) and mentioned in (None, frozenset({index})))


def _answered_options(response: str, options: list[str], finding: Finding) -> frozenset[int] | None:
    if (marked := marked_answer(response)) is not None:
        return named_options(marked, options) or _leading_option(marked, options, alone=True)
    if finding == "marked":
        return None
    whole = response.strip()[-TAIL:]
    if (named := named_options(whole, options)) is not None:
        return named
    last_line = whole.splitlines()[-1] if whole else ""
    letters = set(BRACKETED.findall(last_line))
    concluded = _in_range({_index(*letters)}, options) if len(letters) == 1 else None
    stated = stated_answer(whole)
    if stated is not None and stated != whole and (stated in last_line or concluded is None):
        named = (
            named_options(stated, options)
            or _leading_option(stated, options)
            or _mentioned_option(stated, options)
        )
        if named is not None:
            return named
    return concluded or _leading_option(whole, options) or _mentioned_option(last_line, options)


def _leading_option(text: str, options: list[str], *, alone: bool = False) -> frozenset[int] | None:
    """The option whose letter opens the text: `C. 40`, `(C) because ...`; a sentence's `A` doesn't count.
    With `alone`, None where the rest speaks of another option."""
    text = normalize(text, "latex").lstrip(" *:{[\"'`")
    match = LEADING_LETTER.match(text)
    if not match:
        bracketed = re.match(r"^\W*\(([A-Z])\)", text)
        return _in_range({_index(bracketed[1])}, options) if bracketed else None
    rest = text[match.end() :]
    if match[1] in "AI" and re.match(r"^\s+[a-z]", rest) and "(" not in match[0]:
        return None
    index = _index(match[1])
    if (options and index >= len(options)) or (alone and _contradicts(rest, options, index)):
        return None
    letters = {match[1], *re.findall(r"^(?:\s*(?:,|and|&)\s*\(?([A-Z])\)?)(?![a-zA-Z])", rest)}
    return _in_range({_index(letter) for letter in letters}, options)


def _mentioned_option(text: str, options: Sequence[str]) -> frozenset[int] | None:
    """The one option whose words the text contains; None where it contains none or several. Longer options
    are looked for first and removed, so that one inside another doesn't count twice."""
    text = " " + normalize(text, "words") + " "
    mentioned = set()
    for _, index in sorted((-len(option), index) for index, option in enumerate(options)):
        words = normalize(options[index], "words")
        if words and f" {words} " in text:
            mentioned.add(index)
            text = text.replace(f" {words} ", "  ")
    return frozenset(mentioned) if len(mentioned) == 1 else None


def _in_range(indices: set[int], options: Sequence[str]) -> frozenset[int] | None:
    """The indices; None where one is beyond the row's options."""
    return frozenset(indices) if not options or max(indices) < len(options) else None


def _index(letter: str) -> int:
    return string.ascii_lowercase.index(letter.lower())


def _key(text: str) -> str:
    """What of an option or an answer is compared: no spaces, no punctuation around it, no upper case."""
    return normalize(text, "compact").strip(".,;:()*\"'")
