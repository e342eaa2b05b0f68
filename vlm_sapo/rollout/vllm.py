"""vLLM in this process. On a GPU it sleeps whenever it doesn't generate, so that training has the memory."""

from __future__ import annotations

import gc
import itertools
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.engine import EngineNeeds, RolloutError
from vlm_sapo.rollout.vllm_inputs import engine_input
from vlm_sapo.rollout.vllm_lora import AdapterShape, ServedAdapter, memory_folder, served_beside
from vlm_sapo.rollout.vllm_requests import (
    CPU_ARGUMENTS,
    EXPERTS_ARGUMENTS,
    PROBLEMS_AT_ONCE,
    Request,
    VllmOutput,
    by_context,
    check_ids,
    engine_arguments,
    sampling_requests,
    to_responses,
)
from vlm_sapo.rollout.weight_transfer import exhaust, write_shards
from vlm_sapo.types import Context, Response, Sampling

ALL_PARTS = ("weights", "kv_cache")
"""What sleeps and can be woken apart."""
MAX_SEQUENCES = 256
"""Responses that are generated at the same time. On large GPUs vLLM's own default is four times as many, for
which it keeps logits of the whole vocabulary and captures graphs."""
BATCHED_TOKENS = 8192
"""Tokens of a step of the engine, and of the images that it encodes in one; more cost memory and aren't
faster."""


