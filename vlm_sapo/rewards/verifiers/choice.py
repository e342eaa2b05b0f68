"""The verifier of multiple-choice answers."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from functools import lru_cache
from textwrap import shorten

from vlm_sapo.rewards.verifiers.answers import (
    TAIL,
    BadGold,
    Finding,
    NoAnswer,
    gold_answer,
    marked_answer,
    reads_answers,
    stated_answer,
)
from vlm_sapo.rewards.verifiers.math import answers_match
from vlm_sapo.rewards.verifiers.normalize import normalize
from vlm_sapo.rewards.verifiers.number import read_number
from vlm_sapo.rewards.verifiers.options import (
    FEWEST_WITHOUT_GOLD,
    LETTERED,
    WIDE,
    column_options,
    options_in_text,
)
from vlm_sapo.types import Example

PREFIX = re.compile(
    r"^(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)(?:\s+is)?"
    r"|(?:正[确確])?(?:答案|[选選][项項])(?:是|为|為|选|選)?|[故应應]?[选選][择擇]?)\s*:?\s*(?=\S)",
    re.IGNORECASE,
)
LIST_SEPARATOR = r"(?:,|;|&|、|(?<![A-Za-z])and(?![A-Za-z])|[和与及])"
LETTERS = re.compile(rf"\(?[A-Za-z]\)?(?:\s*(?:{LIST_SEPARATOR}|/|\s)\s*\(?[A-Za-z]\)?)*")
LETTERS_TOGETHER = re.compile(r"[A-H]{2,8}")
DENIAL = re.compile(r"^\W*or\b|\b(?:not|wrong|incorrect|false)\b|n't|[不错錯或]", re.IGNORECASE)
ARTICLE = re.compile(
    r"[AI]\s+(?!(?:is|was|are|am|and|or|nor|but|not|also|because|has|does|can|could|may|might|must|should"
    r"|would|fits|looks|matches|seems|appears|works)\b)[a-z]"
)
"""`A` or `I` before a word, as a sentence's first."""
LEADING_LETTER = re.compile(
    r"^(?i:option|choice|answer|[选選][项項])?\s*\(?([A-Z])\)?(?=[\s.,:;)\]]|[\u3001-\u9fff]|$)"
)
DENIED = re.compile(
    r"\W*(?:is|was|can|does)?\s*(?:n't|not\b|wrong|incorrect|false)|\W*是?(?:不|错|錯)", re.IGNORECASE
)
"""What makes a letter in front of it no answer."""
DENYING = re.compile(
    r"(?:\b(?:not|cannot|never|no|neither|nor|except|but|without|eliminat\w+|exclud\w+|reject\w*|rul\w+\s+out)\b"
    r"|n't\b|[不非]|排除|除了)[^.,;:!?。，；]{0,40}$",
    re.IGNORECASE,
)
"""What makes a letter or words behind it, in the same clause, no answer."""
BARE_LETTER = re.compile(r"\W?[A-J]\W?")
LONGEST_VALUE, LONGEST_LIST = 60, 200
"""Characters of a text that may be an option's value, or a list of options."""
LIST_ITEM = re.compile(r"\s*(?:\d+[.)]|[-*•])\s")
BRACKETED = re.compile(r"\(([A-Z])\)")


@reads_answers
def choice(response: str, example: Example, *, finding: Finding = "marked") -> float:
    """1.0 where the answer names the gold option or options, by letter, by letter and text, by text, or by
    value.

    Options come from the row's columns, else from its problem; without any only letters are compared. A
    response that names no option, or a letter with another option's text, has no answer; it is never guessed.
    A letter that is also the text of another option is read as the letter.
    """
    options = read_options(example)
    gold = gold_options(example)
    answer = _answered_options(response, options, finding)
    if answer is None:
        raise NoAnswer
    return float(answer == gold)


def column_texts(example: Example) -> list[str]:
    """The options in the row's columns, or an empty list. Raises BadGold for options that are no texts."""
    try:
        return list(column_options(example.columns, example.answer).texts)
    except ValueError as error:
        raise BadGold(str(error)) from error


def read_options(example: Example) -> list[str]:
    """The row's options without their letters, from its columns, else from its problem; empty where it has
    none. Two in a problem count only where the gold answer names one."""
    if options := column_texts(example):
        return options
    listed = options_in_text(example.problem)
    counts = len(listed) >= FEWEST_WITHOUT_GOLD or (listed and _gold_names(example.answer, listed))
    return list(listed) if counts else []


