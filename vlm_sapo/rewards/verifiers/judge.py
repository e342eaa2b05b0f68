"""A judge: a language model behind an OpenAI-compatible endpoint grades the answer."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from vlm_sapo.rewards.verifiers.answers import Finding, NoAnswer, find_answer, readable
from vlm_sapo.types import Example

if TYPE_CHECKING:
    from openai import AsyncOpenAI

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
