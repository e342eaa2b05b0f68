"""The same from Python: `from vlm_sapo import load_config, train, evaluate`.

What the command line does with a config file and options, with the results as plain values. Mistakes raise
ValueError with one sentence.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_sapo.config.load import load
from vlm_sapo.config.schema import SftConfig, TrainConfig


def load_config(config: str | Path, *overrides: str) -> TrainConfig:
    """The config of a file, or of a shipped one by name, with overrides such as `train.steps=100`."""
    return load(TrainConfig, str(config), overrides)


def load_sft_config(config: str | Path, *overrides: str) -> SftConfig:
    """The same for supervised learning."""
    return load(SftConfig, str(config), overrides)


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains by reinforcement learning, or goes on with the run in the config's folder; returns what
    `summary.json` holds: `steps`, `seconds`, `eval_before`, `eval_after`, ..."""
    quieten()
    from vlm_sapo.training.trainer import train as run

    return run(config)


def sft(config: SftConfig) -> dict[str, Any]:
    """Supervised learning on demonstrations; returns the same."""
    quieten()
    from vlm_sapo.training.sft import sft as run

    return run(config)


def evaluate(
    benchmark: str | Sequence[str],
    *,
    model: str | None = None,
    data: str | None = None,
    samples: int = 1,
    limit: int | None = None,
    engine: str = "hf",
    engine_args: str = "{}",
    out: str | Path = "runs/eval",
    temperature: float | None = None,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    max_tokens: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    dtype: str = "float32",
    batch: int = 16,
    seed: int = 0,
    on_error: str = "stop",
    responses: str | None = None,
) -> dict[str, Any]:
    """Evaluates a model, or a file of recorded `responses`, on benchmarks (NAME[:VARIANT][=FILE]); returns
    what `results.json` holds, by benchmark. The options are those of `vlm-sapo eval`."""
    names = benchmark.split(",") if isinstance(benchmark, str) else list(benchmark)
    for wrong, message in (
        ((model is None) == (responses is None), "give --model, or --responses with recorded ones"),
        (
            data and len(names) > 1,
            f"--data ({data}) is for one benchmark; for several write --benchmark NAME=FILE,NAME=FILE",
        ),
        (on_error not in ("stop", "skip"), f"--on-error ({on_error}) must be stop or skip"),
        (
            dtype not in ("float32", "bfloat16", "float16"),
            f"--dtype ({dtype}) must be float32, bfloat16 or float16",
        ),
    ):
        if wrong:
            raise ValueError(message)
    if data:
        names = [f"{names[0]}={data}"]
    from vlm_sapo.evaluation.benchmarks import read_definition

    for name in names:
        read_definition(name)  # before the heavy imports
    drawing = _engine(engine, engine_args)
    quieten()
    from vlm_sapo.tools.evaluate import Settings, eval_command

    settings = Settings(
        model=model,
        responses=responses,
        samples=samples,
        temperature=temperature if temperature is not None else float(samples > 1),
        seed=seed,
        max_tokens=max_tokens,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        dtype=dtype,
        limit=limit,
        on_error=on_error,
        engine=engine if engine_args == "{}" else f"{engine} {engine_args}",
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
    )
    return eval_command(settings, names, Path(out), batch, drawing)


def _engine(name: str, args: str):
    """The engine section of a name and a YAML mapping; alone on its GPU, it may take most of it."""
    from vlm_sapo.config.files import parse
    from vlm_sapo.config.load import check
    from vlm_sapo.config.rollout import RolloutConfig

    fields = parse(args)
    if not isinstance(fields, dict):
        raise ValueError(f"--engine-args ({args}) must be a YAML mapping such as '{{tensor_parallel: 2}}'")
    alone = {"gpu_memory": 0.9} if name == "vllm" else {}
    return check(RolloutConfig, {"engine": {"type": name} | alone | fields}).engine


def quieten() -> None:
    """Silences the libraries' own progress bars and advice, which would bury the run's lines."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
