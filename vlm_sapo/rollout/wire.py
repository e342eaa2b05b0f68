"""What vLLM is asked and what it answers, the same in this process and over HTTP."""

from __future__ import annotations

from typing import Any

import torch

from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.engine import RolloutError
from vlm_sapo.types import Completion, Prompt, Sampling

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

CPU_ARGUMENTS: dict[str, Any] = {
    "enable_chunked_prefill": False,  # a prompt read in parts rewinds its generator, which a CPU's cannot
    "enforce_eager": True,
}
"""Further ones where there is no GPU, as in tests."""


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
    answers: list[tuple[list[int], list[float], str]],
    sampling: Sampling,
) -> list[Completion]:
    """Completions from each answer's ids, log-probs and finish reason.

    Raises Incomplete where there are not as many as were asked for, or one was cut off.
    """
    label = prompt.example.label
    if sampling.temperature == 0:
        answers = [(ids, [0.0] * len(ids), finish) for ids, _, finish in answers] * sampling.group
    if len(answers) != sampling.group:
        raise Incomplete(f"{label}: the engine gave {len(answers)} responses of {sampling.group}")
    for ids, logprobs, finish in answers:
        if finish not in ("stop", "length") or not ids or len(logprobs) != len(ids):
            raise Incomplete(
                f"{label}: the engine gave a response of {len(ids)} tokens and {len(logprobs)} log-probs "
                f"that ended with {finish!r}"
            )
        if drawn := set(ids) & set(vlm.banned):
            raise RolloutError(
                f"{label}: the engine drew {vlm.tokenizer.decode(sorted(drawn))}, which is banned"
            )
    texts = vlm.tokenizer.batch_decode([ids for ids, _, _ in answers], skip_special_tokens=True)
    return [
        Completion(
            ids=torch.tensor(ids),
            logprobs=torch.tensor(logprobs, dtype=torch.float32),
            text=prompt.opening + text,
            finish="stop" if ids[-1] in vlm.stops else "length",
        )
        for (ids, logprobs, _), text in zip(answers, texts, strict=True)
    ]
