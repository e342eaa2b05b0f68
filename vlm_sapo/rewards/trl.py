"""Reward functions with TRL's signature: `(completions, **columns)` for a list of responses at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from vlm_sapo.types import Example, ResponseText, one_line

COMPLETIONS = "completions"
SUPPLIED = ("prompts", COMPLETIONS, "images", "image")


def has_trl_signature(function: Callable[..., Any]) -> bool:
    """Whether a function takes `completions`, which no function of ours does."""
    return COMPLETIONS in inspect.signature(function).parameters


class TrlReward:
    """A function of TRL's signature, called as a batched one: `(responses, examples, **args)`.

    It gets lists with an entry per response: `completions` and `prompts`, as texts, or as lists of messages
    where the row's own `prompt` is one; the columns of the rows; and `images` (a list of images each) and
    `image` (the first). Returns its scores, None where it has none.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        if inspect.iscoroutinefunction(function):
            raise ValueError(
                f"the async function {function.__name__} must take (response, example); TRL's signature is "
                "read for ordinary functions only"
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
        parameters = inspect.signature(self.function).parameters.values()
        named = [item.name for item in parameters if item.kind is not item.VAR_KEYWORD]
        required = [item.name for item in parameters if item.name in named and item.default is item.empty]
        if missing := [name for name in required if name not in supplied]:
            raise TypeError(
                f"{self.function.__name__} asks for `{missing[0]}`, which is no column of these rows; they "
                f"have {one_line(', '.join(sorted(set(supplied) - set(SUPPLIED))))}"
            )
        takes_all = len(named) < len(parameters)
        call = supplied if takes_all else {name: supplied[name] for name in named if name in supplied}
        return list(self.function(**call))


def _columns(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """The rows' columns as lists; None for a row that lacks one."""
    names = dict.fromkeys(name for example in examples for name in example.columns)
    return {name: [example.columns.get(name) for example in examples] for name in names}


def _is_conversation(example: Example) -> bool:
    return isinstance(example.columns.get("prompt"), list)


def _prompt(example: Example) -> Any:
    return example.columns["prompt"] if _is_conversation(example) else example.problem


def _completion(response: ResponseText, example: Example) -> Any:
    text = str(response)
    return [{"role": "assistant", "content": text}] if _is_conversation(example) else text
