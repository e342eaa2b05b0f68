"""vLLM in this process. On a GPU it sleeps whenever it doesn't generate, so that training has the memory."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.engine import EngineNeeds, RolloutError
from vlm_sapo.rollout.vllm_requests import (
    CPU_ARGUMENTS,
    ENGINE_ARGUMENTS,
    EXPERTS_ARGUMENTS,
    PROBLEMS_AT_ONCE,
    VllmOutput,
    by_context,
    check_ids,
    sampling_requests,
    to_responses,
)
from vlm_sapo.rollout.weight_transfer import contiguous
from vlm_sapo.types import Context, Response, Sampling

MAX_IMAGES = 16
"""Most images of a prompt, unless `rollout.engine.options` set another limit."""


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
        options: dict[str, Any] | None = None,
    ):
        self.vlm, self.tensor_parallel, self.dtype = needs.vlm, tensor_parallel, getattr(torch, dtype)
        self.records_experts = needs.experts
        self.version: int | None = None
        self.asleep: set[str] = set()
        if tensor_parallel == 1:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights can't be passed to another process
        try:
            from vllm import LLM
        except ImportError as error:
            raise RolloutError(
                f"rollout.engine (vllm) needs the package vllm, and it cannot be imported ({error}); "
                "install vlm-sapo[vllm]"
            ) from error
        self.sleeps = torch.cuda.is_available()
        arguments = {
            "model": needs.path,
            "dtype": dtype,
            "max_model_len": needs.longest,
            "tensor_parallel_size": tensor_parallel,
            "enable_sleep_mode": self.sleeps,
            "limit_mm_per_prompt": {"image": MAX_IMAGES, "video": 0},
        }
        arguments |= {"gpu_memory_utilization": gpu_memory} if self.sleeps else CPU_ARGUMENTS
        if needs.world is not None and needs.world.size > 1:  # else every engine takes the first GPU
            arguments |= {"distributed_executor_backend": "external_launcher"}
        arguments |= EXPERTS_ARGUMENTS if needs.experts else {}
        try:
            self.llm = LLM(**arguments | ENGINE_ARGUMENTS | (options or {}))
        except ValueError as error:
            if not needs.experts:
                raise
            raise RolloutError(
                f"vLLM can't report its tokens' experts here, and algo.replay (r3) needs them; set "
                f"algo.replay=r2 ({' '.join(str(error).split())[:300]})"
            ) from error
        self._sleep()

    def problems_at_once(self, samples: int) -> int:
        return PROBLEMS_AT_ONCE

    def sync(self, vlm: VLM) -> None:
        """See RolloutEngine."""
        if self.version == vlm.version:
            return
        self._wake("weights")
        if self.tensor_parallel == 1:
            self.llm.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": iter(vlm.weights().items())}
            )
        else:
            weights = {name: weight.to("cpu", self.dtype) for name, weight in vlm.weights().items()}
            size = sum(weight.nbytes for weight in weights.values())
            with tempfile.TemporaryDirectory(prefix="weights_", dir=_memory(size)) as folder:
                save_file(contiguous(weights), Path(folder) / "model.safetensors")
                self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        if not self.asleep and not self.llm.reset_prefix_cache():
            raise RolloutError("vLLM could not clear its prefix cache of the old weights; please report this")
        self.version = vlm.version

    def generate(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Response]]:
        """See RolloutEngine."""
        if not contexts:
            return []
        self._wake("weights", "kv_cache")
        try:
            return self._generate(contexts, sampling)
        finally:
            self._sleep()

    def _generate(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Response]]:
        from vllm import SamplingParams

        requests = sampling_requests(self.vlm, contexts, sampling)
        inputs = [
            {"prompt_token_ids": item.unexpanded}
            | ({"multi_modal_data": {"image": list(item.prompt.images)}} if item.prompt.images else {})
            for item in requests
        ]
        parameters = [SamplingParams(**item.parameters) for item in requests]
        try:
            results = self.llm.generate(inputs, parameters, use_tqdm=False)
        except ValueError as error:
            rows = ", ".join(item.prompt.example.label for item in requests[:3])
            raise RolloutError(
                f"vLLM refused a prompt of {rows} or one of those after it: {error}"
            ) from error
        responses = []
        for request, result in zip(requests, results, strict=True):
            check_ids(self.vlm, request, list(result.prompt_token_ids))
            outputs = [_output(item) for item in result.outputs]
            responses.append(
                to_responses(
                    self.vlm,
                    request,
                    outputs,
                    sampling,
                    experts=self.records_experts,
                    version=self.version,
                )
            )
        return by_context(requests, responses, len(contexts))

    def close(self) -> None:
        """Ends the engine and frees its memory."""
        self.llm.llm_engine.engine_core.shutdown()
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
        if self.sleeps:
            self.llm.sleep(level=1)
            self.asleep = {"weights", "kv_cache"}


def _output(output: Any) -> VllmOutput:
    ids = list(output.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(ids, output.logprobs or [], strict=False)]
    return VllmOutput(ids, logprobs, output.finish_reason, output.routed_experts)


def _memory(size: int) -> str | None:
    """A folder in memory with room for `size` bytes, if the system has one."""
    folder = Path("/dev/shm")
    return str(folder) if folder.is_dir() and shutil.disk_usage(folder).free > size else None