def is_multiple_choice(example: Example) -> bool:
    """Whether a row has options in its columns, or in its problem with a gold answer that is a letter or
    names one of them."""
    if column_texts(example):
        return True
    options = tuple(read_options(example))
    letter = BARE_LETTER.fullmatch(gold_answer(example.answer).strip())
    return bool(options) and (letter or _gold_names(example.answer, options)) is not None


def gold_options(example: Example) -> frozenset[int]:
    """Indices of the options that the gold answer names, by letter, text, value, the row's own label, or
    index from 0. Raises BadGold where it names none of the row's."""
    options = read_options(example)
    answer = example.answer.strip()
    if named := _gold_names(column_options(example.columns, answer).letter(answer) or answer, tuple(options)):
        return named
    text = repr(shorten(answer, 80))
    if not options:
        raise BadGold(f"the gold answer {text} must name a letter A to Z where the row has no options")
    last = string.ascii_uppercase[len(options) - 1]
    listed = shorten(", ".join(options), 120, placeholder=" ...")
    raise BadGold(f"the gold answer {text} is none of the options A to {last}: {listed}; mend the row")


@lru_cache(maxsize=4096)
def _gold_names(answer: str, options: tuple[str, ...]) -> frozenset[int] | None:
    """Indices of the options that a gold answer or a JSON list of them names; None where it names none."""
    answer = gold_answer(answer)
    if (named := named_options(answer, options)) is not None or not answer.startswith("["):
        return named
    try:
        items = [named_options(str(item), options) for item in json.loads(answer)]
    except ValueError:
        return None
    return frozenset().union(*items) if items and all(items) else None


def named_options(text: str, options: Sequence[str]) -> frozenset[int] | None:
    """Indices of the options that a short text names, and nothing else; None where it names none."""
    if (named := _named_in_words(text, options)) is not None:
        return named
    text = _undressed(text)
    if not _is_lettered(text, options) and (named := _option_of_equal_value(text, options)):
        return named
    parts = re.split(LIST_SEPARATOR, text) if len(text) <= LONGEST_LIST else []
    if not 1 < len(parts) <= len(options):
        return None
    items = [_named_in_words(part, options) if part.strip() else None for part in parts]
    bare = {re.fullmatch(r"\W*[A-Za-z]\W*", part, re.ASCII) is not None for part in parts}
    return frozenset().union(*items) if all(items) and len(bare) == 1 else None  # no letter beside a text


def _named_in_words(text: str, options: Sequence[str]) -> frozenset[int] | None:
    """The options that a text names by letters, by one letter with its text, or by one text."""
    keys = [_key(option) for option in options]
    letter = re.fullmatch(r"\(?([A-Z])\)?", text.translate(WIDE).strip())
    if _key(text) in keys and not (letter and _in_range({_index(letter[1])}, options)):
        return frozenset({keys.index(_key(text))})
    text = _undressed(text)
    lettered = LETTERED.fullmatch(text)
    named = lettered and lettered[2] and _in_range({_index(lettered[1])}, options)
    if named and not (options and _contradicts(lettered[2], options, *named)):
        return named
    if LETTERS_TOGETHER.fullmatch(text) and list(text) == sorted(set(text)):
        text = ",".join(text)
    if LETTERS.fullmatch(text):
        return _in_range({_index(c) for c in re.findall("[A-Za-z]", text.replace("and", ""))}, options)
    # spaces and punctuation between letter and text may be lost, as in `bfe\frac{1}{8}`
    lettered_options = [
        normalize(f"{letter} {option}", "letters")
        for letter, option in zip(string.ascii_lowercase, options, strict=False)
    ]
    letters_only = normalize(text, "letters")
    return frozenset({lettered_options.index(letters_only)}) if letters_only in lettered_options else None


def _undressed(text: str) -> str:
    """A text without LaTeX, quotes, brackets, full-width signs and `the answer is` around it."""
    text = normalize(text.translate(WIDE), "latex")
    return PREFIX.sub("", re.sub(r"[\"'`*{}\[\]]", "", text).strip(" .?。"))


def _is_lettered(text: str, options: Sequence[str]) -> bool:
    """Whether a text has the letter of an option in front of other words."""
    match = LETTERED.fullmatch(text)
    return match is not None and bool(match[2]) and _index(match[1]) < len(options)


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


