"""Tools for a model: functions with type hints and a docstring, and the environment that runs them."""

from __future__ import annotations

import inspect
import json
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Union

from PIL.Image import Image
from pydantic import TypeAdapter, ValidationError

from vlm_sapo.environments import images, sandbox
from vlm_sapo.environments.calls import Call, Syntax, read_calls
from vlm_sapo.environments.environment import (
    BadObservation,
    Observation,
    ToolResult,
    check_image,
    shortened,
)
from vlm_sapo.environments.values import BadCall, Box, Point, Size, to_pixels
from vlm_sapo.plugins import resolve
from vlm_sapo.types import Coordinates, Example, ResponseText, one_line


def python(code: str) -> str:
    """Runs Python code and returns what it prints, and the value of its last line. The modules of the
    standard library that compute, numpy and sympy are there; files and the network are not.

    Args:
        code: the program
    """
    return sandbox.run_python(code)


BUILTIN: dict[str, Callable] = {
    "zoom": images.zoom,
    "crop": images.crop,
    "rotate": images.rotate,
    "draw_box": images.draw_box,
    "measure": images.measure,
    "python": python,
}
FIELD = "rollout.environment.tools"


@dataclass(frozen=True)
class SeenImage:
    """An image of an episode and the size in which the model sees it."""

    image: Image
    size: Size


@dataclass(frozen=True)
class Tool:
    """A function that a model may call."""

    name: str
    function: Callable
    kinds: Mapping[str, Any]
    """By parameter, its type: Image, Box, Point, or what the model's JSON value is checked against."""
    required: frozenset[str]
    returns_image: bool
    """Whether its hint says so."""

    @classmethod
    def of(cls, name: str, *, field: str = FIELD) -> Tool:
        """The built-in tool, or the user's function, of this name. Raises ValueError for one that can't be
        described to a model."""
        function = resolve(name, field=field, builtin=BUILTIN)
        if not callable(function):
            raise ValueError(f"{field} ({name}) must name a function; it is a {type(function).__name__}")
        hints, parameters = typing.get_type_hints(function), inspect.signature(function).parameters
        for parameter in parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ValueError(f"{field} ({name}) must not have {parameter}: give each parameter its name")
            if parameter.name not in hints:
                raise ValueError(f"{field} ({name}): its parameter {parameter.name} needs a type hint")
        if not inspect.getdoc(function):
            raise ValueError(f"{field} ({name}) needs a docstring: it tells the model what the tool does")
        kinds = {key: _without_none(hints[key]) for key in parameters}
        required = {
            key
            for key, parameter in parameters.items()
            if parameter.default is parameter.empty and kinds[key] is not Image
        }
        return cls(
            function.__name__,
            function,
            kinds,
            frozenset(required),
            _without_none(hints.get("return")) is Image,
        )

    def run(
        self, arguments: Mapping[str, Any], seen: Sequence[SeenImage], coordinates: Coordinates
    ) -> ToolResult:
        """Calls the function with what the model wrote. Raises BadCall where that doesn't fit."""
        names = ", ".join(self.kinds)
        values = {
            key: value if self.kinds.get(key) is str else _decoded(value) for key, value in arguments.items()
        }
        arguments = {key: value for key, value in values.items() if value is not None or key in self.required}
        if unknown := [key for key in arguments if key not in self.kinds]:
            raise BadCall(f"{self.name} has no parameter {one_line(unknown[0])!r}; it has {names}")
        if missing := [key for key in self.kinds if key in self.required and key not in arguments]:
            raise BadCall(f"{self.name} needs {' and '.join(missing)}")
        pictured = [key for key, kind in self.kinds.items() if kind is Image]
        shown = {key: self._image(key, arguments.get(key, 1), seen) for key in pictured}
        first = next(iter(shown.values()), seen[0] if seen else None)
        values = {key: item.image for key, item in shown.items()}
        for key in (key for key in arguments if key not in shown):
            values[key] = self._value(key, arguments[key], first, coordinates)
        value = self.function(**values)
        result = _result(value)
        if self.returns_image and not result.images:
            raise BadObservation(f"{self.name} must return an image; it returned {type(value).__name__}")
        return result

    def _image(self, key: str, number: object, seen: Sequence[SeenImage]) -> SeenImage:
        if isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= len(seen):
            return seen[number - 1]
        raise BadCall(f"{key} ({one_line(number)}) must be the number of an image, from 1 to {len(seen)}")

    def _value(self, key: str, value: object, on: SeenImage | None, coordinates: Coordinates) -> Any:
        kind = self.kinds[key]
        if kind in (Box, Point):
            if on is None:
                raise BadCall(f"{key} needs an image, and there is none")
            try:
                return to_pixels(kind, value, coordinates, on.size, on.image.size)
            except BadCall as error:
                raise BadCall(f"{key}: {error}") from error
        try:
            return TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise BadCall(f"{key} ({one_line(value)}): {problem[0].lower()}{problem[1:]}") from error


