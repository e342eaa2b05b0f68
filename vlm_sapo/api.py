"""The commands as Python functions: `from vlm_sapo import load_config, train, evaluate`.

Results are plain values. Mistakes in a config or an option raise ValueError with one sentence.
"""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from vlm_sapo.config.data import HELD_OUT
from vlm_sapo.config.evaluation import EvalOptions
from vlm_sapo.config.fields import Section, as_parameter
from vlm_sapo.config.files import parse
from vlm_sapo.config.load import check, dump, load, read_values
from vlm_sapo.config.rollout import EngineConfig, VllmConfig
from vlm_sapo.config.schema import SftConfig, TrainConfig
from vlm_sapo.distributed import Interrupted as Interrupted  # what `train` raises
from vlm_sapo.plugins import PYTHON, passing
from vlm_sapo.reporting.callbacks import Callback, checked


def load_config(config: str | Path, *overrides: str) -> TrainConfig:
    """Loads a config file, or a shipped config by name, with overrides such as `train.steps=100`."""
    return load(TrainConfig, str(config), overrides)


def load_sft_config(config: str | Path, *overrides: str) -> SftConfig:
    """Loads a config for `sft`."""
    return load(SftConfig, str(config), overrides)


def train(
    config: TrainConfig | Mapping[str, Any] | str | Path,
    *,
    dataset: Any = None,
    eval_dataset: Any = None,
    reward: Any = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Trains by reinforcement learning, or resumes the run in the config's folder.

    `config` is what `load_config` returns, a file or a shipped name, or a mapping of a config's sections.
    `dataset` and `eval_dataset` are rows in memory, a list of mappings or a `datasets.Dataset`, in place of
    `data.source` and of the source of `eval.data`. `reward` is a function `(response, example)`, one with
    TRL's signature `(completions, **columns)`, the name of a verifier, or a list of these or of parts as in
    `reward.parts`, whose `name` may be a function. A run stores hashes of such objects, and goes on only
    with the same ones. `callbacks` see steps, responses, evaluations and checkpoints.

    Returns the contents of `summary.json`: `steps`, `seconds`, `eval_before/NAME` and `eval_after/NAME` for
    each evaluation, ... Raises ValueError for mistakes, `Interrupted` where a signal stopped the run, and
    what a callback raised.
    """
    callbacks = checked(callbacks)
    values, objects = _with_objects(TrainConfig, config, dataset, eval_dataset, reward)
    config = check(TrainConfig, values)
    use_expandable_segments(config.rollout.engine)
    silence_libraries()
    from vlm_sapo.training.trainer import train as run

    with passing(objects):
        return run(config, callbacks)


def sft(
    config: SftConfig | Mapping[str, Any] | str | Path,
    *,
    dataset: Any = None,
    eval_dataset: Any = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Supervised fine-tuning on demonstrations, with arguments like those of `train`. Returns the contents of
    `summary.json`."""
    callbacks = checked(callbacks)
    values, objects = _with_objects(SftConfig, config, dataset, eval_dataset, None)
    config = check(SftConfig, values)
    use_expandable_segments(config.rollout.engine)
    silence_libraries()
    from vlm_sapo.training.sft import sft as run

    with passing(objects):
        return run(config, callbacks)


def _with_objects(
    kind: type[Section],
    config: Section | Mapping[str, Any] | str | Path,
    dataset: Any,
    eval_dataset: Any,
    reward: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of a config that names these objects, and the objects by name."""
    if isinstance(config, Section):
        values = parse(dump(config))
    elif isinstance(config, Mapping):
        values = deepcopy(dict(config))
    else:
        values = read_values(kind, str(config))
    objects: dict[str, Any] = {}
    for section, argument, rows in (("data", "dataset", dataset), ("eval", "eval_dataset", eval_dataset)):
        if rows is not None:
            objects[f"{PYTHON}{argument}"] = _name_rows(values, section, argument, rows)
    if reward is not None:
        from vlm_sapo.rewards.functions import config_parts

        parts, functions = config_parts(reward)
        if both := sorted(objects.keys() & functions.keys()):
            raise ValueError(f"a reward function can't be called {both[0].removeprefix(PYTHON)}; rename it")
        objects |= functions
        other = values.get("reward")
        values["reward"] = (other if isinstance(other, dict) else {}) | {"parts": parts}
    return values, objects


def _name_rows(values: dict[str, Any], section: str, argument: str, rows: Any) -> Sequence[Any]:
    """Lets a config's `data` or `eval.data` name these rows. Returns them as they are read."""
    from vlm_sapo.data.memory import usable_rows
    from vlm_sapo.fingerprint import fingerprint_rows

    rows = usable_rows(rows, argument)
    if section == "eval":
        values["eval"] = parent = values.get("eval") or {}
        known = parent.get("data") or _how_rows_are_read(values.get("data"))
        known = known[0] if isinstance(known, list) and len(known) == 1 else known
    else:
        parent, known = values, values.get("data") or {}
    known = {} if isinstance(known, str) else known  # a source alone
    if not isinstance(known, dict) or known.get("mixture"):
        raise ValueError(
            f"{argument} is one set of rows, and the config's {section} names several sources; leave "
            f"{argument} out, or name one source"
        )
    unset = dict.fromkeys(("subset", "revision", "args"))  # `split` may be a value of a column
    named = {"source": f"{PYTHON}{argument}", "fingerprint": fingerprint_rows(rows)}
    name = HELD_OUT if section == "eval" else argument
    parent["data"] = {"name": name, **known, **unset, **named}
    return rows


def _how_rows_are_read(data: Any) -> dict[str, Any]:
    """The fields of `data` that held-out rows of the same kind need too."""
    fields = ("recipe", "columns", "transform", "system", "template", "verifier")
    return {name: data[name] for name in fields if name in data} if isinstance(data, dict) else {}


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


def report(*runs: str | Path, out: str | Path | None = None, groups: int | None = None) -> Path:
    """Writes the HTML report of one or several runs, by default into the first one's folder. Returns its
    path. `groups` is the most groups of a run (100), or problems of an evaluation (1,000), that it shows.

    Raises ValueError for folders that are neither.
    """
    if not runs:
        raise ValueError("report() needs the folder of a run or of an evaluation; it got none")
    from vlm_sapo.tools.report.command import report_command

    page = Path(out) if out else Path(runs[0]) / "report.html"
    report_command([Path(run) for run in runs], page, groups=groups, watch=False, port=0)
    return page


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