class VllmEngine:
    """Generates with vLLM's `LLM` from the checkpoint at `needs.path`; new weights come from the live model.

    With one GPU weights are passed in memory, with several (`tensor_parallel`) through a temporary folder. Of
    several training processes each has an engine on its own GPU.
    """

    in_background = False
    shares_weights = False

    def __init__(
        self,
        needs: EngineNeeds,
        *,
        dtype: str,
        tensor_parallel: int = 1,
        gpu_memory: float = 0.4,
        adapter: str = "auto",
        options: dict[str, Any] | None = None,
    ):
        self.vlm, self.tensor_parallel, self.dtype = needs.vlm, tensor_parallel, getattr(torch, dtype)
        self.records_experts = needs.experts
        self.version: int | None = None
        self.asleep: set[str] = set()
        self.numbers = itertools.count()
        if tensor_parallel == 1:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights can't be passed to another process
        try:
            from vllm import LLM
        except ImportError as error:
            raise RolloutError(
                f"rollout.engine (vllm) needs the package vllm, and it cannot be imported ({error}); "
                "install the extra vllm (docs/install.md)"
            ) from error
        self.sleeps = torch.cuda.is_available()
        arguments = {
            "model": needs.path,
            "dtype": dtype,
            "max_model_len": needs.longest,
            "tensor_parallel_size": tensor_parallel,
            "enable_sleep_mode": self.sleeps,
            "mm_device_do_normalize": False,  # pixels arrive normalized
            "max_num_seqs": MAX_SEQUENCES,
            "max_num_batched_tokens": max(BATCHED_TOKENS, needs.longest),
            **engine_arguments(needs.vlm, needs.max_pixels, needs.returned_images),
        }
        arguments |= {"gpu_memory_utilization": gpu_memory} if self.sleeps else CPU_ARGUMENTS
        if needs.world is not None and needs.world.size > 1:  # else every engine takes the first GPU
            arguments |= {"distributed_executor_backend": "external_launcher"}
        arguments |= EXPERTS_ARGUMENTS if needs.experts else {}
        shape = AdapterShape.of(needs.vlm)
        beside = served_beside(adapter, shape, needs.vlm, dtype, warn=needs.warn)
        self.adapter = ServedAdapter() if beside else None
        arguments |= shape.arguments if self.adapter is not None else {}
        threads = torch.get_num_threads()
        try:
            self.llm = LLM(**arguments | (options or {}))
        except ValueError as error:
            if not needs.experts:
                raise
            raise RolloutError(
                f"vLLM can't report its tokens' experts here, and algo.replay (r3) needs them; set "
                f"algo.replay=r2 ({' '.join(str(error).split())[:300]})"
            ) from error
        finally:
            torch.set_num_threads(threads)  # vLLM leaves one, and the trainer computes in this process, too
        self._sleep()

    def problems_at_once(self, samples: int) -> int:
        return PROBLEMS_AT_ONCE

    def sync(self, vlm: VLM) -> None:
        """See RolloutEngine."""
        if self.version == vlm.version:
            return
        self._wake("weights")
        if self.adapter is None:
            self._send_weights(vlm)
        else:
            self.adapter.update(self.llm, vlm)
        self.llm.llm_engine.reset_encoder_cache()  # features of images; their pixels are the same as before
        if not self.asleep and not self.llm.reset_prefix_cache():
            raise RolloutError("vLLM could not clear its prefix cache of the old weights; please report this")
        self.version = vlm.version

    def _send_weights(self, vlm: VLM) -> None:
        weights = vlm.stream_weights(self.dtype)
        if self.tensor_parallel == 1:
            try:
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            finally:
                exhaust(weights)
        else:
            size = sum(math.prod(item.shape) for item in vlm.stored_weights()) * self.dtype.itemsize
            with tempfile.TemporaryDirectory(prefix="weights_", dir=memory_folder(size)) as folder:
                write_shards(weights, Path(folder))
                self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})

    def generate(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Response]]:
        """See RolloutEngine."""
        try:
            if not contexts:
                return []
            self._wake(*ALL_PARTS)
            return self._generate(contexts, sampling)
        finally:
            self._sleep()  # `sync` woke it, also where a process has no contexts

    def _generate(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Response]]:
        requests = sampling_requests(self.vlm, contexts, sampling)
        responses: list[list[Response]] = [[] for _ in requests]
        engine, waiting = self.llm.llm_engine, {}
        try:
            for index, request in enumerate(requests):
                waiting[self._add(request)] = index
            while engine.has_unfinished_requests():
                for result in engine.step():
                    if not result.finished:
                        continue
                    index = waiting.pop(result.request_id)
                    request = requests[index]
                    responses[index] = self._read(request, result, sampling)
                    if request.so_far is None:  # the whole group
                        contexts[request.context].report(responses[index])
        finally:
            engine.abort_request(list(waiting))  # after an error or a signal
        return by_context(requests, responses, len(contexts))

    def _add(self, request: Request) -> str:
        """Passes a request to the engine; returns the name of its output."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(**request.parameters, output_kind=RequestOutputKind.FINAL_ONLY)
        prompt = engine_input(self.vlm, request, self.dtype)
        adapter = None if self.adapter is None else self.adapter.request
        name = str(next(self.numbers))
        try:
            self.llm.llm_engine.add_request(name, prompt, parameters, lora_request=adapter)
        except ValueError as error:
            raise RolloutError(
                f"vLLM refused the prompt of {request.prompt.example.label}: {error}"
            ) from error
        return name

    def _read(self, request: Request, result: Any, sampling: Sampling) -> list[Response]:
        check_ids(self.vlm, request, list(result.prompt_token_ids))
        return to_responses(
            self.vlm,
            request,
            [_output(item) for item in result.outputs],
            sampling,
            experts=self.records_experts,
            version=self.version,
        )

    def close(self) -> None:
        """Ends the engine and frees its memory."""
        if self.adapter is not None:
            self.adapter.close()
        self.llm.llm_engine.engine_core.shutdown()  # ends the default process group, too: nothing may follow
        del self.llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _wake(self, *parts: str) -> None:
        if tags := [part for part in parts if part in self.asleep]:
            torch.cuda.empty_cache()  # memory that the trainer's allocator holds unused
            self.llm.wake_up(tags=tags)
            self.asleep -= set(tags)

    def _sleep(self) -> None:
        """Frees the GPU; weights move to host memory, so that waking up needs no new ones."""
        if self.sleeps and self.asleep != set(ALL_PARTS):
            self._wake(*ALL_PARTS)  # it falls asleep as a whole
            self.llm.sleep(level=1)
            self.asleep = set(ALL_PARTS)


def _output(output: Any) -> VllmOutput:
    ids = list(output.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(ids, output.logprobs or [], strict=False)]
    return VllmOutput(ids, logprobs, output.finish_reason, output.routed_experts)
