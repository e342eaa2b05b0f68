"""The options of a multiple-choice row: read from its columns or its problem, and put before the model."""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

from vlm_sapo.rewards.verifiers.answers import gold_answer
from vlm_sapo.rewards.verifiers.normalize import normalize
from vlm_sapo.rewards.verifiers.number import read_number

OPTION_COLUMNS = ("choices", "options", "option", "multi-choice options")
LETTER_COLUMN = re.compile(r"(?i:options?|choices?)[ _]?([A-Za-z])|([A-Z])")
IMAGE_OPTIONS_COLUMN = "options_in_image"
"""A column that is true where the image shows the options, so that the prompt doesn't repeat them."""
EMPTY_VALUES = {"", "null", "nan", "none"}
NAMES, TEXTS = ("label", "key", "id"), ("text", "content", "value")
"""Keys of an option that is an object, and of an object that holds all options."""
IMAGE_FILE = re.compile(r"\S+\.(?:png|jpe?g|webp|gif|bmp)", re.IGNORECASE)
LONGEST_WORD = 2000
"""Characters of an option without a space; a longer one is an image in base64."""

WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {ord("【"): "[", ord("】"): "]"}
LETTERED = re.compile(r"[(\[]?([A-Za-z])\s*[.:、)\]]\s*[.:、]?\s*(.*)", re.DOTALL)
FONT = r"(?:\*\*|\\(?:text|math)?(?:bf|rm|sf)?\s*\{\s*)?"
MARK = re.compile(
    rf"{FONT}(?:(?<![A-Za-z])(?:\((?P<round>[A-Z])\)|\[(?P<square>[A-Z])\])|(?P<bare>[A-Z])\s?(?P<stop>[.:、)]))"
    r"[ ]?[.:、]?(?:\*\*|\})?"
)
BEFORE_A_MARK = re.compile(r"(?:^|[\s,;、。?!:)}*$_]|(?<![A-Z])\.)$")
BEFORE_A_LINE = re.compile(r"(?:^|\n)[ \t>*•-]*(?i:option |choice |[选選][项項] ?)?$")
BEFORE_BARE_LETTERS = re.compile(r"(?:^|[?!.:;)_。]|(?i:options|choices|[选選][项項]))\s*$")
SPACING = r"(?:\\q?quad(?![A-Za-z])|\\[ ,;!\\]|~|\s)"
FEWEST_WITHOUT_GOLD = 3
"""Options that a problem must list for its list to count when the gold answer is none of them."""


@dataclass(frozen=True)
class Options:
    """The options of a row, in the order of the letters A, B, C, ..."""

    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    """The row's own names of them where they aren't letters, such as 1, 2, 3; else empty."""

    def letter(self, answer: Any) -> str | None:
        """The letter of the option that a gold answer names by label or by index, which counts from 0; None
        where it names one by itself, or none. Raises ValueError for an integer that may be both an index and
        an option's text."""
        text = gold_answer(str(answer)).strip()
        if text in self.labels:
            return string.ascii_uppercase[self.labels.index(text)]
        if self.labels or isinstance(answer, bool) or not re.fullmatch(r"\d{1,2}(?:\.0)?", text):
            return None
        index, typed = int(float(text)), isinstance(answer, Real)
        values = [read_number(option) for option in self.texts]
        if index in values:
            if typed and index < len(values) and values.index(index) != index:
                raise ValueError(
                    f"{index} may be the option {self.texts[values.index(index)]!r} or the index of "
                    f"{self.texts[index]!r}; write the letter, or the option as text"
                )
            return None
        if index >= len(values) or (not typed and any(value is not None for value in values)):
            return None
        return string.ascii_uppercase[index]


def multiple_choice(problem: str, answer: Any, row: Mapping[str, Any]) -> tuple[str, Any]:
    """The problem with the options of the row's columns below it, as lines `A. text`, unless it lists them or
    the image does; and the gold answer as a letter where it is an index or a label of the row's own. Other
    rows as they are. Raises ValueError for options that are no texts."""
    try:
        options = column_options(row, answer)
        is_index = not options.labels and re.fullmatch(r"\d{1,2}", str(answer).strip())
        if is_index and _numbers_options(problem, options.texts):
            raise ValueError(
                f"the problem numbers them, so that the gold answer {answer} may count from 1 or from 0; "
                "write the option's text or letter instead"
            )
        if isinstance(answer, list | tuple):
            letters = [options.letter(item) for item in answer]
            answer = letters if letters and all(letters) else answer
        else:
            answer = options.letter(answer) or answer
    except ValueError as error:
        raise ValueError(f"options: {error}") from error
    if not options.texts or row.get(IMAGE_OPTIONS_COLUMN) or lists_options(problem, options.texts):
        return problem, answer
    lines = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, options.texts, strict=False)]
    return "\n".join([problem.rstrip(), *lines]), answer


