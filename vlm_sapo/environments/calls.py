"""Reads the tool calls in a turn, in the forms of chat templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vlm_sapo.environments.values import BadCall
from vlm_sapo.rewards.verifiers.answers import THOUGHT_END, THOUGHT_START
from vlm_sapo.types import one_line

Syntax = Literal["json", "xml"]
"""What is inside `<tool_call>`: a JSON object with name and arguments, or `<function=name>` with
`<parameter=name>`."""
CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|$)", re.DOTALL)
FUNCTION = re.compile(r"\s*<function=([^>\n]*)>(.*)</function>\s*", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\n]*)>\n?(.*?)\n?</parameter>", re.DOTALL)
FORMS = {
    "json": '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>',
    "xml": "<tool_call>\n<function=...>\n<parameter=...>\n...\n</parameter>\n</function>\n</tool_call>",
}


@dataclass(frozen=True)
class Call:
    """A call as the model wrote it; in the xml form all values are texts."""

    name: str
    arguments: Mapping[str, Any]


def read_calls(turn: str, syntax: Syntax) -> list[Call | BadCall]:
    """The calls of a turn outside its thoughts, in order. One that can't be read is a BadCall that says what
    is wrong."""
    calls: list[Call | BadCall] = []
    for match in CALL.finditer(_outside_thoughts(turn)):
        try:
            if not match[2]:
                raise BadCall(f"the call has no </tool_call>; write\n{FORMS[syntax]}")
            calls.append(_read_json(match[1]) if syntax == "json" else _read_xml(match[1]))
        except BadCall as error:
            calls.append(error)
    return calls


def _outside_thoughts(turn: str) -> str:
    ends = list(THOUGHT_END.finditer(turn))
    rest = turn[ends[-1].end() :] if ends else turn
    opened = THOUGHT_START.search(rest)
    return rest[: opened.start()] if opened else rest


def _read_json(text: str) -> Call:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadCall(f"{one_line(text)!r} is no JSON ({error}); write\n{FORMS['json']}") from error
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise BadCall(f"{one_line(text)!r} has no name; write\n{FORMS['json']}")
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):  # some models write them as JSON in a text
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise BadCall(f"the arguments {one_line(arguments)!r} are no JSON ({error})") from error
    if not isinstance(arguments, dict):
        raise BadCall(f"the arguments {one_line(arguments)!r} must be an object with a value for each name")
    return Call(value["name"], arguments)


def _read_xml(text: str) -> Call:
    match = FUNCTION.fullmatch(text)
    if match is None:
        raise BadCall(f"{one_line(text)!r} is no call; write\n{FORMS['xml']}")
    return Call(match[1].strip(), {name.strip(): text for name, text in PARAMETER.findall(match[2])})
