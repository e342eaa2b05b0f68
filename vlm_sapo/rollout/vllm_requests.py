"""Requests to vLLM and its outputs, the same in this process and over HTTP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.engine import RolloutError, continue_response
from vlm_sapo.types import Context, Prompt, Response, Sampling

PROBLEMS_AT_ONCE = 256
"""Problems that an evaluation passes to vLLM in one call; vLLM batches them itself."""
MAX_IMAGES = 16
"""Most images of a prompt, unless `rollout.engine.options` set another limit."""
BAN = -100.0
"""Added to a banned token's logit, the most that vLLM allows: a factor of 4e-44 in its probability."""
SEED_STRIDE = 65_537
"""vLLM seeds the responses of a group with seed, seed + 1, ..., so the seeds of prompts must be further apart
than a group is large."""
TURN_STRIDE = 1_000_003
"""Factor of the number of tokens so far in the seed of a continued response."""
EXPERTS_ARGUMENTS: dict[str, Any] = {"enable_return_routed_experts": True}
"""Added if responses must carry their tokens' experts."""
CPU_ARGUMENTS: dict[str, Any] = {
    "enable_chunked_prefill": False,  # it would rewind the random generator, which fails on a CPU
    "enforce_eager": True,
}
"""Added without a GPU, as in tests."""


def engine_arguments(vlm: VLM, max_pixels: int | None, returned: int = 0) -> dict[str, Any]:
    """What makes vLLM compute what the trainer does, in this process and as a server. From the largest area
    of an image vLLM derives how many it may encode at a time, and the memory that it keeps for that.
    `returned` is the most images of a response."""
    return {
        "logprobs_mode": "processed_logprobs",  # of the sampled distribution, after temperature and bans
        "generation_config": "vllm",  # none of the checkpoint's own top_p, top_k or repetition penalty
        "limit_mm_per_prompt": {"image": MAX_IMAGES + returned, "video": 0},
        "mm_processor_kwargs": vlm.family.engine_processing(vlm.model.config, max_pixels),
    }


class VllmOutput(NamedTuple):
    """A response as vLLM returns it."""

    ids: list[int]
    logprobs: list[float]
    finish: str | None
    experts: np.ndarray | None = None
    """[P + R - 1, layers of any kind, k] of prompt and response without the last token, if requested."""


class Incomplete(RolloutError):
    """An incomplete answer; a retry may be complete."""


@dataclass(frozen=True)
class Request:
    """A group of responses to a prompt, or the continuation of one response so far."""

    context: int
    """Index of its context in the call."""
    prompt: Prompt
    """Of all tokens and images so far, those of `so_far` included."""
    so_far: Response | None
    ids: list[int]
    """[P + tokens so far], with image tokens expanded, as the engine must see them."""
    unexpanded: list[int]
    """The same with one token per image, as they are sent."""
    count: int
    """Responses that the group needs."""
    parameters: dict[str, Any]
    """The fields of vLLM's SamplingParams."""


def sampling_requests(vlm: VLM, contexts: Sequence[Context], sampling: Sampling) -> list[Request]:
    """One request for each new group, and one for each response so far."""
    requests = []
    for index, context in enumerate(contexts):
        prompt, seed = context.prompt, sampling.seed_of(index) * SEED_STRIDE
        if not context.responses:
            count = 1 if sampling.temperature == 0 else sampling.group
            parameters = _parameters(vlm, sampling, seed=seed, count=count, limit=sampling.limit(0))
            requests.append(
                Request(
                    index,
                    prompt,
                    None,
                    prompt.ids.tolist(),
                    vlm.unexpanded(prompt),
                    sampling.group,
                    parameters,
                )
            )
        for number, response in zip(context.branches, context.responses, strict=True):
            before, whole = len(response.ids), prompt.followed_by(response)
            later = seed + number + before * TURN_STRIDE
            limit = sampling.limit(before) - before
            parameters = _parameters(vlm, sampling, seed=later, count=1, limit=limit)
            requests.append(
                Request(index, whole, response, whole.ids.tolist(), vlm.unexpanded(whole), 1, parameters)
            )
    return requests


