"""A judge: a language model behind an OpenAI-compatible endpoint grades the answer."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import urlopen

from vlm_sapo.rewards.verifiers.answers import Finding, NoAnswer, find_answer, readable
from vlm_sapo.types import Example

if TYPE_CHECKING:
    from openai import AsyncOpenAI

PROBE_SECONDS = 5.0
"""Time for the endpoint to answer when a run starts."""
PROMPT = """\
Question: {problem}
Reference answer: {answer}
Given answer: {given}

Does the given answer mean the same as the reference answer? Reply with one word, yes or no."""


async def judge(
    response: str,
    example: Example,
    *,
    url: str,
    model: str,
    prompt: str = PROMPT,
    key_variable: str = "OPENAI_API_KEY",
    retries: int = 5,
    finding: Finding = "marked",
) -> float:
    """1.0 where the judge's reply begins with yes, 0.0 where with no; anything else has no answer.

    `url` is the endpoint's base, such as http://127.0.0.1:8000/v1; the key comes from the environment. Failed
    requests are tried again with growing pauses; a request that fails for good raises. Needs the `judge`
    extra.
    """
    response, example = readable(response, example)
    answer = find_answer(response, finding)
    content = prompt.format(problem=example.problem, answer=example.answer, given=answer)
    reply = await _Endpoint(url, model, key_variable, retries).ask(content)
    verdict = re.match(r"\W*(yes|no)\b", reply, re.IGNORECASE)
    if verdict is None:
        raise NoAnswer
    return float(verdict[1].casefold() == "yes")


def check_endpoint(args: Mapping[str, Any], *, field: str) -> None:
    """Raises ValueError naming `field` if no server answers at the url of a judge's arguments."""
    url = str(args["url"])
    try:
        with urlopen(f"{url.rstrip('/')}/models", timeout=PROBE_SECONDS):
            pass
    except HTTPError:
        pass  # a server without this page, or one that wants a key
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(
            f"{field}.args.url ({url}) must be an endpoint that answers ({error}); start its server, or mend "
            "the url"
        ) from error


@dataclass(frozen=True)
class _Endpoint:
    url: str
    model: str
    key_variable: str
    retries: int

    async def ask(self, content: str) -> str:
        reply = await _client(self).chat.completions.create(
            model=self.model, temperature=0.0, max_tokens=8, messages=[{"role": "user", "content": content}]
        )
        return reply.choices[0].message.content or ""


@cache  # a client keeps its connections between calls
def _client(endpoint: _Endpoint) -> AsyncOpenAI:
    from openai import AsyncOpenAI  # an extra

    key = os.environ.get(endpoint.key_variable, "none")
    return AsyncOpenAI(base_url=endpoint.url, api_key=key, max_retries=endpoint.retries)