def _numbers_options(problem: str, texts: Sequence[str]) -> bool:
    """Whether a problem lists these options as `1. one 2. two`."""
    return len(texts) > 1 and all(
        re.search(rf"(?<![\d.]){number}\s*[.:、)]\s*{re.escape(text)}", problem)
        for number, text in enumerate(texts, 1)
    )


def column_options(columns: Mapping[str, Any], answer: Any) -> Options:
    """The options in a row's columns: in one of OPTION_COLUMNS, or a column per letter (`A`, `B` or
    `option_a`, `choice_b`); those of a letter alone count where the gold answer is a letter or one of them.
    Raises ValueError for options that are no texts."""
    for name in OPTION_COLUMNS:
        if (options := _listed(columns.get(name), name)).texts:
            return options
    by_letter, named = {}, False
    for name, value in columns.items():
        if (match := LETTER_COLUMN.fullmatch(str(name))) and not _is_empty(value):
            by_letter.setdefault((match[1] or match[2]).upper(), value)
            named = named or bool(match[1])
    if not {"A", "B"} <= by_letter.keys():
        return Options()
    gold = gold_answer(str(answer)).strip()
    is_letter = re.fullmatch(r"\W*[A-Z](?:\W+[A-Z])*\W*|[A-Z]{2,}", gold) or LETTERED.fullmatch(gold)
    texts = {str(value).strip().casefold() for value in by_letter.values()}
    return _by_name(by_letter, "A, B, ...") if named or is_letter or gold.casefold() in texts else Options()


def _listed(value: Any, name: str) -> Options:
    """The options that a column's value lists, as a list, an object or text; empty where it lists none."""
    if isinstance(value, str):
        if value.strip().casefold() in EMPTY_VALUES:
            return Options()
        value = _parsed(value)
    if isinstance(value, Mapping):
        texts, labels = (next((value[key] for key in keys if key in value), None) for keys in (TEXTS, NAMES))
        if not isinstance(texts, list | tuple):
            return _by_name(value, name)
        texts, labels = list(texts), list(labels or [])
    elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        texts = [next((item[key] for key in TEXTS if key in item), item) for item in value]
        labels = [next((item[key] for key in NAMES if key in item), None) for item in value]
    elif isinstance(value, list | tuple):
        texts, labels = list(value), []
    else:
        return Options()
    texts = _without_padding(texts)
    if len(texts) > len(string.ascii_uppercase):
        raise ValueError(
            f"{name} has {len(texts)}, more than letters; shorten it, or rename it if it holds no options"
        )
    texts = [_text(text, name) for text in texts]
    labels = [str(label).strip() for label in labels if label is not None][: len(texts)]
    if labels and _is_alphabet(labels):
        labels = []
    return Options(tuple(_without_letters(texts)), tuple(labels) if len(labels) == len(texts) else ())


def _without_padding(texts: list) -> list:
    """The texts without what fills a list up to a fixed length; a single None at the end is the word."""
    end = len(texts)
    while end and texts[end - 1] is not None and _is_empty(texts[end - 1]):
        end -= 1
    if texts[max(end - 2, 0) : end] == [None, None]:
        while end and texts[end - 1] is None:
            end -= 1
    return texts[:end]


def _parsed(text: str) -> Any:
    """The value of a text that is JSON or Python, or the options that it lists in words."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    parts = [part.strip() for part in re.split(r";\s*|\n|\s*\|\s*", text) if part.strip()]
    in_order = len(parts) > 1 and _without_letters(parts) != parts
    return parts if in_order else list(options_in_text(text)) or (parts if len(parts) > 1 else [])


def _by_name(values: Mapping[str, Any], name: str) -> Options:
    """The options of an object whose keys are letters or numbers; empty ones at its end don't count."""
    labels = [str(key).strip() for key, value in values.items() if not _is_empty(value)]
    if len(labels) < 2 or any(len(label) > 2 for label in labels):
        return Options()
    labels.sort(key=lambda label: (len(label), label))
    texts = tuple(_text(value, name) for value in _in_order(values, labels))
    if _is_alphabet(labels):
        return Options(texts)
    if [int(label) for label in labels if label.isdecimal()] in (
        list(range(len(labels))),
        list(range(1, len(labels) + 1)),
    ):
        return Options(texts, tuple(labels))
    if all(label.isalpha() for label in labels):
        raise ValueError(f"{', '.join(labels)} of {name} must follow one another; give the missing ones")
    return Options()


def _in_order(values: Mapping[str, Any], labels: Sequence[str]) -> list[Any]:
    by_label = {str(key).strip(): value for key, value in values.items()}
    return [by_label[label] for label in labels]


def _is_alphabet(labels: Sequence[str]) -> bool:
    return [label.upper() for label in labels] == list(string.ascii_uppercase[: len(labels)])


def _is_empty(value: Any) -> bool:
    return value is None or str(value).strip().casefold() in {"", "nan"}


