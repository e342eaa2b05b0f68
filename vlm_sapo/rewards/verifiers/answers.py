"""Where the answer of a response is: one rule for all verifiers.

1. Only what follows the last closed thought is read; while a thought is open there is no answer.
2. Training reads the last *marked* answer: a complete `\\boxed{...}` or `<answer>...</answer>`, whichever
   ends later. A guess at what an unmarked response meant would reward luck.
3. Evaluations of responses that were written without marks read the last answer that is marked or *stated*
   ("the answer is ...", a heading `Answer`, 答案是 ...); else what a concluding sentence says ("Therefore,
   x = 5."); else all of a short response. What is merely mentioned is no answer.

`marked_answer` and `stated_answer` return the answer's text or None; `find_answer` raises NoAnswer instead.
`reads_answers` makes a verifier read responses by rule 1 and its gold answer by `gold_answer`.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Literal

from vlm_sapo.types import Example, ResponseText

Finding = Literal["marked", "stated"]

THOUGHT_TAGS = ("think", "thinking", "thought", "thoughts", "reasoning", "reflection", "scratchpad")
_TAGS = rf"(?:seed:)?(?:{'|'.join(THOUGHT_TAGS)})"
THOUGHT_END = re.compile(rf"<\s?/\s?{_TAGS}\s?>|\[/THINK\]|<\|end_of_thought\|>|◁/think▷", re.IGNORECASE)
THOUGHT_START = re.compile(
    rf"<\s?{_TAGS}(?:\s[^<>]{{0,80}})?>|\[THINK\]|<\|begin_of_thought\|>|◁think▷", re.IGNORECASE
)
ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer\s*>", re.DOTALL | re.IGNORECASE)
BOX_START = re.compile(r"\\f?box(?:ed)?\s*\{|(?<!\\)[{}]")
BARE_BOX = re.compile(r"\\boxed\s*([-+]?\d[\d.,]*\d|[-+]?\d|[A-Z](?![A-Za-z]))")
"""TeX's short form `\\boxed 5`."""
GSM8K = re.compile(r"(?:^|\n)[^\S\n]*####\s*([^\n]*\S)\s*$")
"""The gold answer behind GSM8K's solutions."""

VERB = (
    r"(?:is|are|was|were|(?:would|will|should|must|has\s+to|have\s+to|can\s+only)\s+be|comes\s+(?:out\s+)?to(?:\s+be)?"
    r"|equals|turns\s+out\s+to\s+be|becomes|[:：=]|->|→|—|–)"
)
STATEMENT = re.compile(
    r"(?<![A-Za-z])(?:final\s+|correct\s+|best\s+|right\s+)?(?:answer|option|choice)\s*"
    r"(?:(?:\([^()]{0,40}\)|to\s+(?:the|this)\s+(?:question|problem)|here|choice|option)\s*)?(?:\*\*|__)?\s*"
    rf"{VERB}(?:\s*(?:[:：]|=|thus|therefore|then|indeed))*\s*(?:\*\*|__)?\s*[:：]?",
    re.IGNORECASE,
)
CHINESE_STATEMENT = re.compile(
    r"(?:(?:[正准]确|最终|最后|标准|本题)?(?:的)?(?:答案|选项|選項)(?:应该|应当|应|就)?(?:[是为為]|[:：])+"
    r"|[故应應]?(?:因此|所以|应该|应当)?(?<![不别別勿非])(?<![不别別勿非][应應])(?<![不别別勿非][应應][该該当當])[选選](?:择|擇)?(?:项|項)?(?:[是为為]|[:：])*(?=\s*[(（\[【]?\s*[A-ZＡ-Ｚ])"
    r"|(?:^|\n|[。；])[^\S\n]*答\s*[:：])\s*[:：]?"
)
CHOICE_STATEMENT = re.compile(
    r"(?:\b(?:I|we)\s+(?:(?:would|will|'d|'ll|therefore|thus|must)\s+)*(?:choose|pick|select|go\s+with)"
    r"|(?<!n't )(?<!n’t )(?<!not )\b(?:is|be))\s+(?:option|choice|answer)?\s*"
    r"(?=(?:\*\*)?\(?(?-i:[A-Z])\)?(?![A-Za-z']))",
    re.IGNORECASE,
)
"""`I choose B`, `it must be option B`."""
UNCLOSED_TAG = re.compile(r"<answer>", re.IGNORECASE)
"""An answer tag that was cut off, behind the last complete one."""
HEADING = re.compile(
    r"^[ \t#>*_|]*(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|(?:最终|最后|正确)?答案)[ \t]*(?:[:：][ \t]*)?"
    r"(?:(?:\*\*|__|\|)[ \t]*[:：]?[ \t]*|$)",
    re.IGNORECASE | re.MULTILINE,
)
"""A line or a table's cell that says nothing but `Answer`; the answer stands behind or below."""
CONCLUSION = re.compile(
    r"(?:^|[\n.!?。！？][^\S\n]*|\*\*\s*|\s(?-i:(?=Therefore|Thus|Hence)))(?:(?:therefore|thus|hence|so|consequently|in\s+conclusion|finally)\b,?"
    r"|所以|因此|故|综上所述|综上)[,，]?\s*(?:(?:we|I)\s+(?:have|get|find|obtain|conclude)\s*(?:that\s+)?|[:：])?",
    re.IGNORECASE,
)
JSON_ANSWER = re.compile(r'"[\w ]*answer"\s*:\s*("(?:[^"\\]|\\.)*"|-?[\d.][\d.eE+-]*)', re.IGNORECASE)
"""A field of a JSON object, such as DynaMath's `short answer`."""
DISPLAY = re.compile(r"^\s*(\$\$|\\\[)(.*?)(?:\$\$|\\\])", re.DOTALL)
SENTENCE_END = re.compile(
    r"(?<![A-Z])(?<!\b[A-Z][a-z])(?<!\b[A-Z][a-z]{2})[.!?;]\s+(?=[A-Z\u4e00-\u9fff])|[。！？；]"
)
"""The end of a sentence; not the full stop of `B. green`, `St. Louis` or `No. 5`."""
BOLD_END = re.compile(r"(?:\*\*|__)([.,;:!?。]?)$")
COMMENT = re.compile(
    r"(?:correct|right|wrong|incorrect|obtained|given|found|based|as\s|because|since|not\b|the\s+same|also\b"
    r"|in\s+(?:the\s+)?(?:box|form)|derived|reasonable|consistent|verified|clear|therefore\s+(?:correct|right)"
    r"|正确的?[。！]?$)",
    re.IGNORECASE,
)
"""What says something about an answer that was given before, and is none."""
REFUSAL = re.compile(
    r"\b(?:I(?:'m|\s+am)\s+(?:sorry|unable|not\s+(?:sure|able))|sorry|I\s+(?:cannot|can\s*not|can't|could\s*n[o']t"
    r"|don't|do\s+not)|as\s+an?\s+AI|the\s+(?:image|picture|figure|photo)\s+(?:does|do|is|was|has)(?:n't|\s+no)"
    r")|无法|抱歉|对不起|看不清|不知道|不确定",
    re.IGNORECASE,
)
TURN_END = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>")
"""What a model without a stop token writes behind its answer; what follows is another turn."""
BARE_ANSWER_LENGTH = 100
"""Characters of a response that may be nothing but an answer."""
FENCES_TAIL = 200_000
"""Characters at a response's end in which fenced JSON is looked for."""
TAIL = 20_000
"""Characters at a response's end that are searched."""
DEGENERATE_LENGTH, DEGENERATE_SHARE = 1000, 0.03
"""From this length on, a text that compresses to less than this share repeats itself and is no answer."""


