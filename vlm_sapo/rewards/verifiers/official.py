"""The benchmarks' own scoring rules, for numbers that can be compared with published ones.

Each is written from its authors' description. Where theirs asks a language model to extract the answer
from a response, rules extract it here, and where theirs guesses at random, nothing is scored. Our own
verdicts are those of the other verifiers; evaluations report both.
"""

from __future__ import annotations

import re
import string

from rapidfuzz.distance import Levenshtein

from vlm_sapo.rewards.verifiers.answers import Finding, NoAnswer, boxed, find_answer, reads_answers
from vlm_sapo.rewards.verifiers.choice import column_texts
from vlm_sapo.rewards.verifiers.math import real_value
from vlm_sapo.rewards.verifiers.normalize import normalize
from vlm_sapo.rewards.verifiers.text import gold_texts, readings, short, undressed
from vlm_sapo.types import Example


@reads_answers
def mathvision(response: str, example: Example) -> float:
    """The last box, what follows "the answer is", or all of it: the gold letter or its option's text, or both
    numbers or tuples of them that are equal when rounded to two decimals."""
    boxes = boxed(response)
    rest = re.split("the answer is", response, flags=re.IGNORECASE)[-1]
    answer = normalize(boxes[-1] if boxes else rest, "mathvision")
    options, gold = column_texts(example), example.answer.strip()
    accepted = {normalize(gold, "mathvision")}
    if options and gold in string.ascii_uppercase and string.ascii_uppercase.index(gold) < len(options):
        accepted.add(normalize(options[string.ascii_uppercase.index(gold)], "mathvision"))
    return float(answer in accepted or any(_equal_when_rounded(answer, text) for text in accepted))


@reads_answers
def mathvista(response: str, example: Example) -> float:
    """Options: a letter's text, else the option with the least edit distance. Integers: cut to one. Floats:
    rounded to the row's precision. Lists: as texts."""
    answer, gold = find_answer(response, "stated").strip(), example.answer.strip()
    kind, options = str(example.columns.get("answer_type") or ""), column_texts(example)
    if options:
        index = string.ascii_uppercase.find(gold) if len(gold) == 1 else -1
        by_letter = gold not in options and 0 <= index < len(options)
        return float(_nearest_option(answer, options) == (options[index] if by_letter else gold))
    try:
        if kind == "integer":
            return float(int(float(answer)) == int(float(gold)))
        if kind == "float":
            precision = int(float(example.columns.get("precision") or 2))
            return float(round(float(answer), precision) == round(float(gold), precision))
    except (ValueError, OverflowError):
        return 0.0
    return float(answer == gold)


def _nearest_option(answer: str, options: list[str]) -> str:
    match = re.fullmatch(r"\(?([A-Z])\)?[.:]?(?:\s.*)?", answer, re.DOTALL)
    if match and string.ascii_uppercase.index(match[1]) < len(options):
        return options[string.ascii_uppercase.index(match[1])]
    distances = [Levenshtein.distance(answer.lower(), option.lower()) for option in options]
    return options[distances.index(min(distances))]


@reads_answers
def dynamath(response: str, example: Example) -> float:
    """The field `short answer` of the response's JSON: floats within .001, the same letter, or a text that
    is part of the gold one."""
    answer, gold = find_answer(response, "stated").strip(), example.answer.strip()
    kind = str(example.columns.get("answer_type"))
    if kind == "multiple choice":
        letter = re.match(r"\(?([A-Za-z])(?![A-Za-z])", answer)
        return float(letter is not None and letter[1].upper() == gold.upper())
    if kind in ("float", "int"):
        number, gold_number = _number(answer), _number(gold)
        if number is None or gold_number is None:
            return 0.0
        return float(abs(number - gold_number) <= 0.001 + 1e-12)
    return float(answer.lower() in gold.lower())


@reads_answers
def we_math(response: str, example: Example) -> float:
    """The first letter from A to H after the last "Answer"."""
    rest = response.rpartition("Answer")[2] if "Answer" in response else response
    rest = re.sub(r"[><:.\s(*{]|\\boxed", "", rest)
    return float(rest[:1] in set("ABCDEFGH") and rest[:1] == example.answer.strip())


@reads_answers
def mmmu(response: str, example: Example, *, shapes: tuple[str, ...] = ("({})", " {} ")) -> float:
    """Options: the last one named as `(A)`, else as ` A `, else by its text. Others: a gold text in the
    answer, or a gold number to two decimals."""
    options = column_texts(example)
    if not options:
        return short(response, example, finding="stated")
    for character in ",.!?;:'":
        response = response.strip(character)
    text = f" {response} "
    letters = string.ascii_uppercase[: len(options)]
    for shape in shapes:
        if letter := _last_named(text, {letter: shape.format(letter) for letter in letters}):
            return float(letter == example.answer.strip())
    if len(response.split()) > 5:
        lowered = (option.lower() for option in options)
        if letter := _last_named(text.lower(), dict(zip(letters, lowered, strict=True))):
            return float(letter == example.answer.strip())
    raise NoAnswer


def _last_named(text: str, spellings: dict[str, str]) -> str | None:
    """The letter whose spelling comes last in the text; None if the text has none of them."""
    positions = {letter: text.rfind(spelling) for letter, spelling in spellings.items()}
    return max(positions, key=positions.get) if max(positions.values()) >= 0 else None


@reads_answers
def mmmu_pro(response: str, example: Example) -> float:
    """The letter after the last "Answer:", else as for MMMU, where `A.` names an option too."""
    letters = re.findall(r"Answer:[\s*$(]*(?:\\text\{)?\(?([A-J])\b", response)
    if letters:
        return float(letters[-1] == example.answer.strip())
    return mmmu(response, example, shapes=("({})", " {} ", "{}."))


@reads_answers
def letters(response: str, example: Example) -> float:
    """LogicVista, VisuLogic: the same letters, in any order."""
    named = re.findall(r"(?<![A-Za-z])([A-Ha-h])(?![A-Za-z])", find_answer(response, "stated"))
    if not named:
        raise NoAnswer
    gold = re.findall(r"[A-Ha-h]", example.answer)
    return float(sorted(map(str.lower, named)) == sorted(map(str.lower, gold)))


@reads_answers
def chartqa(response: str, example: Example, *, finding: Finding = "stated") -> float:
    """Relaxed accuracy: numbers within 5 % of the gold one, per cent divided by 100; other texts the same but
    for case, a full stop at the end and LaTeX around them. A gold 0 is compared as a text."""
    answer = find_answer(response, finding).strip()
    for gold in gold_texts(example):
        number, gold_number = _number(answer), _number(gold)
        if number is not None and gold_number:
            if abs(number - gold_number) / abs(gold_number) <= 0.05:
                return 1.0
        elif gold.lower() in {undressed(reading).lower() for reading in readings(answer)}:
            return 1.0
    return 0.0


def _equal_when_rounded(one: str, other: str) -> bool:
    numbers = []
    for text in (one, other):
        parts = text[1:-1].split(",") if re.fullmatch(r"\(.*,.*\)", text) else [text]
        numbers.append([real_value(part) for part in parts])
    first, second = numbers
    return len(first) == len(second) and all(
        a is not None and b is not None and round(a, 2) == round(b, 2)
        for a, b in zip(first, second, strict=True)
    )


def _number(text: str) -> float | None:
    text = text.strip().replace(",", "").rstrip(".")
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return real_value(text) if "\\" in text else None
