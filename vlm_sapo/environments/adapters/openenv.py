"""Environments of OpenEnv: a server plays the episode, this is its client.

rollout:
  environment:
    function: vlm_sapo.environments.adapters.openenv:OpenEnvEnvironment
    args: {url: "http://127.0.0.1:8000", action: move, text: text, images: screenshot}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from PIL import Image

from vlm_sapo.environments.adapters.reading import (
    NO_ANSWER,
    as_text,
    load_package,
    marked_action,
    outside_thoughts,
    read_images,
)
from vlm_sapo.environments.environment import Observation
from vlm_sapo.types import Example, ResponseText, one_line

ERRORS = {"(code: VALIDATION_ERROR)": "bad_calls", "(code: EXECUTION_ERROR)": "step_errors"}
"""Errors of a server that the model reads, and what they are counted as; others end the episode."""


class OpenEnvEnvironment:
    """One session with the OpenEnv server at `url`, started with the row's column `seed` if it has one.

    The text of a turn, or of it what `\\boxed{}` or `<action>` marks, is sent in the field `action`, beside
    the fields `constants`; with `action: null` it must be a JSON object, which is the whole action. `text`
    and `images` name the fields of an observation, or None. `timeout` is for one answer of the server.
    """

    def __init__(
        self,
        url: str,
        action: str | None = "message",
        constants: Mapping[str, Any] | None = None,
        text: str | None = "text",
        images: str | Sequence[str] | None = None,
        timeout: float = 60.0,
    ):
        _load()
        self.url, self.action, self.constants = url, action, dict(constants or {})
        self.text, self.images, self.timeout = text, images, timeout
        self.session: Any = None

    def reset(self, example: Example) -> None:
        """Starts a session. `start` is the state that the row's problem shows."""
        self.close()
        seed = example.columns.get("seed")
        self.session = _connect(self.url, self.timeout)
        result = self.session.reset(**({} if seed is None else {"seed": int(seed)}))
        self.start = _seen(result.observation, self.text, self.images)

    def step(self, response: ResponseText) -> Observation:
        """Sends the turn as an action."""
        try:
            action = self._action(response)
        except ValueError as error:
            return Observation(f"error: {error}", info={"bad_calls": 1})
        try:
            result = self.session.step(action)
        except RuntimeError as error:
            counted = next((name for code, name in ERRORS.items() if code in str(error)), None)
            if counted is None:
                raise
            return Observation(f"error: {one_line(error, 500)}", info={counted: 1})
        if result.done:
            self.close()
            return Observation(done=True, reward=result.reward)
        text, images = _seen(result.observation, self.text, self.images)
        return Observation(text, images, reward=result.reward)

    def _action(self, response: ResponseText) -> dict[str, Any]:
        text = marked_action(response)
        text = outside_thoughts(response).strip() if text is None else text
        if self.action is not None:
            return self.constants | {self.action: text}
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{one_line(text)!r} is no JSON ({error})") from error
        if not isinstance(value, dict):
            raise ValueError(f"{one_line(text)!r} must be a JSON object")
        return self.constants | value

    def close(self) -> None:
        """Ends the session."""
        session, self.session = self.session, None
        if session is not None:
            session.close()

    def __del__(self):
        with suppress(Exception):
            self.close()


def openenv_rows(
    url: str,
    count: int,
    problem: str = "",
    text: str | None = "text",
    images: str | Sequence[str] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """`count` rows for `data.source`, each with the first observation of a session and its seed, from `seed`
    on. `problem` is what the model is asked; the observation's text follows it."""
    _load()
    rows = []
    for number in range(seed, seed + count):
        session = _connect(url, 60.0)
        try:
            first, shown = _seen(session.reset(seed=number).observation, text, images)
        finally:
            session.close()
        pictured = {"images": list(shown)} if shown else {}
        task = "\n".join(filter(None, (problem, first)))
        rows.append({"problem": task, **pictured, "answer": NO_ANSWER, "seed": number})
    return rows


def _load() -> Any:
    return load_package("openenv.core.generic_client", user="OpenEnvEnvironment", extra="openenv")


def _connect(url: str, timeout: float) -> Any:
    session = _load().GenericEnvClient(base_url=url, message_timeout_s=timeout).sync()
    try:
        session.connect()
    except BaseException:
        session.close()
        raise
    return session


def _seen(
    observation: Mapping[str, Any], text: str | None, images: str | Sequence[str] | None
) -> tuple[str, tuple[Image.Image, ...]]:
    """The text and the images of an observation. Raises ValueError for a field that it lacks."""
    fields = [images] if isinstance(images, str) else list(images or ())
    for option, field in (("text", text), *(("images", field) for field in fields)):
        if field is not None and field not in observation:
            raise ValueError(
                f"{option} ({field}) must be a field of the observation, which has {', '.join(observation)}"
            )
    value = None if text is None else observation[text]
    shown = tuple(image for field in fields for image in read_images(observation[field], field))
    return "" if value is None else as_text(value), shown
