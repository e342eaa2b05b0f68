"""The section on sampling responses; each engine has fields of its own."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from annotated_types import MinLen
from pydantic import Field, field_validator, model_validator

from vlm_sapo.config.fields import AlsoCalled, Count, Note, NotNegative, Positive, Rate, Section
from vlm_sapo.config.secrets import check_address

AdapterForm = Literal["auto", "merged", "native"]
Precision = Literal["auto", "bfloat16", "float16", "float32"]


class _Engine(Section):
    example: ClassVar[str] = "{type: vllm}"

    @property
    def shares_weights(self) -> bool:
        """Whether it computes with the policy's own modules."""
        return False

    @property
    def addresses(self) -> list[str]:
        """Of its servers."""
        return []

    def weights_dtype(self, default: str) -> str:
        """Type of its weights, where `auto` stands for the default."""
        return default


class HfConfig(_Engine):
    type: Literal["hf"] = "hf"

    @property
    def shares_weights(self) -> bool:
        return True


class OwnEngineConfig(_Engine):
    type: Literal["own"]
    function: Annotated[str, Note.FUNCTION]
    """`path/to/file.py:name` of a function or class that takes what an engine is built for
    (EngineNeeds) and returns an engine; both are in rollout/engine.py."""
    args: dict[str, Any] = {}
    """Keyword arguments of the function."""
    policy_modules: bool = False
    """Whether the engine samples with the policy's own modules and so has no weights of its own."""

    @property
    def shares_weights(self) -> bool:
        return self.policy_modules


class VllmConfig(_Engine):
    type: Literal["vllm"]
    tensor_parallel: Annotated[
        Positive,
        AlsoCalled("tensor_parallel_size", "tp", "tensor_model_parallel_size", "vllm_tensor_parallel_size"),
    ] = 1
    """Tensor-parallel size: GPUs that share one copy of the engine's weights."""
    gpu_memory: Annotated[
        float,
        Field(gt=0, lt=1),
        Note.FREE_ON_RESUME,
        AlsoCalled("gpu_memory_utilization", "vllm_gpu_memory_utilization"),
    ] = 0.4
    """Share of the GPU's memory that vLLM uses during generation; it is freed for training."""
    dtype: Precision = "auto"
    """Data type of the engine's weights; `auto` is bfloat16 with `train.precision: bf16`, else
    `model.dtype`."""
    adapter: AdapterForm = "auto"
    """How the engine gets LoRA adapters: `merged` into its weights, where half precision rounds the small
    changes of the first updates away, or `native`, served beside the base model. `auto` is `native` where the
    engine computes in half precision and vLLM can serve them: of the language part, not in 4 bits, without
    experts or linear attention."""
    options: Annotated[
        dict[str, Any],
        AlsoCalled(
            "enforce_eager", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "engine_kwargs"
        ),
    ] = {}
    """Further arguments of `vllm.LLM`, such as `enforce_eager` or `max_num_seqs`."""

    def weights_dtype(self, default: str) -> str:
        return default if self.dtype == "auto" else self.dtype


class VllmServerConfig(_Engine):
    type: Literal["vllm_server"]
    servers: Annotated[
        list[str],
        Field(min_length=1),
        Note.FREE_ON_RESUME,
        AlsoCalled("url", "urls", "base_url", "vllm_server_host", "vllm_server_port", "vllm_server_base_url"),
    ] = ["http://127.0.0.1:8000"]
    """URLs of servers started with `vlm-sapo serve`, or with `vllm serve` and the same options."""
    weights: Literal["folder", "nccl"] = "folder"
    """How new weights get to the servers: as safetensors in a `folder` that both sides can read, or from GPU
    to GPU with `nccl`."""
    folder: str | None = None
    """That folder; null for one in the run's folder. The servers must see it under the same path."""
    address: str = "127.0.0.1"
    """With `nccl`: this machine's address as the servers see it."""
    dtype: Precision = "auto"
    """Data type of the weights that are sent; `auto` is bfloat16 with `train.precision: bf16`, else
    `model.dtype`."""
    adapter: AdapterForm = "auto"
    """How the engine gets LoRA adapters: `merged` into its weights, where half precision rounds the small
    changes of the first updates away, or `native`, served beside the base model. `auto` is `native` where the
    engine computes in half precision and vLLM can serve them: of the language part, not in 4 bits, without
    experts or linear attention, and through a folder."""
    timeout: Annotated[Rate, Note.FREE_ON_RESUME] = 600.0
    """Seconds that a server may take for all responses to one prompt, queueing included, or for a weight
    update."""
    patience: Annotated[NotNegative, Note.FREE_ON_RESUME] = 120.0
    """Seconds to retry a request on all servers before the run stops."""

    @property
    def addresses(self) -> list[str]:
        return self.servers

    def weights_dtype(self, default: str) -> str:
        return default if self.dtype == "auto" else self.dtype

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        """Servers elsewhere would wait for a trainer on their own machine, for `timeout` each."""
        elsewhere = [url for url in self.servers if not _is_local(url)]
        if self.weights == "nccl" and elsewhere and _is_local(f"//{self.address}"):
            raise ValueError(
                f"address ({self.address}) must be the address of the first trainer's machine as the server "
                f"{elsewhere[0]} sees it"
            )
        return self

    @field_validator("servers", mode="before")
    @classmethod
    def _addresses(cls, value: Any) -> Any:
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list):
            for address in value:
                check_address(str(address), "servers")
        return value


