"""How tools are described to a model, and how a chat template writes calls and their answers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from PIL.Image import Image
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from vlm_sapo.environments.calls import FORMS, Syntax
from vlm_sapo.environments.tools import FIELD, Tool
from vlm_sapo.environments.values import Box, Point, explain
from vlm_sapo.types import Coordinates

Format = Literal["auto", "template", "hermes"]
PROBE = "probe_tool"
"""Name of a tool that a template is tried with."""
HERMES = """\
You can use tools. Each line between the tags is one of them, with its parameters:
<tools>
{tools}
</tools>
To use one, write its name and its arguments as JSON between these tags, and end your turn:
{form}
The answer follows in <tool_response></tool_response>."""


@dataclass(frozen=True)
class ToolChat:
    """The tools of a conversation. Without any, messages remain as they are."""

    schemas: tuple[Mapping[str, Any], ...] = ()
    native: bool = True
    """Whether the chat template describes them itself."""
    syntax: Syntax = "json"
    """What its calls look like."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What the chat template takes beside messages."""
        return {"tools": list(self.schemas)} if self.schemas and self.native else {}

    def conversation(self, messages: list[dict]) -> list[dict]:
        """The messages, with the tools in the system message unless the template puts them there."""
        if not self.schemas or self.native:
            return messages
        tools = "\n".join(json.dumps(schema) for schema in self.schemas)
        text = HERMES.format(tools=tools, form=FORMS["json"])
        if messages[0]["role"] == "system":
            text = f"{messages[0]['content']}\n\n{text}"
            messages = messages[1:]
        return [{"role": "system", "content": text}, *messages]

    def results(self, contents: Sequence[list[dict]]) -> list[dict]:
        """The messages that answer the calls of a turn."""
        if self.native:
            return [{"role": "tool", "content": content} for content in contents]
        first, last = ({"type": "text", "text": text} for text in ("<tool_response>\n", "\n</tool_response>"))
        line = {"type": "text", "text": "\n"}
        parts = [[first, *content, last] for content in contents]
        joined = [part for index, block in enumerate(parts) for part in ([line] if index else []) + block]
        return [{"role": "user", "content": joined}]


def tool_chat(
    processor, tools: Sequence[Tool], coordinates: Coordinates, *, form: Format, hermes: bool
) -> ToolChat:
    """How this processor's chat template offers tools. With `form` `auto`, that is as the template itself
    does, or in the form of `hermes` where it knows no tools and the family was trained with that.

    Raises ValueError for a template that knows no tools, or writes calls in another way.
    """
    schemas = tuple(schema_of(tool, coordinates) for tool in tools)
    probe = partial(_render, processor)
    native = PROBE in probe([_user(".")], tools=[_probe_schema()])
    if form == "hermes" or (form == "auto" and hermes and not native):
        return ToolChat(schemas, native=False)
    if not native:
        raise ValueError(
            "rollout.environment.format must be hermes for this model: its chat template takes no tools, so "
            "they are then described in the system message; or use a checkpoint whose template does"
        )
    function = {"name": PROBE, "arguments": {"key": 7}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    written = probe([_user("."), call])
    forms = {"json": f'<tool_call>\n{{"name": "{PROBE}"', "xml": f"<tool_call>\n<function={PROBE}>"}
    syntax = next((name for name, text in forms.items() if text in written), None)
    answered = probe([_user("."), call, {"role": "tool", "content": [{"type": "text", "text": "RESULT"}]}])
    if syntax is None or "RESULT" not in answered:
        raise ValueError(
            "the chat template of model.path writes tool calls in a way that is not known here; set "
            "rollout.environment.format=hermes, or use a template with <tool_call> and messages of tools"
        )
    return ToolChat(schemas, syntax=syntax)


def schema_of(tool: Tool, coordinates: Coordinates) -> dict[str, Any]:
    """The tool as JSON schema, as chat templates take it. Images are numbers there, boxes and points lists in
    the model's coordinates. Raises ValueError if hints or docstring don't tell enough."""
    kinds = {Image: int, Box: list[float], Point: list[float]}

    def described() -> None: ...

    signature = inspect.signature(tool.function)
    described.__name__, described.__doc__ = tool.name, inspect.getdoc(tool.function)
    described.__annotations__ = {key: kinds.get(kind, kind) for key, kind in tool.kinds.items()}
    described.__signature__ = signature.replace(
        parameters=[
            parameter.replace(
                kind=parameter.KEYWORD_ONLY,  # one with a default may then come before one without
                default=1 if tool.kinds[key] is Image else parameter.default,
            )
            for key, parameter in signature.parameters.items()
        ]
    )
    try:
        schema = get_json_schema(described)
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ValueError(
            f"{FIELD} ({tool.name}) needs a description of each parameter under `Args:` in its docstring, "
            f"and types that JSON has, Image, Box or Point: {error}"
        ) from error
    properties = schema["function"]["parameters"]["properties"]
    for key, kind in tool.kinds.items():
        if kind is Image:
            properties[key]["description"] += " (its number; 1 is the first and the default)"
        elif kind in (Box, Point):
            properties[key]["description"] += f": {explain(kind, coordinates)}"
        if isinstance(default := signature.parameters[key].default, str | int | float):
            properties[key]["default"] = default
    schema["function"].pop("return", None)
    return schema


def _render(processor, messages: list[dict], **options: Any) -> str:
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=False, **options)


def _user(text: str) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def _probe_schema() -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"key": {"type": "integer"}}}
    function = {"name": PROBE, "description": ".", "parameters": parameters}
    return {"type": "function", "function": function}
