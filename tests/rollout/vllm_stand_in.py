"""Stands for the package vLLM where it isn't installed: records how it is called, and takes weights as it does.

What it asks of a `WeightSource` are the rules of vLLM 0.32 (`iter`) and 0.33 (`iter_full`).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file


@dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class StandInLlm:
    """`vllm.LLM`. `threads` is what the real one leaves torch with; it fails at weight number `fails_at`."""

    threads: ClassVar[int | None] = None
    fails_at: ClassVar[int | None] = None

    def __init__(self, **arguments: Any):
        self.arguments, self.calls, self.weights = arguments, [], []
        self.llm_engine = StandInEngine(self)
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def add_lora(self, request: LoRARequest) -> None:
        self.calls.append(f"add_lora {request.lora_int_id}")
        self.adapter = load_file(Path(request.lora_path) / "adapter_model.safetensors")
        self.adapter_config = json.loads((Path(request.lora_path) / "adapter_config.json").read_text())

    def sleep(self, level: int) -> None:
        self.calls.append("sleep")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset_prefix_cache")
        return True

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(method)
        self.weights = []
        if "weights_path" in kwargs:
            files = sorted(Path(kwargs["weights_path"]).glob("*.safetensors"))
            self.calls.append(f"read {len(files)} files")
            self.weights = [item for file in files for item in load_file(file).items()]
            return
        assert iter(kwargs["weights_iterator"]) is kwargs["weights_iterator"]
        for name, weight in kwargs["weights_iterator"]:
            self.weights.append((name, weight))
            if len(self.weights) == self.fails_at:
                raise RuntimeError("vLLM does not know this weight")


class StandInEngine:
    """`LLM.llm_engine`. Finishes the requests one per step, the last one first, with one token each, `token`. It
    refuses prompts of more than `longest` tokens, and fails at the step number `fails_at`."""

    token: ClassVar[int] = 0
    longest: ClassVar[int] = 10**6
    fails_at: ClassVar[int | None] = None

    def __init__(self, llm: StandInLlm):
        self.calls, self.requests, self.added, self.steps = llm.calls, {}, [], 0
        self.add_lora = llm.add_lora
        self.engine_core = SimpleNamespace(shutdown=lambda: self.calls.append("shutdown"))

    def remove_lora(self, number: int) -> None:
        self.calls.append(f"remove_lora {number}")

    def reset_encoder_cache(self) -> None:
        self.calls.append("reset_encoder_cache")

    def add_request(
        self, name: str, prompt: dict[str, Any], parameters: SimpleNamespace, *, lora_request: Any
    ) -> None:
        self.calls.append(f"generate with {lora_request.lora_name if lora_request else 'the base'}")
        if len(prompt["prompt_token_ids"]) > self.longest:
            raise ValueError("the prompt is too long")
        self.requests[name] = prompt, parameters
        self.added.append(prompt)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[SimpleNamespace]:
        self.steps += 1
        if self.steps == self.fails_at:
            raise RuntimeError("the engine died")
        name, (prompt, parameters) = self.requests.popitem()
        output = SimpleNamespace(
            token_ids=[self.token],
            logprobs=[{self.token: SimpleNamespace(logprob=-0.5)}],
            finish_reason="stop",
            routed_experts=None,
        )
        running = [SimpleNamespace(request_id=other, finished=False) for other in self.requests]
        done = SimpleNamespace(
            request_id=name,
            finished=True,
            prompt_token_ids=prompt["prompt_token_ids"],
            outputs=[output] * parameters.n,
        )
        return [*running, done]

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            self.requests.pop(name, None)


INPUTS = {
    "tokens_input": lambda ids: {"prompt_token_ids": ids},
    "mm_input": lambda ids, items, hashes, ranges: {
        "prompt_token_ids": ids,
        "items": items,
        "hashes": hashes,
        "ranges": ranges,
    },
    "MultiModalFieldConfig": SimpleNamespace(
        flat_from_sizes=lambda modality, sizes: ("flat", modality, sizes.tolist()),
        batched=lambda modality, *, keep_on_cpu: ("batched", modality, keep_on_cpu),
    ),
    "MultiModalKwargsItems": SimpleNamespace(from_hf_inputs=lambda tensors, fields: (tensors, fields)),
    "PlaceholderRange": lambda *, offset, length, is_embed: (offset, length),
    "SamplingParams": SimpleNamespace,
    "RequestOutputKind": SimpleNamespace(FINAL_ONLY="final"),
}
"""What `VllmEngine` builds its requests with."""


class SourceOf032(ABC):
    """Of vLLM 0.32.0: a method and plain iteration."""

    @abstractmethod
    def metadata(self): ...

    @abstractmethod
    def __iter__(self): ...

    def read(self) -> tuple[list[Any], Iterator[tuple[str, torch.Tensor]]]:
        return self.metadata(), iter(self)


class SourceOf033(ABC):
    """Of vLLM 0.33.0: a cached property, checked when a class is made, and `iter_full`."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if not isinstance(cls.__dict__.get("metadata"), cached_property | None):
            raise TypeError(f"{cls.__name__}.metadata must be a functools.cached_property")

    @property
    @abstractmethod
    def metadata(self): ...

    def iter_full(self):
        raise NotImplementedError

    def read(self) -> tuple[list[Any], Iterator[tuple[str, torch.Tensor]]]:
        if type(self).iter_full is SourceOf033.iter_full:
            raise TypeError("NCCL broadcast sends full tensors, and there is no iter_full()")
        return self.metadata, self.iter_full()


SOURCES = {"iter": SourceOf032, "iter_full": SourceOf033}


@dataclass(frozen=True)
class ParamMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def sources(kind: str, taken: list, breaks: dict[int, int]) -> dict[str, Any]:
    """The names of `vllm.distributed.weight_transfer`, where attempt N to send breaks before weight `breaks[N]`.
    What was sent in whole is appended to `taken` with its metadata."""
    attempts = iter(range(1000))

    class Sender:
        def __init__(self, source):
            self.source = source

        def send_weights(self) -> None:
            limit = breaks.get(next(attempts))
            if limit == 0:
                raise RuntimeError("the server does not answer")
            sent = []
            metadata, weights = self.source.read()
            for item in weights:
                if len(sent) == limit:
                    raise RuntimeError("the server has gone")
                sent.append(item)
            taken.append((sent, metadata))

        def shutdown(self) -> None: ...

    return {
        "HTTPVLLMWeightSyncClient": lambda url, timeout: None,
        "ParamMeta": ParamMeta,
        "WeightSource": SOURCES[kind],
        "WeightTransferTrainerFactory": SimpleNamespace(
            trainer_init=lambda info, client, source: Sender(source)
        ),
        "NCCLTrainerInitInfo": lambda **options: options,
    }


def modules(names: dict[str, Any] | None = None) -> dict[str, ModuleType]:
    """What `sys.modules` must have so that `import vllm` finds this one, with `names` in its module for weight
    transfers."""
    package = ["vllm", "vllm.distributed", "vllm.distributed.weight_transfer"]
    package += ["vllm.distributed.weight_transfer.nccl_engine", "vllm.lora", "vllm.lora.request"]
    package += ["vllm.inputs", "vllm.multimodal", "vllm.multimodal.inputs", "vllm.sampling_params"]
    made = {name: ModuleType(name) for name in package}
    own = {"LLM": StandInLlm, "LoRARequest": LoRARequest}
    for module in made.values():
        vars(module).update(own | INPUTS | (names or {}))
    return made