def _is_local(url: str) -> bool:
    """Whether an address is of the machine itself."""
    host = urlsplit(url).hostname or ""
    return host == "localhost" or host.startswith("127.") or host == "::1"


EngineConfig = Annotated[
    HfConfig | VllmConfig | VllmServerConfig | OwnEngineConfig, Field(discriminator="type")
]
DEFAULT_PROMPTS_PER_BATCH = 16
TRUNCATIONS = ("top_p", "top_k", "min_p")
"""Sampling options that training refuses: under them the engine's log-probs are not the policy's."""


class _Environment(Section):
    example: ClassVar[str] = "{tools: [zoom]}"

    max_turns: Annotated[
        Positive, AlsoCalled("max_assistant_turns", "max_user_turns", "max_tool_calling_iterations")
    ] = 8
    """Most turns of the policy in one response; it ends after them."""
    max_turn_tokens: Positive | None = None
    """Most tokens of one turn; null for as many as the response may have."""
    max_images: Count = 8
    """Most images that are returned in one response; it ends where there would be more."""
    timeout: Rate = 10.0
    """Seconds for each answer; a response whose environment takes longer ends and is counted."""
    workers: Positive | None = None
    """Answers that are computed at the same time; null for one per CPU core, at most 8."""


class ToolsConfig(_Environment):
    type: Literal["tools"]
    tools: Annotated[list[str], Note.FUNCTION, MinLen(1)]
    """What the model may call: `zoom`, `crop`, `rotate`, `draw_box`, `measure`, `python`, or
    `path/to/file.py:name` of a function with type hints and a docstring (docs/tools.md)."""
    format: Literal["auto", "template", "hermes"] = "auto"
    """How tools are offered and called: `template` as the model's chat template does, `hermes` in the system
    message with JSON in `<tool_call>`, for templates without tools; `auto` chooses by template and family."""

    @field_validator("tools", mode="before")
    @classmethod
    def _single(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class OwnEnvironmentConfig(_Environment):
    type: Literal["own"]
    function: Annotated[str, Note.FUNCTION]
    """`path/to/file.py:name` or `package.module:name` of a class whose objects have `reset(example)` and
    `step(response)`, one object for each response (docs/rollouts.md)."""
    args: dict[str, Any] = {}
    """Keyword arguments of the class."""


EnvironmentConfig = Annotated[ToolsConfig | OwnEnvironmentConfig, Field(discriminator="type")]


class RolloutConfig(Section):
    engine: Annotated[
        EngineConfig, AlsoCalled("rollout.name", "use_vllm", "vllm_mode", "infer_backend", "rollout_backend")
    ] = HfConfig()
    """What generates the responses: `hf` the policy itself with PyTorch, `vllm` an engine in this process,
    `vllm_server` separate servers, `own` a function or class of yours. `engine: NAME` is short for
    `engine: {type: NAME}`."""
    environment: Annotated[
        EnvironmentConfig | None,
        AlsoCalled("multi_turn", "multi_turn_scheduler", "environment_factory", "rollout_func", "tools"),
    ] = None
    """What answers the policy, for responses of several turns: `tools` that it may call, or a class of your
    `own`; null (or `single_turn`) for one turn. `type` may be left out."""
    group: Annotated[
        int,
        Field(ge=2),
        Note.IN_REPORT,
        AlsoCalled(
            "n",
            "num_generations",
            "group_size",
            "num_samples",
            "samples_per_prompt",
            "rollout_n",
            "n_samples_per_prompt",
            "num_return_sequences",
            "num_return_sequences_in_group",
        ),
    ] = 8
    """Group size (num_generations): responses sampled per prompt."""
    max_tokens: Annotated[
        Positive,
        Note.IN_REPORT,
        AlsoCalled(
            "max_new_tokens",
            "max_completion_length",
            "max_response_length",
            "response_length",
            "max_length",
        ),
    ] = 1024
    """Maximum length of a response, in tokens."""
    temperature: Annotated[Rate, Note.IN_REPORT] = 1.0
    """Sampling temperature. All log-probs, the trainer's too, are of logits divided by it."""
    prompts_per_batch: Annotated[
        Positive | None, Note.FREE_ON_RESUME, AlsoCalled("generation_batch_size")
    ] = None
    """Generation batch size of `hf`, in prompts with `rollout.group` responses each; 16 if
    `rollout.sequences_per_batch` is not set either. Lower it when generation runs out of memory."""
    sequences_per_batch: Annotated[Positive | None, Note.FREE_ON_RESUME] = None
    """The same in responses that are generated together, at least those to one prompt. Larger is faster on a
    GPU, as far as memory goes (`vlm-sapo plan`); no response depends on it. Set one of the two."""
    resample: Annotated[
        Count,
        AlsoCalled(
            "dynamic_sampling",
            "dynamic_sample",
            "filter_groups",
            "online_filtering",
            "max_resample_times",
            "max_try_make_batch",
        ),
    ] = 0
    """DAPO's dynamic sampling: up to N times, replace groups whose rewards are all equal by groups of further
    prompts of the same task. Such groups that are left after the last round stay."""
    check_every: Positive = 50
    """Every N steps, compare the log-probs of a vLLM engine with the trainer's. The first two steps are
    always compared."""
    tolerance: Rate | None = None
    """Stop the run when the mean absolute difference of these log-probs is larger; null for 1e-4 where both
    sides compute in float32, else 0.05."""
    ahead: Annotated[Count, AlsoCalled("max_async_level", "staleness", "max_staleness", "async_generate")] = 0
    """Sample responses N steps ahead (off-policy by N steps). With 1, servers generate the next step while
    this one trains. More than 1, or another engine, is no faster: it is for studying staleness."""

    @property
    def returned_images(self) -> int:
        """The most images that the environment adds to a prompt."""
        return 0 if self.environment is None else self.environment.max_images

    @property
    def batch_sequences(self) -> int:
        """Responses that `hf` generates together, in training and evaluation."""
        if self.sequences_per_batch is not None:
            return self.sequences_per_batch
        return (self.prompts_per_batch or DEFAULT_PROMPTS_PER_BATCH) * self.group

    @model_validator(mode="after")
    def _one_batch_size(self):
        if self.prompts_per_batch is not None and self.sequences_per_batch is not None:
            raise ValueError(
                f"prompts_per_batch ({self.prompts_per_batch}) must not be set together with "
                f"sequences_per_batch ({self.sequences_per_batch}); set one of them to null"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if options := [name for name in TRUNCATIONS if name in value]:
            raise ValueError(
                f"{options[0]} ({value[options[0]]}) truncates the sampling distribution, so the importance "
                f"ratio would be biased; remove it (eval.{options[0]} sets it for evaluations)"
            )
        engine = value.get("engine")
        return value | {"engine": {"type": engine}} if isinstance(engine, str) else value

    @field_validator("environment", mode="before")
    @classmethod
    def _type_of_environment(cls, value: Any) -> Any:
        if value in ("single_turn", {"type": "single_turn"}):
            return None
        if isinstance(value, dict) and "type" not in value:
            return {"type": "tools" if "tools" in value else "own"} | value
        return value

    @field_validator("engine", mode="before")
    @classmethod
    def _hf_by_default(cls, value: Any) -> Any:
        return {"type": "hf"} | value if isinstance(value, dict) else value