def _contradicts(rest: str, options: Sequence[str], index: int) -> bool:
    """Whether what follows a letter names another option, by its letter or its text, or denies. The option's
    own words, and the letters in them, never do."""
    rest = rest.strip(" .,:;)-\"'`*}]。、")
    letters = set(string.ascii_uppercase[: len(options) or None]) - {string.ascii_uppercase[index]}
    if not options:
        return bool(_letters_in(rest) & letters) or DENIAL.search(rest) is not None
    keys, own = [_key(option) for option in options], options[index]
    if _key(rest) == keys[index]:
        return False
    number, own_number = read_number(rest), read_number(own)
    if _key(rest) in keys or not (number is None or own_number is None or number == own_number):
        return True
    mentioned = _mentioned_options(rest, options)
    if mentioned and index not in mentioned:
        return True
    others = re.sub(re.escape(own), " ", rest, flags=re.IGNORECASE)
    named = bool(_letters_in(others) & letters) and _letters_in(rest) != _letters_in(own)
    return named or DENIAL.search(others) is not None


def _letters_in(text: str) -> set[str]:
    """The capitals that stand alone in a text, without the article that it may begin with."""
    text = text.strip()[1:] if ARTICLE.match(text.strip()) else text
    return set(re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z'])", text))


def _answered_options(response: str, options: list[str], finding: Finding) -> frozenset[int] | None:
    marked = marked_answer(response)
    stated = stated_answer(response) if finding == "stated" else marked
    if marked is not None:
        later = None if stated == marked else _stated_option(stated, options)
        return later or named_options(marked, options) or _leading_option(marked, options, alone=True)
    if finding == "marked":
        return None
    whole = response.strip()[-TAIL:]
    last_line = whole.splitlines()[-1] if whole else ""
    letters = {mark[1] for mark in BRACKETED.finditer(last_line) if not _is_denied(last_line, *mark.span())}
    concluded = _in_range({_index(*letters)}, options) if len(letters) == 1 else None
    stated_last = stated is not None and stated != whole and (stated in last_line or concluded is None)
    if stated_last and (named := _stated_option(stated, options)) is not None:
        return named
    if (named := named_options(whole, options)) is not None:
        return named
    if last_line != whole and LIST_ITEM.match(last_line):  # the end of a list of options, not of a thought
        return concluded or _leading_option(whole, options)
    return concluded or _leading_option(whole, options) or _mentioned_option(last_line, options)


def _stated_option(text: str, options: list[str]) -> frozenset[int] | None:
    return named_options(text, options) or _leading_option(text, options) or _mentioned_option(text, options)


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
    if (
        (options and index >= len(options))
        or DENIED.match(rest)
        or (alone and _contradicts(rest, options, index))
    ):
        return None
    letters = {match[1], *re.findall(r"^(?:\s*(?:,|and|&)\s*\(?([A-Z])\)?)(?![a-zA-Z])", rest)}
    return _in_range({_index(letter) for letter in letters}, options)


def _mentioned_option(text: str, options: Sequence[str]) -> frozenset[int] | None:
    """The one option whose words the text contains; None where it contains none or several, or denies it."""
    mentioned = _mentioned_options(text, options)
    if len(mentioned) != 1:
        return None
    (index,) = mentioned
    start = text.casefold().rfind(options[index].casefold())
    denied = start >= 0 and _is_denied(text, start, start + len(options[index]))
    return None if denied else frozenset(mentioned)


def _is_denied(text: str, start: int, end: int) -> bool:
    """Whether a text denies what stands in it from `start` to `end`."""
    return bool(DENYING.search(text[max(start - 80, 0) : start]) or DENIED.match(text[end:]))


def _mentioned_options(text: str, options: Sequence[str]) -> set[int]:
    """The options whose words the text contains. Longer ones are looked for first and removed, so that one
    inside another doesn't count twice."""
    text = " " + normalize(text, "words") + " "
    mentioned = set()
    for _, index in sorted((-len(option), index) for index, option in enumerate(options)):
        words = normalize(options[index], "words")
        if words and f" {words} " in text:
            mentioned.add(index)
            text = text.replace(f" {words} ", "  ")
    return mentioned


def _in_range(indices: set[int], options: Sequence[str]) -> frozenset[int] | None:
    """The indices; None where one is beyond the row's options."""
    return frozenset(indices) if not options or max(indices) < len(options) else None


def _index(letter: str) -> int:
    return string.ascii_lowercase.index(letter.lower())


def _key(text: str) -> str:
    """What of an option or an answer is compared: no spaces, no punctuation around it, no upper case."""
    return normalize(text.translate(WIDE), "compact").strip(".,;:()*\"'。")
