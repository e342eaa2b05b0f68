"""The benchmarks' own scoring rules, for numbers that stand beside published ones.

Each is written from its authors' description. Where theirs asks a language model to find the answer in a
response, the answer is found by rules here, and where theirs guesses at random, nothing is scored. Our own
verdicts are those of the other verifiers; evaluations report both.
"""

from __future__ import annotations

import re
import string

from vlm_sapo.rewards.verifiers.answers import NoAnswer, boxed, find_answer
from vlm_sapo.rewards.verifiers.choice import options
from vlm_sapo.rewards.verifiers.math import value
from vlm_sapo.rewards.verifiers.text import golds, levenshtein, short
from vlm_sapo.types import Example


def mathvision(response: str, example: Example) -> float:
    """The last box, what follows "the answer is", or all of it: the gold letter or its option's text, or both
    numbers or tuples of them that are equal when rounded to two decimals."""
    boxes = boxed(response)
    rest = re.split("the answer is", response, flags=re.IGNORECASE)[-1]
    answer = _squeezed(boxes[-1] if boxes else rest)
    given, gold = options(example), example.answer.strip()
    wanted = {_squeezed(gold)}
    if given and gold in string.ascii_uppercase and string.ascii_uppercase.index(gold) < len(given):
        wanted.add(_squeezed(given[string.ascii_uppercase.index(gold)]))
    return float(answer in wanted or any(_rounds_alike(answer, text) for text in wanted))


def mathvista(response: str, example: Example) -> float:
    """Options: a letter's text, else the option with the least edit distance. Integers: cut to one. Floats:
    rounded to the row's precision. Lists: as texts."""
    answer, gold = find_answer(response, "stated").strip(), example.answer.strip()
    kind, given = str(example.columns.get("answer_type") or ""), options(example)
    if given:
        match = re.fullmatch(r"\(?([A-Z])\)?[.:]?(?:\s.*)?", answer, re.DOTALL)
        if match and string.ascii_uppercase.index(match[1]) < len(given):
            chosen = given[string.ascii_uppercase.index(match[1])]
        else:
            chosen = min(given, key=lambda option: levenshtein(answer.lower(), option.lower()))
        index = string.ascii_uppercase.find(gold) if len(gold) == 1 else -1
        return float(chosen == (given[index] if gold not in given and 0 <= index < len(given) else gold))
    try:
        if kind == "integer":
            return float(int(float(answer)) == int(float(gold)))
        if kind == "float":
            precision = int(float(example.columns.get("precision") or 2))
            return float(round(float(answer), precision) == round(float(gold), precision))
    except (ValueError, OverflowError):
        return 0.0
    return float(answer == gold)


def dynamath(response: str, example: Example) -> float:
    """The field `short answer` of the response's JSON: floats within .001, the same letter, or a text that
    stands in the gold one."""
    answer, gold = find_answer(response, "stated").strip(), example.answer.strip()
    kind = str(example.columns.get("answer_type"))
    if kind == "multiple choice":
        letter = re.match(r"\(?([A-Za-z])(?![A-Za-z])", answer)
        return float(letter is not None and letter[1].upper() == gold.upper())
    if kind in ("float", "int"):
        given, wanted = _number(answer), _number(gold)
        return float(given is not None and wanted is not None and abs(given - wanted) <= 0.001 + 1e-12)
    return float(answer.lower() in gold.lower())


def we_math(response: str, example: Example) -> float:
    """The first letter from A to H behind the last "Answer"."""
    rest = response.rpartition("Answer")[2] if "Answer" in response else response
    rest = re.sub(r"[><:.\s(*{]|\\boxed", "", rest)
    return float(rest[:1] in set("ABCDEFGH") and rest[:1] == example.answer.strip())


def mmmu(response: str, example: Example, *, shapes: tuple[str, ...] = ("({})", " {} ")) -> float:
    """Options: the last one named as `(A)`, else as ` A `, else by its text. Others: a gold text in the
    answer, or a gold number to two decimals."""
    given = options(example)
    if not given:
        return short(response, example, finding="stated")
    for character in ",.!?;:'":
        response = response.strip(character)
    text = f" {response} "
    letters = string.ascii_uppercase[: len(given)]
    for shape in shapes:
        places = {letter: text.rfind(shape.format(letter)) for letter in letters}
        if max(places.values()) >= 0:
            return float(max(places, key=places.get) == example.answer.strip())
    if len(response.split()) > 5:
        places = {
            letter: text.lower().rfind(option.lower()) for letter, option in zip(letters, given, strict=True)
        }
        if max(places.values()) >= 0:
            return float(max(places, key=places.get) == example.answer.strip())
    raise NoAnswer


def mmmu_pro(response: str, example: Example) -> float:
    """The letter behind the last "Answer:", else as for MMMU, where `A.` names an option too."""
    found = re.findall(r"Answer:[\s*$(]*(?:\\text\{)?\(?([A-J])\b", response)
    if found:
        return float(found[-1] == example.answer.strip())
    return mmmu(response, example, shapes=("({})", " {} ", "{}."))


def letters(response: str, example: Example) -> float:
    """LogicVista, VisuLogic: the same letters, in any order."""
    found = re.findall(r"(?<![A-Za-z])([A-Ha-h])(?![A-Za-z])", find_answer(response, "stated"))
    wanted = re.findall(r"[A-Ha-h]", example.answer)
    if not found:
        raise NoAnswer
    return float(sorted(letter.lower() for letter in found) == sorted(letter.lower() for letter in wanted))


def chartqa(response: str, example: Example) -> float:
    """Relaxed accuracy: numbers within 5 % of the gold one, per cent divided by 100; other texts the same but
    for case. A gold 0 is compared as a text."""
    answer = find_answer(response, "stated").strip()
    for gold in golds(example):
        given, wanted = _number(answer), _number(gold)
        if given is not None and wanted:
            if abs(given - wanted) / abs(wanted) <= 0.05:
                return 1.0
        elif answer.lower() == gold.lower():
            return 1.0
    return 0.0


def _squeezed(text: str) -> str:
    text = re.sub(r"\s+|\^\{?\\circ\}?|\\text\{|units?", "", text.lower()).strip("$.")
    return re.sub(r"^\(?([a-e])\)?\}?$", r"\1", text.rpartition("=")[2])


def _rounds_alike(one: str, other: str) -> bool:
    numbers = []
    for text in (one, other):
        parts = text[1:-1].split(",") if re.fullmatch(r"\(.*,.*\)", text) else [text]
        numbers.append([value(part) for part in parts])
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
        return value(text) if "\\" in text else None
