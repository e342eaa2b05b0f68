"""The commands as Python functions: `from vlm_sapo import load_config, train, evaluate`.

Results are plain values. Mistakes in a config or an option raise ValueError with one sentence.
"""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_sapo.config.evaluation import EvalOptions
from vlm_sapo.config.fields import as_parameter
from vlm_sapo.config.load import check, load
from vlm_sapo.config.rollout import EngineConfig, VllmConfig
from vlm_sapo.config.schema import SftConfig, TrainConfig


def load_config(config: str | Path, *overrides: str) -> TrainConfig:
    """Loads a config file, or a shipped config by name, with overrides such as `train.steps=100`."""
    return load(TrainConfig, str(config), overrides)


def load_sft_config(config: str | Path, *overrides: str) -> SftConfig:
    """Loads a config for `sft`."""
    return load(SftConfig, str(config), overrides)


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains by reinforcement learning, or resumes the run in the config's folder. Returns the contents of
    `summary.json`: `steps`, `seconds`, `eval_before/NAME` and `eval_after/NAME` for each evaluation, ..."""
    use_expandable_segments(config.rollout.engine)
    silence_libraries()
    from vlm_sapo.training.trainer import train as run

    return run(config)


def sft(config: SftConfig) -> dict[str, Any]:
    """Supervised fine-tuning on demonstrations. Returns the contents of `summary.json`."""
    use_expandable_segments(config.rollout.engine)
    silence_libraries()
    from vlm_sapo.training.sft import sft as run

    return run(config)


def evaluate(benchmark: str | Sequence[str], **options: Any) -> dict[str, Any]:
    """Evaluates a model, or a file of recorded `responses`, on benchmarks (NAME[:VARIANT][=FILE]); returns
    the contents of `results.json`, by benchmark. The options are those of `vlm-sapo eval`: the fields of
    `vlm_sapo.config.evaluation.EvalOptions`, with their defaults."""
    return evaluate_with(check(EvalOptions, {"benchmark": benchmark, **options}))


def _evaluate_signature() -> inspect.Signature:
    """That of `evaluate`, with the options written out."""
    benchmark, *options = [as_parameter(name, field) for name, field in EvalOptions.model_fields.items()]
    benchmark = benchmark.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Signature([benchmark, *options], return_annotation=dict[str, Any])


evaluate.__signature__ = _evaluate_signature()


def evaluate_with(options: EvalOptions) -> dict[str, Any]:
    """`evaluate` with its options in one object."""
    from vlm_sapo.evaluation.benchmarks import read_definition

    for name in options.names:
        read_definition(name)  # before the heavy imports
    engine = options.engine_config()
    use_expandable_segments(engine)
    silence_libraries()
    from vlm_sapo.tools.evaluate import eval_command

    return eval_command(options, engine)


ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Variables that configure torch's allocator of GPU memory, which reads them when CUDA starts. From torch
2.11 to 2.15 the first one counts, and it is the only one that vLLM 0.30 to 0.32 look at."""


def use_expandable_segments(engine: EngineConfig) -> None:
    """Lets the allocator of GPU memory extend its segments, so that micro-batches of ever different lengths
    leave fewer gaps, unless the user has configured it. vLLM switches that off where it doesn't bear it, but
    not in each version where it shares memory between processes, so not for `tensor_parallel`."""
    shared = isinstance(engine, VllmConfig) and engine.tensor_parallel > 1
    if not shared and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def silence_libraries() -> None:
    """Turns off progress bars and advice of the libraries, which would bury the run's own output."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # imported with peft wherever it is installed; it would tell of an optional package of its own
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
