"""Reward functions with TRL's signature: `(completions, **columns)` for a list of responses at once."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_sapo.types import Example, ResponseText, one_line

COMPLETIONS = "completions"
SUPPLIED = ("prompts", COMPLETIONS, "images", "image")


def has_trl_signature(function: Callable[..., Any]) -> bool:
    """Whether a function takes `completions`, and no `examples` as a batched one of ours does."""
    names = inspect.signature(function).parameters
    return COMPLETIONS in names and "examples" not in names


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calls are awaited, also of a partial function or an object."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class TrlReward:
    """A function of TRL's signature, called as a batched one: `(responses, examples, **args)`.

    It gets lists with an entry per response: `completions` and `prompts`, as texts, or as lists of messages
    where the row's own `prompt` is one; the columns of the rows; and `images` (a list of images each) and
    `image` (the first). Returns its scores, None where it has none.
    """

    def __init__(self, function: Callable[..., Any], name: str = "function"):
        self.function, self.name = function, name
        self.parameters = inspect.signature(function).parameters.values()
        if is_async(function):
            raise ValueError(
                f"the async function {name} must take (response, example); TRL's signature is read for "
                "ordinary functions only"
            )

    def check_args(self, args: Mapping[str, Any], field: str) -> None:
        """Raises ValueError for arguments that the function doesn't take."""
        names = [item.name for item in self.parameters]
        takes_all = any(item.kind is item.VAR_KEYWORD for item in self.parameters)
        if not takes_all and (unknown := [name for name in args if name not in names]):
            raise ValueError(
                f"{field}.args ({dict(args)}) must fit {self.name}({', '.join(names)}); it has no "
                f"{unknown[0]}"
            )

    def __call__(
        self, responses: Sequence[ResponseText], examples: Sequence[Example], **args: Any
    ) -> list[float | None]:
        supplied = _columns(examples) | {
            "prompts": [_prompt(example) for example in examples],
            COMPLETIONS: [
                _completion(response, example) for response, example in zip(responses, examples, strict=True)
            ],
            "images": [list(example.images) for example in examples],
            "image": [example.images[0] if example.images else None for example in examples],
        }
        supplied |= args
        named = [item for item in self.parameters if item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)]
        required = [item.name for item in named if item.default is item.empty]
        if missing := [name for name in required if name not in supplied]:
            raise TypeError(
                f"{self.name} asks for `{missing[0]}`, which is no column of these rows; they have "
                f"{one_line(', '.join(sorted(set(supplied) - set(SUPPLIED))))}"
            )
        takes_all = any(item.kind is item.VAR_KEYWORD for item in self.parameters)
        names = supplied if takes_all else [item.name for item in named if item.name in supplied]
        try:
            scores = self.function(**{name: supplied[name] for name in names})
        except TypeError as error:
            if "string indices must be integers" not in str(error) or any(map(_is_conversation, examples)):
                raise
            raise TypeError(
                f"{error}; completions are texts here, since the rows have no column `prompt` with a list of "
                "messages: give them one (data.transform), or read the text itself"
            ) from error
        return [None if value is None or math.isnan(value) else value for value in scores]


def _columns(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """The rows' columns as lists; None for a row that lacks one. Where no row has a column of these names,
    `answer` and `problem` are what the rows' columns were read as."""
    names = dict.fromkeys(name for example in examples for name in example.columns)
    read = {
        "answer": [example.answer for example in examples],
        "problem": [example.problem for example in examples],
    }
    return read | {name: [example.columns.get(name) for example in examples] for name in names}


def _is_conversation(example: Example) -> bool:
    return isinstance(example.columns.get("prompt"), list)


def _prompt(example: Example) -> Any:
    return example.columns["prompt"] if _is_conversation(example) else example.problem


def _completion(response: ResponseText, example: Example) -> Any:
    text = str(response)
    return [{"role": "assistant", "content": text}] if _is_conversation(example) else text
