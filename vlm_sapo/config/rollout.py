"""The section that says what draws responses, and how; each engine has fields of its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vlm_sapo.config.data import Count, NotNegative, Positive, Rate, Section
from vlm_sapo.config.secrets import check_address

Precision = Literal["auto", "bfloat16", "float16", "float32"]


class _Engine(Section):
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
    function: str
    """`path/to/file.py:name` of a function or class that takes what an engine is built for
    (rollout/build.py, EngineNeeds) and returns an engine (rollout/engine.py)."""
    args: dict[str, Any] = {}
    """Its keyword arguments."""
    policy_modules: bool = False
    """Whether it samples with the policy's own modules, so that it needs no weights of its own."""

    @property
    def shares_weights(self) -> bool:
        return self.policy_modules


class VllmConfig(_Engine):
    type: Literal["vllm"]
    tensor_parallel: Positive = 1
    """GPUs that share the engine's copy of the model."""
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of the GPU's memory that the engine takes while it generates; it gives it back to train."""
    dtype: Precision = "auto"
    """Type of the engine's weights; `auto` is bfloat16 with `train.precision: bf16`, else `model.dtype`."""
    options: dict[str, Any] = {}
    """Further arguments of `vllm.LLM`, such as `enforce_eager` or `max_num_seqs`."""

    def weights_dtype(self, default: str) -> str:
        return default if self.dtype == "auto" else self.dtype


class VllmServerConfig(_Engine):
    type: Literal["vllm_server"]
    servers: Annotated[list[str], Field(min_length=1)] = ["http://127.0.0.1:8000"]
    """Addresses of servers that `vlm-sapo serve` started, or `vllm serve` with the same options."""
    weights: Literal["folder", "nccl"] = "folder"
    """How new weights reach the servers: by a safetensors folder that both sides see, or from GPU to GPU."""
    folder: str | None = None
    """Where that folder is made; null for the run's own. The servers must see it under the same path."""
    address: str = "127.0.0.1"
    """With `nccl`: the address under which the servers reach this machine."""
    dtype: Precision = "auto"
    """Type of the weights that are sent; `auto` is bfloat16 with `train.precision: bf16`, else
    `model.dtype`."""
    timeout: Rate = 600.0
    """Seconds that a server may take for one prompt's responses, waiting for others included, or for new
    weights."""
    patience: NotNegative = 120.0
    """Seconds that a request is tried again on all servers before the run stops."""

    @property
    def addresses(self) -> list[str]:
        return self.servers

    def weights_dtype(self, default: str) -> str:
        return default if self.dtype == "auto" else self.dtype

    @field_validator("servers", mode="before")
    @classmethod
    def _addresses(cls, value: Any) -> Any:
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list):
            for address in value:
                check_address(str(address), "servers")
        return value


EngineConfig = Annotated[
    HfConfig | VllmConfig | VllmServerConfig | OwnEngineConfig, Field(discriminator="type")
]
UNSAMPLED = ("top_p", "top_k", "min_p")
"""Ways to cut the distribution off that training refuses."""


class EnvironmentConfig(Section):
    function: str
    """`path/to/file.py:name` or `package.module:name` of a class whose objects have `reset(example)` and
    `step(response)`, one object for each response (docs/rollouts.md)."""
    args: dict[str, Any] = {}
    """Its keyword arguments."""
    max_turns: Annotated[int, Field(ge=1)] = 8
    """Turns of the policy in one response, after which it ends."""


class RolloutConfig(Section):
    engine: EngineConfig = HfConfig()
    """What draws the responses: `hf` uses the policy itself, `vllm` an engine in this process, `vllm_server`
    servers. `engine: NAME` is short for `engine: {type: NAME}`."""
    environment: EnvironmentConfig | None = None
    """What answers the policy, for several turns in one response; null for one turn."""
    group: Annotated[int, Field(ge=2)] = 8
    """Responses per prompt."""
    max_tokens: Positive = 1024
    """Longest response."""
    temperature: Rate = 1.0
    """Sampling temperature; log-probs everywhere are of logits divided by it."""
    prompts_per_batch: Positive = 16
    """Prompts that `hf` generates from at the same time; lower it when generation runs out of memory."""
    resample: Count = 0
    """Rounds in which groups whose responses all scored alike are replaced by groups of further prompts of
    the same task (DAPO's dynamic sampling); what is alike after the last round stays."""
    check_every: Positive = 50
    """Steps between two comparisons of a vLLM engine's log-probs with the trainer's; the first step and the
    second always have one."""
    tolerance: Rate | None = None
    """Mean absolute difference of those log-probs from which the run stops; null for 1e-4 where both sides
    compute in float32, else .05."""
    ahead: Count = 0
    """Steps that responses are drawn ahead, so they come from weights so many steps older. With 1 servers
    draw the next step while this one trains; more, or another engine, makes nothing faster and is there to
    see what staleness does."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if cut := [name for name in UNSAMPLED if name in value]:
            raise ValueError(
                f"{cut[0]} ({value[cut[0]]}) cuts the distribution off, so the ratio of the policy to what "
                f"was sampled is biased; remove it, and set eval.{cut[0]} for evaluations"
            )
        engine = value.get("engine")
        return value | {"engine": {"type": engine}} if isinstance(engine, str) else value

    @field_validator("engine", mode="before")
    @classmethod
    def _hf_by_default(cls, value: Any) -> Any:
        return {"type": "hf"} | value if isinstance(value, dict) else value
