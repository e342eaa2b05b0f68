"""Environments of Gymnasium: the model names an action, and sees the frame that follows.

rollout:
  environment:
    function: vlm_sapo.environments.adapters.gymnasium:GymnasiumEnvironment
    args: {id: FrozenLake-v1, actions: {left: 0, down: 1, right: 2, up: 3}}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

import numpy
from PIL import Image

from vlm_sapo.environments.adapters.reading import (
    NO_ANSWER,
    as_text,
    load_package,
    missing_package,
    read_action,
)
from vlm_sapo.environments.environment import Observation
from vlm_sapo.types import Example, ResponseText, one_line

Show = Literal["image", "text", "both"]
"""What the model sees of a state: the rendered frame, the observation as text, or both."""


class GymnasiumEnvironment:
    """One episode of `gymnasium.make(id, **kwargs)`, with the seed of the row's column `seed`, by default 0.

    `actions` maps what the model writes to what the environment gets; None allows the numbers of a discrete
    space. An action that isn't among them is answered by a list of them, counts in `bad_calls` and leaves the
    environment as it is. After `max_steps` actions the episode ends, by default as the environment says.
    """

    def __init__(
        self,
        id: str,
        actions: Mapping[str, Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        show: Show = "image",
        max_steps: int | None = None,
    ):
        _check_show(show)
        _load()
        self.id, self.actions, self.kwargs = id, actions, dict(kwargs or {})
        self.show, self.max_steps = show, max_steps
        self.game: Any = None

    def reset(self, example: Example) -> None:
        """Starts an episode. `start` is the state that the row's problem shows."""
        self.close()
        self.game = _make(self.id, self.kwargs, self.show, self.max_steps)
        self.choices = _choices(self.game.action_space, self.actions)
        value, _ = self.game.reset(seed=int(example.columns.get("seed") or 0))
        self.start = _seen(self.game, value, self.show)

    def step(self, response: ResponseText) -> Observation:
        """Carries out the action that the turn names."""
        name, text = read_action(response, list(self.choices))
        if name is None:
            problem = f"There is no action {one_line(text)!r}." if text else "Your reply names no action."
            return Observation(f"{problem} {_offer(self.choices)}", info={"bad_calls": 1})
        value, reward, terminated, truncated, _ = self.game.step(self.choices[name])
        text, images = _seen(self.game, value, self.show)
        done = bool(terminated or truncated)
        if done:
            self.close()
        return Observation(text, images, done, float(reward), {"actions": 1, "truncated": int(truncated)})

    def close(self) -> None:
        """Ends the episode."""
        game, self.game = self.game, None
        if game is not None:
            game.close()

    def __del__(self):
        with suppress(Exception):
            self.close()


def gymnasium_rows(
    id: str,
    count: int,
    actions: Mapping[str, Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    show: Show = "image",
    problem: str = "",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """`count` rows for `data.source`, each with the first frame of an episode and its seed, from `seed` on.

    `problem` is what the model is asked, by default the environment's id; what the actions are and how to
    write one is added. Give the environment the same `id`, `actions`, `kwargs` and `show`.
    """
    _check_show(show)
    _load()
    game = _make(id, dict(kwargs or {}), show, None)
    rows = []
    try:
        offer = _offer(_choices(game.action_space, actions))
        for number in range(seed, seed + count):
            value, _ = game.reset(seed=number)
            text, images = _seen(game, value, show)
            task = "\n".join(filter(None, (problem or f"You play {id}, one action each turn.", text, offer)))
            pictured = {"images": list(images)} if images else {}
            rows.append({"problem": task, **pictured, "answer": NO_ANSWER, "seed": number})
    finally:
        game.close()
    return rows


def _load() -> Any:
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # frames are rendered without a screen
    return load_package("gymnasium", user="GymnasiumEnvironment", extra="environments")


def _check_show(show: str) -> None:
    if show not in ("image", "text", "both"):
        raise ValueError(f"show ({show}) must be image, text or both")


def _make(id: str, kwargs: Mapping[str, Any], show: Show, max_steps: int | None) -> Any:
    """The environment. Raises ValueError if there is none of this name or a package of it is missing."""
    gymnasium = _load()
    options = {} if show == "text" else {"render_mode": "rgb_array"}
    if max_steps is not None:
        options["max_episode_steps"] = max_steps
    try:
        return gymnasium.make(id, **options, **kwargs)
    except gymnasium.error.DependencyNotInstalled as error:
        raise _missing(id, error) from error
    except gymnasium.error.Error as error:
        raise ValueError(f"id ({id}) can't be created with {dict(kwargs)}: {error}") from error


def _missing(id: str, error: Exception) -> ValueError:
    """The error of a package that an environment or its frames need. Gymnasium's own message names others."""
    if "pygame" in str(error):
        return missing_package("pygame-ce", id, "environments", error)
    return ValueError(f"{id} needs a package: {error}")


def _choices(space: Any, actions: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the environment gets, by what the model writes. Raises ValueError for what isn't in its space."""
    if actions is None:
        if not isinstance(space, _load().spaces.Discrete):
            raise ValueError(f"actions must be set, since {space} has no numbers; such as {{push: [0.5]}}")
        return {str(number): number for number in range(int(space.start), int(space.start + space.n))}
    choices = {}
    for name, value in actions.items():
        if isinstance(name, bool):
            raise ValueError(f"actions has the key {name}, as YAML reads yes, no, on and off: quote it")
        choices[str(name)] = numpy.asarray(value, space.dtype) if isinstance(value, list | tuple) else value
        if not space.contains(choices[str(name)]):
            raise ValueError(f"actions.{name} ({value}) must be in {space}")
    if len({name.casefold() for name in choices}) < max(len(choices), 1):
        raise ValueError("actions must have at least one name, and names that differ in more than case")
    return choices


def _offer(choices: Mapping[str, Any]) -> str:
    return f"The actions are: {', '.join(choices)}. Write your next one as \\boxed{{action}}."


def _seen(game: Any, value: Any, show: Show) -> tuple[str, tuple[Image.Image, ...]]:
    """The text and the images that show a state."""
    text = "" if show == "image" else f"Observation: {as_text(value)}"
    if show == "text":
        return text, ()
    try:
        frame = game.render()
    except _load().error.DependencyNotInstalled as error:
        raise _missing(game.spec.id, error) from error
    if not isinstance(frame, numpy.ndarray):
        raise ValueError(f"{game.spec.id} renders no frame ({type(frame).__name__}); set show: text")
    return text, (Image.fromarray(frame),)
