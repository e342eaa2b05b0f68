"""Environments of the library verifiers: its MultiTurnEnv, ToolEnv and what is built on them.

rollout:
  environment:
    function: vlm_sapo.environments.adapters.verifiers:VerifiersEnvironment
    args: {env_id: my_module:load_environment}
"""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

from vlm_sapo.environments.adapters.reading import NO_ANSWER, load_package, read_images
from vlm_sapo.environments.calls import CALL, Call, read_calls
from vlm_sapo.environments.environment import Observation
from vlm_sapo.environments.values import BadCall
from vlm_sapo.plugins import resolve
from vlm_sapo.types import IMAGE_PLACEHOLDER, Example, ResponseText

ROW = "verifiers_row"
"""The column with the row of the environment's data set."""
TOOLS = """# Tools

You may call these functions:
<tools>
{tools}
</tools>

For each call write a JSON object with the function's name and arguments:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


class VerifiersEnvironment:
    """One episode of a verifiers environment, graded at its end by its rubric.

    `env_id` is a name that `verifiers.load_environment` knows, or `package.module:function` or
    `path/to/file.py:function` of a function that returns an environment; both get `args`. Rows are those of
    `verifiers_rows` with the same arguments. A tool is called by JSON in `<tool_call>`.
    """

    def __init__(self, env_id: str, args: Mapping[str, Any] | None = None):
        self.environment = _environment(env_id, args)
        self.loop: asyncio.AbstractEventLoop | None = None

    def reset(self, example: Example) -> None:
        """Starts an episode with the row that `verifiers_rows` stored."""
        if ROW not in example.columns:
            raise ValueError(f"{example.label} has no column {ROW}; set data.source to verifiers_rows")
        self.close()
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self._reset(dict(example.columns[ROW])))

    def step(self, response: ResponseText) -> Observation:
        """Passes the turn on, and its calls if the environment has tools."""
        calls = read_calls(response, "json") if self.state["tool_defs"] else []
        if bad := [call for call in calls if isinstance(call, BadCall)]:
            problems = "\n".join(f"error: {error}" for error in bad)
            return Observation(problems, info={"calls": len(calls), "bad_calls": len(bad)})
        messages, done = self.loop.run_until_complete(self._step(str(response), calls))
        info = {"calls": len(calls)} if self.state["tool_defs"] else {}
        if not done:
            text, images = _seen(messages)
            return Observation(text, images, info=info)
        self.loop.run_until_complete(self._score())
        reward, metrics = self.state["reward"], self.state.get("metrics") or {}
        self.close()
        return Observation(done=True, reward=reward, info=metrics | info)

    async def _reset(self, row: dict[str, Any]) -> None:
        state = await self.environment.init_state(row, _no_client(), "policy", None)
        state["timing"].generation.start = time.time()
        self.state = await self.environment.setup_state(state) or state
        self.prompt = await self._next_prompt()

    async def _next_prompt(self) -> list[Any]:
        """All messages before the next turn; from the second turn on the environment answers here."""
        messages = await self.environment.get_prompt_messages(self.state)
        return _normalize(messages)

    async def _step(self, text: str, calls: Sequence[Call]) -> tuple[list[Any], bool]:
        """The messages that the environment adds, and whether the episode is over."""
        message = _message(text, calls)
        await self.environment.add_model_response(self.state, self.prompt, message)
        if await self.environment.is_completed(self.state):
            return [], True
        before = len(self.prompt) + 1
        following = await self._next_prompt()
        if await self.environment.is_completed(self.state):
            return [], True
        self.prompt = following
        return following[before:], False

    async def _score(self) -> None:
        await self.environment.cleanup(self.state)
        await self.environment.rubric.score_rollout(self.state)
        await self.environment.rubric.cleanup(self.state)

    def close(self) -> None:
        """Ends the episode."""
        loop, self.loop = self.loop, None
        if loop is not None and not loop.is_closed():
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def __del__(self):
        with suppress(Exception):
            self.close()


def verifiers_rows(
    env_id: str, args: Mapping[str, Any] | None = None, count: int | None = None
) -> list[dict[str, Any]]:
    """The rows of the environment's data set for `data.source`, at most `count`: its prompt, with what its
    tools are, its answer, and the row itself for VerifiersEnvironment."""
    environment = _environment(env_id, args)
    rows = environment.get_dataset()
    rows = rows if count is None else rows.select(range(min(count, len(rows))))
    return [_row(dict(row), environment.tool_defs or ()) for row in rows]


def _row(row: dict[str, Any], tools: Sequence[Any]) -> dict[str, Any]:
    prompt = row["prompt"]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(map(_turn, prompt))
    if tools:
        own = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else ""
        own = own if isinstance(own, str) else "".join(part["text"] for part in own)
        turns.insert(0, {"role": "system", "content": "\n\n".join(filter(None, (own, _offer(tools))))})
    return {"prompt": turns, "answer": row.get("answer") or NO_ANSWER, ROW: row}


def _turn(message: Any) -> dict[str, Any]:
    """A message as the reader of rows takes it, without the empty fields that data sets add."""
    content = _field(message, "content")
    if isinstance(content, list | tuple):
        content = [_part(part) for part in content]
    return {"role": _field(message, "role"), "content": content}


def _part(part: Any) -> dict[str, Any]:
    kind = _field(part, "type")
    if kind == "text":
        return {"type": "text", "text": _field(part, "text")}
    if kind == "image_url":
        return {"type": "image_url", "image_url": {"url": _field(_field(part, "image_url"), "url")}}
    raise ValueError(f"a message has a part of the type {kind}; only text and image_url can be shown")


def _field(value: Any, name: str) -> Any:
    """Of a message, which is a mapping or an object."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _seen(messages: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
    """The text of messages, with marks where their images go, and the images."""
    texts, images = [], []
    for turn in map(_turn, messages):
        content = turn["content"]
        parts = [{"type": "text", "text": content or ""}] if not isinstance(content, list) else content
        text = ""
        for part in parts:
            if part["type"] == "text":
                text += part["text"].replace(IMAGE_PLACEHOLDER, "<img>")
                continue
            read = read_images(part["image_url"]["url"], "image_url")
            images += read
            text += IMAGE_PLACEHOLDER * len(read)
        texts.append(f"<tool_response>\n{text}\n</tool_response>" if turn["role"] == "tool" else text)
    return "\n".join(texts), tuple(images)


