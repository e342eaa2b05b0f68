"""A judge: a language model behind an OpenAI-compatible endpoint decides."""

from __future__ import annotations

import os
import re
from functools import cache

from vlm_sapo.rewards.verifiers.answers import Finding, NoAnswer, find_answer
from vlm_sapo.types import Example

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
    given = find_answer(response, finding)
    content = prompt.format(problem=example.problem, answer=example.answer, given=given)
    reply = await _client(url, key_variable, retries).chat.responses.create(
        model=model, temperature=0.0, max_tokens=8, messages=[{"role": "user", "content": content}]
    )
    verdict = re.match(r"\W*(yes|no)\b", reply.choices[0].message.content or "", re.IGNORECASE)
    if verdict is None:
        raise NoAnswer
    return float(verdict[1].casefold() == "yes")


@cache
def _client(url: str, key_variable: str, retries: int):
    from openai import AsyncOpenAI  # an extra

    return AsyncOpenAI(base_url=url, api_key=os.environ.get(key_variable, "none"), max_retries=retries)
