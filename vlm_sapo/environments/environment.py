"""What an environment is, and what it may return."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL.Image import Image

from vlm_sapo.types import Example, ResponseText

MOST_CHARACTERS = 20_000
"""Of a text that an environment or a tool returns; the rest is cut off."""
MOST_PIXELS = 2**26
"""Of an image that an environment or a tool returns: 8192 x 8192."""


@dataclass(frozen=True)
class ToolResult:
    """The answer to one tool call."""

    text: str = ""
    images: tuple[Image, ...] = ()


@dataclass(frozen=True)
class Observation:
    """An environment's answer to a turn."""

    text: str = ""
    """The next user turn, with `<image>` where an image goes; without any, the images come first. Ignored if
    the episode is over."""
    images: tuple[Image, ...] = ()
    """Images of that turn, in any mode and size; they are resized as a prompt's are."""
    done: bool = False
    """Whether the episode is over."""
    reward: float | None = None
    """Added to the response's reward; rewards of all turns are summed."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Anything else. Numbers are summed over the turns and logged as `environment/NAME`, a mean over
    responses."""
    problem: str = ""
    """What went wrong, such as a traceback, for the user: the first one is shown."""
    results: tuple[ToolResult, ...] = ()
    """Answers to tool calls, each written as the chat template writes one, instead of a user turn."""


class Environment(Protocol):
    """One episode. Each response gets a new object."""

    def reset(self, example: Example) -> None:
        """Starts the episode with the problem that the policy answers."""

    def step(self, response: ResponseText) -> Observation:
        """Answers a turn of the policy: a text that also knows the sizes and coordinates in which the model
        sees all images so far (`resized`, `coordinates`)."""


class BadObservation(ValueError):
    """What an environment returned can't be used."""


def checked(observation: object) -> Observation:
    """The observation with plain values, and long texts cut. Raises BadObservation, which says what must
    change."""
    if not isinstance(observation, Observation):
        raise BadObservation(f"step must return an Observation; it returned {type(observation).__name__}")
    if observation.results and (observation.text or observation.images):
        raise BadObservation("an Observation with results must have no text and no images of its own")
    reward = observation.reward
    if reward is not None and not _is_finite(reward):
        raise BadObservation(f"the reward of an Observation must be a finite number; it is {reward!r}")
    text, images = _checked_answer(observation.text, observation.images)
    return Observation(
        text,
        images,
        done=bool(observation.done),
        reward=None if reward is None else float(reward),
        problem=shortened(str(observation.problem)),
        info={str(name): _plain(value) for name, value in observation.info.items() if _is_finite(value)},
        results=tuple(ToolResult(*_checked_answer(item.text, item.images)) for item in observation.results),
    )


def _checked_answer(text: object, images: Sequence[object]) -> tuple[str, tuple[Image, ...]]:
    if not isinstance(text, str):
        raise BadObservation(
            f"the text of an Observation or ToolResult must be a str; it is a {type(text).__name__}"
        )
    for image in images:
        check_image(image)
    return shortened(str(text)), tuple(images)


def _plain(value: Any) -> int | float:
    """A number of Python's own, since checkpoints hold no others."""
    return int(value) if float(value).is_integer() else float(value)


def check_image(image: object) -> None:
    """Raises BadObservation for what is no image, or one that is too large."""
    if not isinstance(image, Image):
        raise BadObservation(f"an image must be a PIL image; it is a {type(image).__name__}")
    if image.width * image.height > MOST_PIXELS:
        raise BadObservation(
            f"an image may have {MOST_PIXELS:,} pixels; this one is {image.width}x{image.height}: make it "
            "smaller"
        )


def shortened(text: str) -> str:
    """The text, or its beginning and how much is left out."""
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]}\n... ({len(text) - MOST_CHARACTERS:,} more characters are left out)"


def _is_finite(value: object) -> bool:
    try:
        return not isinstance(value, str) and math.isfinite(float(value))
    except (TypeError, ValueError, RuntimeError):  # torch's for a tensor of several numbers
        return False