def _text(value: Any, name: str) -> str:
    """An option's text. Raises ValueError for an image or an object."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or isinstance(value, str | Real | Integral):
        text = str(value).strip()
        if not (IMAGE_FILE.fullmatch(text) or len(max(text.split(), key=len, default="")) > LONGEST_WORD):
            return text
    raise ValueError(
        f"an option in {name} is {_kind(value)}; options must be texts: put images into the column of "
        "images, and a mark <image> in each option's text"
    )


def _kind(value: Any) -> str:
    return f"an image ({value[:40]})" if isinstance(value, str) else f"of type {type(value).__name__}"


def _without_letters(texts: Sequence[str]) -> list[str]:
    """The texts without `A.`, `(B)`, ... in front where all have them, in order."""
    lettered = [LETTERED.fullmatch(text.translate(WIDE)) for text in texts]
    if not texts or not _is_alphabet([match[1] if match else "" for match in lettered]):
        return list(texts)
    return [text[match.start(2) :] for text, match in zip(texts, lettered, strict=True)]


@lru_cache(maxsize=4096)
def options_in_text(text: str) -> tuple[str, ...]:
    """The options that a text lists as `(A) one`, `A) one`, `A. one`, `A: one` or `A、one`, on lines or in
    one; empty unless the letters are in order from A, of one style, and each has a text.

    Letters without brackets count within a line only after the end of a sentence. Of several lists the
    longest counts, and the last of those.
    """
    plain = text.translate(WIDE)
    by_style: dict[str, list[re.Match]] = {}
    for mark in MARK.finditer(plain):
        before = plain[max(mark.start() - 2, 0) : mark.start()]
        if not mark["bare"] or BEFORE_A_MARK.search(before) or _opens_line(plain, mark):
            by_style.setdefault(mark["stop"] or ("(" if mark["round"] else "["), []).append(mark)
    lists = [
        texts
        for marks in by_style.values()
        for subset in (marks, [mark for mark in marks if _opens_line(plain, mark)])
        for texts in _sequences(text, plain, subset)
    ]
    return max(reversed(lists), key=len, default=())


def _sequences(text: str, plain: str, marks: Sequence[re.Match]) -> Iterator[tuple[str, ...]]:
    """The texts between marks A, B, C, ... for every mark A."""
    for start, first in enumerate(marks):
        if _letter(first) != "A" or not _may_open(plain, first):
            continue
        sequence = [first]
        for mark in marks[start + 1 :]:
            expected = string.ascii_uppercase[len(sequence) % 26]
            if _letter(mark) == expected and _clean(text[sequence[-1].end() : mark.start()]):
                sequence.append(mark)
        end = text.find("\n", sequence[-1].end())
        ends = [*(mark.start() for mark in sequence[1:]), end if end >= 0 else len(text)]
        texts = tuple(_clean(text[mark.end() : end]) for mark, end in zip(sequence, ends, strict=True))
        if len(texts) > 1 and all(texts):
            yield texts


def _letter(mark: re.Match) -> str:
    return mark["round"] or mark["square"] or mark["bare"]


def _opens_line(plain: str, mark: re.Match) -> bool:
    return BEFORE_A_LINE.search(plain[max(mark.start() - 20, 0) : mark.start()]) is not None


def _may_open(plain: str, mark: re.Match) -> bool:
    """Whether a list may begin at a mark: anywhere in brackets, else on a line or after a sentence."""
    before = plain[max(mark.start() - 20, 0) : mark.start()]
    return not mark["bare"] or bool(BEFORE_BARE_LETTERS.search(before)) or _opens_line(plain, mark)


def _clean(text: str) -> str:
    """An option's text without spacing around it and what belongs to the next mark."""
    text = re.sub(rf"^(?:{SPACING}|\*\*)+|(?:{SPACING}|[.;,；，。]|\*\*|\n[ \t>*•-]*)+$", "", text)
    text = re.sub(r"\n[ \t]*(?i:option|choice|[选選][项項])$", "", text)
    return text.replace("$", "").strip() if text.count("$") == 1 else text


def lists_options(problem: str, texts: Sequence[str]) -> bool:
    """Whether a problem lists these options with their letters, in any spelling, or another list of as many;
    true also for options that are nothing but their own letters."""
    if list(texts) == list(string.ascii_uppercase[: len(texts)]):
        return True
    if len(texts) >= FEWEST_WITHOUT_GOLD and len(options_in_text(problem)) == len(texts):
        return True
    words, position = _spaced(problem), 0
    for letter, text in zip(string.ascii_lowercase, texts, strict=False):
        match = re.compile(rf"(?<![a-z]){letter}\W{{0,8}}{re.escape(_spaced(text))}").search(words, position)
        if not match:
            return False
        position = match.end()
    return True


def _spaced(text: str) -> str:
    return " ".join(normalize(text.translate(WIDE), "latex").split()).casefold()