def _decoded(value: Any) -> Any:
    """A value that a model wrote as text, as the parameters of the xml form are: JSON where it is."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _without_none(hint: Any) -> Any:
    """`Box` for `Box | None`."""
    if typing.get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not NoneType]
        if len(kinds) == 1:
            return kinds[0]
    return hint


def _result(value: Any) -> ToolResult:
    """What a tool returned: texts, images, or a list of both. Raises BadObservation for images that can't be
    used."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not any(isinstance(item, Image) for item in items):
        items = [value]
    returned = [item for item in items if isinstance(item, Image)]
    for image in returned:
        check_image(image)
    texts = [_text(item) for item in items if not isinstance(item, Image)]
    return ToolResult(shortened("\n".join(text for text in texts if text)), tuple(returned))


def _text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        return str(value)


class ToolEnvironment:
    """Runs the calls of each turn; a turn without one ends the episode."""

    def __init__(self, tools: Sequence[str], syntax: Syntax):
        self.tools = {tool.name: tool for tool in map(Tool.of, tools)}
        self.syntax = syntax

    def reset(self, example: Example) -> None:
        self.images: list[Image] = list(example.images)

    def step(self, response: ResponseText) -> Observation:
        calls = read_calls(response, self.syntax)
        sizes = response.resized
        seen = [SeenImage(image, size) for image, size in zip(self.images, sizes, strict=True) if all(size)]
        counts = {"calls": len(calls), "bad_calls": 0, "tool_errors": 0, "images": 0}
        self.problem = ""
        results = [self._answer(call, seen, response.coordinates, counts) for call in calls]
        returned = [image for result in results for image in result.images]
        self.images += returned
        return Observation(
            results=tuple(results),
            done=not calls,
            info=counts | {"images": len(returned)},
            problem=self.problem,
        )

    def _answer(
        self,
        call: Call | BadCall,
        seen: Sequence[SeenImage],
        coordinates: Coordinates,
        counts: dict[str, int],
    ) -> ToolResult:
        try:
            if isinstance(call, BadCall):
                raise call
            if call.name not in self.tools:
                names = ", ".join(self.tools)
                raise BadCall(f"there is no tool {one_line(call.name)!r}; the tools are {names}")
            return self.tools[call.name].run(call.arguments, seen, coordinates)
        except BadCall as error:
            counts["bad_calls"] += 1
            return ToolResult(f"error: {error}")
        except BadObservation as error:
            counts["tool_errors"] += 1
            self.problem = self.problem or str(error)
            return ToolResult(f"error: {error}")
        except Exception as error:
            counts["tool_errors"] += 1
            self.problem = self.problem or "".join(traceback.format_exception(error))
            last = "".join(traceback.format_exception_only(error)).strip()
            return ToolResult(f"error: {one_line(last, 300)}")
