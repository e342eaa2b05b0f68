"""The options of `vlm-sapo eval`, which are those of `vlm_sapo.evaluate`, and of `vlm-sapo score`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, field_validator, model_validator

from vlm_sapo.config.fields import Count, NotNegative, Positive, Probability, Section, TopP
from vlm_sapo.config.files import parse
from vlm_sapo.config.load import check, load
from vlm_sapo.config.rollout import EngineConfig, EnvironmentConfig, RolloutConfig
from vlm_sapo.config.schema import TrainConfig


def _split(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


Text = Annotated[str, BeforeValidator(_as_text)]
ONLY_ALONE = 0.9
"""Share of a GPU's memory for vLLM where nothing trains beside it."""


class Options(Section):
    """Options of a command."""

    model_config = ConfigDict(frozen=True)

    @classmethod
    def field_label(cls, location: Sequence[str | int]) -> str:
        """As it is written on the command line."""
        return "--" + ".".join(map(str, location)).replace("_", "-")


class ScoreOptions(Options):
    reward: str = "auto"
    """A verifier, `auto`, `file.py:function` or `package.module:function`."""
    args: str = "{}"
    """Keyword arguments of the reward, as a YAML mapping."""
    response: str = "response"
    """Columns with the response, separated by commas; the first non-empty one is used."""
    gold: str = ""
    """Column with the gold answer, if not `gold` or `answer`."""
    model: Text | None = None
    """Folder or Hugging Face id of a model whose tokenizer counts `response.tokens` where rows don't say."""
    out: Path | None = None
    """File for the rows with score and outcome."""
    timeout: float = 10.0
    """Seconds to grade one response."""
    on_error: Literal["stop", "zero"] = "stop"
    """When a function raises: stop, or score zero."""

    @field_validator("timeout")
    @classmethod
    def _positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError(f"must be a number of seconds greater than 0, not {value}")
        return value


class EvalOptions(Options):
    benchmark: Annotated[list[str], BeforeValidator(_split)]
    """NAME[:VARIANT][=FILE], several separated by commas; eval/README.md lists them."""
    model: Text | None = None
    """Folder or Hugging Face id of the model."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id; by default its main branch. The results name the commit."""
    responses: Text | None = None
    """Grade this file of recorded responses (JSON lines with id and response) instead of running a model;
    with --model they are read as that model's: boxes in its coordinates, images in its size."""
    data: Text | None = None
    """Local file with the rows of the benchmark, if it is only one."""
    samples: Positive = 1
    """Responses per problem; pass@1 is their mean score."""
    temperature: NotNegative | None = None
    """Sampling temperature; 0 is greedy. By default 0 for one sample per problem and 1 for several."""
    seed: int = 0
    """Seed of the sampling."""
    max_tokens: Positive | None = None
    """Maximum length of a response in tokens; by default the benchmark's."""
    min_pixels: Positive | None = None
    """Enlarge images with fewer pixels (width x height) than this."""
    max_pixels: Positive | None = None
    """Shrink images with more pixels (width x height) than this."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of the weights: float32, bfloat16 or float16; by default the one that the checkpoint has."""
    limit: Positive | None = None
    """Evaluate only the first N problems."""
    on_error: Literal["stop", "skip"] = "stop"
    """On a row that can't be used: stop, or skip it."""
    engine: str = "hf"
    """Generation engine: hf, vllm or vllm_server."""
    engine_args: str = "{}"
    """Fields of rollout.engine as a YAML mapping, such as '{tensor_parallel: 2}'; docs/rollouts.md."""
    environment: str | None = None
    """What answers the model: rollout.environment as a YAML mapping, such as '{tools: [zoom]}', or the config
    of a run with one."""
    top_p: TopP = 1.0
    """Nucleus sampling: keep the smallest set of tokens whose probability sums to this."""
    top_k: Count = 0
    """Sample from the k most likely tokens; 0 for all."""
    min_p: Probability = 0.0
    """Keep tokens whose probability is at least this fraction of the most likely token's."""
    batch: Positive = 16
    """Problems to generate for at the same time."""
    out: Path = Path("runs/eval")
    """Folder for results.json and samples.jsonl."""

    @model_validator(mode="after")
    def _consistent(self):
        if self.model is None and self.responses is None:
            raise ValueError("give --model, or --responses with recorded ones")
        if self.data and len(self.benchmark) > 1:
            raise ValueError(
                f"--data ({self.data}) is for one benchmark; for several write --benchmark "
                "NAME=FILE,NAME=FILE"
            )
        return self

    @property
    def names(self) -> list[str]:
        """The benchmarks as NAME[:VARIANT][=FILE]."""
        return [f"{self.benchmark[0]}={self.data}"] if self.data else self.benchmark

    @property
    def sampling_temperature(self) -> float:
        return float(self.samples > 1) if self.temperature is None else self.temperature

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the numbers, beside the benchmark's own definition."""
        values = self.model_dump(exclude={"benchmark", "data", "engine_args", "batch", "out"})
        engine = self.engine if self.engine_args == "{}" else f"{self.engine} {self.engine_args}"
        values |= {"temperature": self.sampling_temperature, "engine": engine}
        environment = self.environment_config()
        return values | {"environment": environment and environment.model_dump(mode="json")}

    def environment_config(self) -> EnvironmentConfig | None:
        """The environment's section; None without one. Raises ValueError naming its field."""
        if self.environment is None:
            return None
        fields = parse(self.environment)
        if isinstance(fields, str):
            environment = load(TrainConfig, fields).rollout.environment
            fields = environment and environment.model_dump()
        if not isinstance(fields, dict):
            raise ValueError(
                f"--environment ({self.environment}) must be a YAML mapping such as '{{tools: [zoom]}}', or "
                "a config whose rollout.environment is one"
            )
        return check(RolloutConfig, {"environment": fields}).environment

    def engine_config(self) -> EngineConfig:
        """The engine's section. Raises ValueError naming its field."""
        fields = parse(self.engine_args)
        if not isinstance(fields, dict):
            raise ValueError(
                f"--engine-args ({self.engine_args}) must be a YAML mapping such as '{{tensor_parallel: 2}}'"
            )
        alone = {"gpu_memory": ONLY_ALONE} if self.engine == "vllm" else {}
        return check(RolloutConfig, {"engine": {"type": self.engine} | alone | fields}).engine
