"""Extracts the answer from a response.

Training reads only a *marked* answer: the last `\\boxed{...}`, else the last `<answer>...</answer>`. A
guess at what an unmarked response meant would reward luck. Files of responses that were written without
marks are graded by their *stated* answer: a marked one, else what follows the last "the answer is", else
all of a response that is nothing but an answer.
"""

from __future__ import annotations

import json
import re
from typing import Literal

Finding = Literal["marked", "stated"]

ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
STATEMENT = re.compile(
    r"(?:^|\b)(?:final\s+|correct\s+|best\s+|right\s+)?(?:answer|option|choice)\s*"
    r"(?:(?:\([^()]{0,40}\)|to the question|here|choice|option)\s*)?(?:\*\*\s*)?"
    r"(?:is|was|would be|will be|:|=)+(?:\s*\*\*)?\s*:?",
    re.IGNORECASE,
)
JSON_ANSWER = re.compile(r'"[\w ]*answer"\s*:\s*("(?:[^"\\]|\\.)*"|-?[\d.][\d.eE+-]*)', re.IGNORECASE)
"""A field of a JSON object, such as DynaMath's `short answer`."""
BARE_ANSWER_LENGTH = 100
"""Characters of a response that may be nothing but an answer."""
TAIL = 20_000
"""Characters at a response's end that are searched."""


class Ungraded(Exception):
    """A verifier could not compare; scores 0 and is counted under `outcome`."""

    outcome = "ungraded"


class NoAnswer(Ungraded):
    """The response has no answer."""

    outcome = "no_answer"


class BadGold(Ungraded):
    """The gold answer cannot be read; the message says why."""

    outcome = "bad_gold"


def find_answer(response: str, finding: Finding = "marked") -> str:
    """The marked or stated answer; raises NoAnswer."""
    answer = marked_answer(response) if finding == "marked" else stated_answer(response)
    if not answer:
        raise NoAnswer
    return answer


def marked_answer(response: str) -> str | None:
    """The text of the last complete `\\boxed{...}`, else of the last answer tag, else None."""
    response = response[-TAIL:]
    boxes = boxed(response)
    if boxes:
        return boxes[-1].strip()
    tags = ANSWER_TAG.findall(response)
    return tags[-1].strip() if tags else None


def fenced_json(response: str) -> str | None:
    """The last code fence that is JSON, unless a marked answer comes after it; else None."""
    for fence in reversed(list(re.finditer(r"```(?:json)?(.*?)```", response, re.DOTALL))):
        try:
            json.loads(fence[1])
        except (ValueError, RecursionError):
            continue
        return None if marked_answer(response[fence.end() :]) is not None else fence[1]
    return None


def boxed(text: str) -> list[str]:
    """The contents of each outermost complete `\\boxed{...}` or `\\fbox{...}`, in order; one that is never
    closed doesn't hide those after it."""
    spans: list[tuple[int, int]] = []
    opened: list[int] = []
    for match in re.finditer(r"\\f?box(?:ed)?\s*\{|(?<!\\)[{}]", text):
        if match[0] != "}":
            opened.append(match.end() if len(match[0]) > 1 else -1)
        elif opened and (start := opened.pop()) >= 0:
            while spans and spans[-1][0] > start:
                spans.pop()
            spans.append((start, match.start()))
    return [text[start:end] for start, end in spans]


def stated_answer(response: str) -> str | None:
    """A marked answer, else a JSON field of that name, else what the response says the answer is, else a
    short response itself, else None."""
    if (marked := marked_answer(response)) is not None:
        return marked
    response = response.strip()[-TAIL:]
    if fields := JSON_ANSWER.findall(response):
        return fields[-1].strip('"').replace("\\\\", "\\").strip() or None
    if rest := statement(response):
        return rest
    if 0 < len(response) <= BARE_ANSWER_LENGTH and "\n" not in response:
        return response
    return None


def statement(response: str) -> str:
    """The rest of the line after the last "the answer is"; empty if there is none."""
    statements = list(STATEMENT.finditer(response))
    rest = response[statements[-1].end() :].strip() if statements else ""
    return rest.splitlines()[0].strip(" *") if rest else ""