def _parameters(vlm: VLM, sampling: Sampling, *, seed: int, count: int, limit: int) -> dict[str, Any]:
    return {
        "n": count,
        "max_tokens": limit,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": seed % 2**62,
        "logprobs": 0,
        "logit_bias": dict.fromkeys(vlm.banned, BAN),
        "stop_token_ids": vlm.stops,
        "ignore_eos": True,  # only the stops above end a response
        "detokenize": False,
    }


def check_ids(vlm: VLM, request: Request, ids: list[int]) -> None:
    """Raises RolloutError if the engine's prompt differs from the trainer's."""
    if ids == request.ids:
        return
    image, prompt = vlm.model.config.image_token_id, request.prompt
    own, other = request.ids.count(image), ids.count(image)
    sizes = ", ".join(f"{item.width}x{item.height}" for item in prompt.images) or "none"
    raise RolloutError(
        f"{prompt.example.label}: the engine read {len(ids)} prompt tokens, {other} of them for images, the "
        f"trainer {len(request.ids)} and {own} (images: {sizes}). Its processor must be that of the trained "
        "checkpoint and must not resize: start servers with `vlm-sapo serve`, which sets "
        f"--mm-processor-kwargs '{json.dumps(vlm.family.engine_processing(vlm.model.config, None))}'"
    )


def to_responses(
    vlm: VLM,
    request: Request,
    outputs: list[VllmOutput],
    sampling: Sampling,
    *,
    experts: bool = False,
    version: int | None = None,
) -> list[Response]:
    """Responses from outputs; with `experts` they carry those of their tokens.

    Raises Incomplete if there are too few, or if one is truncated in transfer.
    """
    prompt, label = request.prompt, request.prompt.example.label
    if sampling.temperature == 0:
        outputs = [output._replace(logprobs=[0.0] * len(output.ids)) for output in outputs] * request.count
    if len(outputs) != request.count:
        raise Incomplete(f"{label}: the engine returned {len(outputs)} responses of {request.count}")
    for ids, logprobs, finish, _ in outputs:
        if finish not in ("stop", "length") or not ids or len(logprobs) != len(ids):
            raise Incomplete(
                f"{label}: the engine returned a response of {len(ids)} tokens and {len(logprobs)} log-probs "
                f"that ended with {finish!r}"
            )
        if banned := set(ids) & set(vlm.banned):
            raise RolloutError(
                f"{label}: the engine sampled {vlm.tokenizer.decode(sorted(banned))}, which is banned"
            )
    texts = vlm.tokenizer.batch_decode([output.ids for output in outputs], skip_special_tokens=True)
    responses = (
        Response.sampled(
            (request.so_far or prompt).positions,
            torch.tensor(output.ids),
            torch.tensor(output.logprobs, dtype=torch.float32),
            text=prompt.opening + text,
            finish="stop" if output.ids[-1] in vlm.stops else "length",
            experts=_experts(vlm, request, output) if experts else None,
            version=version,
        )
        for output, text in zip(outputs, texts, strict=True)
    )
    return [continue_response(vlm, prompt, request.so_far, response) for response in responses]


def by_context(
    requests: Sequence[Request], responses: Sequence[list[Response]], count: int
) -> list[list[Response]]:
    """The responses by context, of which there are `count`."""
    groups: list[list[Response]] = [[] for _ in range(count)]
    for request, items in zip(requests, responses, strict=True):
        groups[request.context] += items
    return groups


def _experts(vlm: VLM, request: Request, output: VllmOutput) -> torch.Tensor:
    """[P + R - 1, M, k] for the M layers that have experts."""
    tokens = len(request.ids) + len(output.ids) - 1
    if output.experts is None or len(output.experts) != tokens:
        count = "no experts" if output.experts is None else f"the experts of {len(output.experts)} tokens"
        raise RolloutError(
            f"{request.prompt.example.label}: the engine returned {count}, and algo.replay (r3) needs "
            f"those of {tokens}; start servers with `vlm-sapo serve`, which sets "
            "--enable-return-routed-experts, or set algo.replay=r2"
        )
    kind = np.uint8 if output.experts.dtype == np.uint8 else np.int16
    return torch.from_numpy(output.experts[:, vlm.routers.layers].astype(kind))
