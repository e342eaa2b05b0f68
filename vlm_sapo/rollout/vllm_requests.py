"""What vLLM is asked and what it answers, the same in this process and over HTTP."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.engine import RolloutError
from vlm_sapo.types import Prompt, Response, Sampling

BAN = -100.0
"""Added to a banned token's logit, the most that vLLM allows: a factor of 4e-44 in its probability."""
SPREAD = 65_537
"""vLLM seeds a prompt's responses with the prompt's seed and the numbers after it, so prompts' seeds must lie
further apart than a group is large."""
ENGINE_ARGUMENTS: dict[str, Any] = {
    "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled, after temperature and bans
    "generation_config": "vllm",  # none of the checkpoint's own top_p, top_k or repetition penalty
    "mm_processor_kwargs": {"do_resize": False},  # pictures arrive in their final size
}

EXPERTS_ARGUMENTS: dict[str, Any] = {"enable_return_routed_experts": True}
"""Further ones where responses must tell their tokens' experts."""
CPU_ARGUMENTS: dict[str, Any] = {
    "enable_chunked_prefill": False,  # a prompt read in parts rewinds its generator, which a CPU's cannot
    "enforce_eager": True,
}
"""Further ones where there is no GPU, as in tests."""


class Answer(NamedTuple):
    """One response of vLLM."""

    ids: list[int]
    logprobs: list[float]
    finish: str | None
    experts: np.ndarray | None = None
    """[P + R - 1, layers of any kind, k] of prompt and response but the last token, where it was asked."""


class Incomplete(RolloutError):
    """An answer that lacks something; another try may have it."""


def question(vlm: VLM, prompt: Prompt, sampling: Sampling, number: int) -> tuple[list[int], dict[str, Any]]:
    """A prompt's ids with one token per picture, and the fields of vLLM's SamplingParams."""
    greedy = sampling.temperature == 0
    return vlm.unexpanded(prompt), {
        "n": 1 if greedy else sampling.group,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": sampling.seed_of(number) * SPREAD % 2**62,
        "logprobs": 0,
        "logit_bias": dict.fromkeys(vlm.banned, BAN),
        "stop_token_ids": vlm.stops,
        "ignore_eos": True,  # the stops above are all that ends a response
        "detokenize": False,
    }


def check_ids(vlm: VLM, prompt: Prompt, ids: list[int]) -> None:
    """Raises RolloutError where the engine read another prompt than the trainer will."""
    if ids == prompt.ids.tolist():
        return
    image = vlm.model.config.image_token_id
    own, other = int((prompt.ids == image).sum()), ids.count(image)
    sizes = ", ".join(f"{picture.width}x{picture.height}" for picture in prompt.images) or "none"
    raise RolloutError(
        f"{prompt.example.label}: the engine read {len(ids)} prompt tokens, {other} of them for pictures, "
        f"the trainer {len(prompt.ids)} and {own} (pictures: {sizes}). Its processor must be that of the "
        "trained checkpoint and must not resize: start servers with `vlm-sapo serve`, which sets "
        "--mm-processor-kwargs '{\"do_resize\": false}'"
    )


def complete(
    vlm: VLM,
    prompt: Prompt,
    answers: list[Answer],
    sampling: Sampling,
    *,
    experts: bool = False,
) -> list[Response]:
    """Completions from answers; with `experts` they tell those of their tokens.

    Raises Incomplete where there are not as many as were asked for, or one was cut off.
    """
    label = prompt.example.label
    if sampling.temperature == 0:
        answers = [answer._replace(logprobs=[0.0] * len(answer.ids)) for answer in answers] * sampling.group
    if len(answers) != sampling.group:
        raise Incomplete(f"{label}: the engine gave {len(answers)} responses of {sampling.group}")
    for ids, logprobs, finish, _ in answers:
        if finish not in ("stop", "length") or not ids or len(logprobs) != len(ids):
            raise Incomplete(
                f"{label}: the engine gave a response of {len(ids)} tokens and {len(logprobs)} log-probs "
                f"that ended with {finish!r}"
            )
        if drawn := set(ids) & set(vlm.banned):
            raise RolloutError(
                f"{label}: the engine drew {vlm.tokenizer.decode(sorted(drawn))}, which is banned"
            )
    texts = vlm.tokenizer.batch_decode([answer.ids for answer in answers], skip_special_tokens=True)
    return [
        Response(
            ids=torch.tensor(answer.ids),
            logprobs=torch.tensor(answer.logprobs, dtype=torch.float32),
            text=prompt.opening + text,
            finish="stop" if answer.ids[-1] in vlm.stops else "length",
            experts=_experts(vlm, prompt, answer) if experts else None,
        )
        for answer, text in zip(answers, texts, strict=True)
    ]


def _experts(vlm: VLM, prompt: Prompt, answer: Answer) -> torch.Tensor:
    """[P + R - 1, M, k] of the layers that have experts."""
    tokens = len(prompt.ids) + len(answer.ids) - 1
    if answer.experts is None or len(answer.experts) != tokens:
        told = "no experts" if answer.experts is None else f"the experts of {len(answer.experts)} tokens"
        raise RolloutError(
            f"{prompt.example.label}: the engine told {told}, and algo.replay (r3) needs those of {tokens}; "
            "start servers with `vlm-sapo serve`, which sets --enable-return-routed-experts, or set "
            "algo.replay=r2"
        )
    kind = np.uint8 if answer.experts.dtype == np.uint8 else np.int16
    return torch.from_numpy(answer.experts[:, vlm.routers.layers].astype(kind))