class Ungraded(Exception):
    """A verifier could not compare; scores 0 and is counted under `outcome`."""

    outcome = "ungraded"


class NoAnswer(Ungraded):
    """The response has no answer."""

    outcome = "no_answer"


class BadGold(Ungraded):
    """The gold answer cannot be read; the message says why."""

    outcome = "bad_gold"


@dataclass(frozen=True)
class Mark:
    """A marked answer: from `start` to `end` in `response`, marks included."""

    start: int
    end: int
    inside: slice
    response: str

    @property
    def text(self) -> str:
        return self.response[self.inside].strip()


def reads_answers(verifier: Callable[..., float]) -> Callable[..., float]:
    """The verifier with responses read after their thoughts and the gold answer read from its own marks."""

    @wraps(verifier)
    def reading(response: str, example: Example, **args: Any) -> float:
        return verifier(*readable(response, example), **args)

    return reading


def readable(response: str, example: Example) -> tuple[str, Example]:
    """The response after its thoughts, and the example with its gold answer alone. Raises NoAnswer for a
    response that ends in a thought."""
    text = after_thoughts(response)
    if not text.strip():
        raise NoAnswer
    gold = gold_answer(example.answer)
    if text != response:
        response = response.with_text(text) if isinstance(response, ResponseText) else text
    return response, example if gold == example.answer else replace(example, answer=gold)


def after_thoughts(response: str) -> str:
    """What follows the last closed thought; empty while a thought is open."""
    ends = list(THOUGHT_END.finditer(response))
    rest = response[ends[-1].end() :] if ends else response
    return "" if THOUGHT_START.search(rest) else rest


def gold_answer(text: str) -> str:
    """A gold answer without what some data sets store around it: thoughts, an answer tag, GSM8K's `####`, or
    a box where the text is one or where it is a solution in words with one box. Other texts are returned
    unchanged."""
    rest = after_thoughts(text) if THOUGHT_END.search(text) else text
    if tags := ANSWER_TAG.findall(rest):
        rest = tags[-1]
    elif match := GSM8K.search(rest):
        rest = match[1]
    boxes = _boxes(rest)
    if len(boxes) == 1:
        around = (rest[: boxes[0].start] + rest[boxes[0].end :]).strip(" \n$.")
        if not around or len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", around)) >= 3:
            rest = boxes[0].text
    return rest.strip() if rest != text else text