def _offer(tools: Sequence[Any]) -> str:
    """What a model reads about its tools."""
    names = ("name", "description", "parameters")
    described = [
        {"type": "function", "function": {name: _field(tool, name) for name in names}} for tool in tools
    ]
    return TOOLS.format(tools="\n".join(json.dumps(item, ensure_ascii=False) for item in described))


def _load() -> Any:
    """The library. Raises ValueError if it is missing or a version without classic environments."""
    verifiers = load_package("verifiers", user="VerifiersEnvironment", extra="verifiers")
    try:
        classic = hasattr(verifiers, "MultiTurnEnv") and hasattr(verifiers, "load_environment")
    except ImportError:
        classic = False
    if not classic:
        version = getattr(verifiers, "__version__", "of an unknown version")
        raise ValueError(
            f"VerifiersEnvironment plays MultiTurnEnv and ToolEnv, which verifiers {version} doesn't have; "
            "install an older one: pip install 'verifiers<0.4'"
        )
    return verifiers


def _environment(env_id: str, args: Mapping[str, Any] | None) -> Any:
    """The environment, loaded once per process. Raises ValueError if it isn't played turn by turn."""
    _load()
    return _loaded(env_id, json.dumps(dict(args or {}), sort_keys=True))


@lru_cache(maxsize=16)
def _loaded(env_id: str, args: str) -> Any:
    verifiers, options = _load(), json.loads(args)
    with _signals_as_before():
        if ":" in env_id:
            environment = resolve(env_id, field="env_id")(**options)
        else:
            environment = verifiers.load_environment(env_id, **options)
    if not isinstance(environment, verifiers.MultiTurnEnv):
        raise ValueError(
            f"env_id ({env_id}) must be a MultiTurnEnv of verifiers; it is a {type(environment).__name__}"
        )
    return environment


@contextmanager
def _signals_as_before() -> Iterator[None]:
    """An environment of verifiers handles Ctrl-C and SIGTERM, which are the run's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _normalize(messages: Any) -> list[Any]:
    from verifiers.utils.message_utils import maybe_normalize_messages

    return list(maybe_normalize_messages(messages, field_name="messages"))


def _message(text: str, calls: Sequence[Call]) -> Any:
    """A turn as verifiers stores what a model answered."""
    from verifiers.types import Response, ResponseMessage, ToolCall

    asked = [
        ToolCall(id=f"call_{number}", name=call.name, arguments=json.dumps(dict(call.arguments)))
        for number, call in enumerate(calls)
    ]
    message = ResponseMessage(
        content=CALL.sub("", text).strip() if asked else text,
        tool_calls=asked or None,
        finish_reason="tool_calls" if asked else "stop",
        is_truncated=False,
    )
    return Response(id="0", created=int(time.time()), model="policy", message=message)


def _no_client() -> Any:
    """The client that a state needs; no model is asked through it."""
    from verifiers.clients import Client

    def unused(self, *args, **kwargs):
        raise RuntimeError("the policy's turns come from the run")

    methods = dict.fromkeys(Client.__abstractmethods__, unused)
    return type("NoClient", (Client,), methods | {"__init__": lambda self: None})()