def find_answer(response: str, finding: Finding = "marked") -> str:
    """The marked or stated answer; raises NoAnswer."""
    answer = marked_answer(response) if finding == "marked" else stated_answer(response)
    if not answer or is_degenerate(answer):
        raise NoAnswer
    return answer


def marked_answer(response: str) -> str | None:
    """The text of the last complete `\\boxed{...}` or answer tag after the last thought; None without one."""
    mark = _last_mark(after_thoughts(response)[-TAIL:])
    return mark[0] if mark else None


def stated_answer(response: str) -> str | None:
    """The last answer after the last thought that is marked, a JSON field, or stated; else what a concluding
    sentence says; else a short response itself; None without one."""
    response = TURN_END.split(after_thoughts(response), maxsplit=1)[0].strip()[-TAIL:]
    mark = _last_mark(response)
    if stated := _last_statement(response, mark[1] if mark else 0, after_mark=bool(mark)):
        return stated
    if mark:
        return mark[0]
    if fields := JSON_ANSWER.findall(response):
        return fields[-1].strip('"').replace("\\\\", "\\").strip() or None
    if is_degenerate(response):
        return None
    if 0 < len(response) <= BARE_ANSWER_LENGTH and "\n" not in response:
        refused = REFUSAL.search(response) or STATEMENT.search(response)  # which says what it isn't
        return None if refused else _conclusion(response) or response
    return _conclusion(response)


def fenced_json(response: str) -> str | None:
    """The last code fence that is JSON, unless a marked answer comes after it; else None."""
    response = after_thoughts(response)[-FENCES_TAIL:]
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
    return [box.text for box in _boxes(text)]


def is_degenerate(text: str) -> bool:
    """Whether a long text does little but repeat itself."""
    data = text.encode(errors="replace")
    return len(data) >= DEGENERATE_LENGTH and len(zlib.compress(data, 1)) < DEGENERATE_SHARE * len(data)


def _boxes(text: str) -> list[Mark]:
    """The complete boxes in no other, in order."""
    outer: list[Mark] = []
    for mark in reversed(_nested_boxes(text)):
        if not outer or mark.end <= outer[-1].start:
            outer.append(mark)
    return outer[::-1]


def _nested_boxes(text: str) -> list[Mark]:
    """All complete boxes in the order of their ends, those in others too."""
    marks: list[Mark] = []
    opened: list[tuple[int, int]] = []
    for match in BOX_START.finditer(text):
        if match[0] != "}":
            opened.append((match.start(), match.end() if len(match[0]) > 1 else -1))
        elif opened and (start := opened.pop())[1] >= 0:
            marks.append(Mark(start[0], match.end(), slice(start[1], match.start()), text))
    return marks


def _last_mark(text: str) -> tuple[str, int] | None:
    """The text of the marked answer that ends last, and that end; None without one. A mark around others is
    read as the last of the inner ones."""
    marks = _nested_boxes(text)
    for form in (BARE_BOX, ANSWER_TAG):
        marks += [Mark(item.start(), item.end(), slice(*item.span(1)), text) for item in form.finditer(text)]
    if not marks:
        return None
    marks.sort(key=lambda mark: mark.end, reverse=True)
    innermost = marks[0]
    for mark in marks:
        if mark.start > innermost.start:
            innermost = mark
    return innermost.text, marks[0].end


def _last_statement(response: str, start: int, *, after_mark: bool) -> str:
    """What the last statement after `start` says; empty if there is none. After a marked answer only a short
    one counts, and none that speaks about that answer."""
    forms = (STATEMENT, CHINESE_STATEMENT, CHOICE_STATEMENT, HEADING, UNCLOSED_TAG)
    statements = [match for form in forms for match in form.finditer(response, start)]
    for match in sorted(statements, key=lambda match: match.end(), reverse=True):
        text = _to_sentence_end(response[match.end() :])
        if not text or COMMENT.match(text.lstrip(" *_")):
            continue
        if not after_mark or (len(text) <= BARE_ANSWER_LENGTH and not REFUSAL.search(text)):
            return text
    return ""


def _to_sentence_end(text: str) -> str:
    """The first line of a text up to the end of its sentence, or the formula that is displayed there."""
    text = text.lstrip(" \t\n*_|:：")
    if match := DISPLAY.match(text):
        return match[2].strip()
    line = text.partition("\n")[0]
    return BOLD_END.sub(r"\1", SENTENCE_END.split(line)[0].strip(" \t*_|"))


def _conclusion(response: str) -> str | None:
    """What the last sentence with `therefore` or a like word says: its equation, or what follows its verb."""
    matches = list(CONCLUSION.finditer(response))
    if not matches:
        return None
    sentence = _to_sentence_end(response[matches[-1].end() :])
    if not sentence or len(sentence) > 2 * BARE_ANSWER_LENGTH or REFUSAL.search(sentence):
        return None
    if "=" in sentence:
        return sentence
    parts = re.split(rf"\s{VERB}\s+|[是为為]|等于", sentence, flags=re.IGNORECASE)
    return parts[-1].strip() if len(parts) > 1 else None
