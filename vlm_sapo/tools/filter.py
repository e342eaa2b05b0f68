"""Selects the training rows that the current model can learn from: those it solves sometimes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from vlm_sapo.config import schema as cfg
from vlm_sapo.data.formats import as_turns, holds_image, listed, with_images
from vlm_sapo.data.images import decode, is_path
from vlm_sapo.data.rows import ExampleSet
from vlm_sapo.data.sources import build_examples
from vlm_sapo.distributed import World
from vlm_sapo.evaluation.evaluate import Evaluation
from vlm_sapo.evaluation.results import Measure
from vlm_sapo.evaluation.samples import SampleFile, stamp, weights
from vlm_sapo.hub import local_model
from vlm_sapo.plugins import locate
from vlm_sapo.reporting.console import Console
from vlm_sapo.rollout.build import build_episodes, build_tools, open_model
from vlm_sapo.training.build_policy import build_encoder
from vlm_sapo.training.build_rollouts import build_reward
from vlm_sapo.types import Sampling


def filter_command(config: cfg.TrainConfig, *, samples: int, keep: tuple[float, float], out: Path) -> None:
    """Samples every training row, writes `samples.jsonl` with all responses and `kept.jsonl` (`kept_0.jsonl`,
    ... by task of a mixture) with the rows whose pass rate is within `keep`, both ends included. After an
    interruption the same command continues."""
    console = Console()
    rollout = config.rollout
    vlm, engine = open_model(
        rollout.engine,
        local_model(config.model.path, config.model.revision),
        dtype=config.model.dtype,
        longest=config.data.max_prompt_tokens + rollout.max_tokens,
        sequences_per_batch=rollout.batch_sequences,
        warn=console.warn,
        returned_images=rollout.returned_images,
    )
    tools = build_tools(rollout.environment, vlm)
    encode = build_encoder(vlm, config.model, max_tokens=config.data.max_prompt_tokens, tools=tools)
    if rollout.environment is not None:
        engine = build_episodes(rollout.environment, engine, encode, World(), console.warn)
    sampling = Sampling(samples, config.rollout.max_tokens, config.rollout.temperature, config.run.seed)
    measure = Measure(config.eval.part or config.reward.measured)
    claim(out, config, samples)
    overrides = []
    with closing(engine), closing(build_reward(config.reward)) as reward:
        evaluation = Evaluation(
            engine,
            encode,
            reward,
            sampling,
            measure,
            batch=engine.problems_at_once(samples),
            skip=config.data.on_error == "skip",
        )
        for number, task in enumerate(config.data.tasks):
            examples = build_examples(task)
            file = SampleFile(out, task.task)
            with console.progress(f"sample {task.task}", len(examples)) as show:
                _, records = evaluation.run(examples, file, show)
            file.flush()
            target = out / (f"kept_{number}.jsonl" if config.data.mixture else "kept.jsonl")
            count = write_selected(target, examples, records, keep)
            console.table(*histogram(records, keep))
            console.say(f"{task.task}: kept {count} of {len(records)} rows in {target}")
            field = f"data.mixture.{number}" if config.data.mixture else "data"
            overrides += [f"{field}.source={target}", f"{field}.args=null", f"{field}.split=null"]
            overrides.append(f"{field}.pictures_anywhere=true")  # each image was read where it is
    console.say(f"train on them with the same config and: {' '.join(overrides)}")


def claim(out: Path, config: cfg.TrainConfig, samples: int) -> None:
    """Records in the folder what is sampled there. Raises ValueError if that was something else before."""
    parts = config.model_dump(mode="json", include={"model", "data", "rollout", "reward"})
    files = [stamp(task.args.get("path") or locate(task.source)) for task in config.data.tasks]
    settings = json.dumps(
        parts
        | {
            "samples": samples,
            "seed": config.run.seed,
            "weights": weights(config.model.path),
            "files": files,
        },
        indent=2,
    )
    path = out / "filter.json"
    if path.is_file() and path.read_text() != settings:
        raise ValueError(
            f"--out ({out}) holds samples of another config, model, data or number; give another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(settings)


def pass_rate(record: Mapping[str, Any]) -> float:
    """Mean score of a row's samples."""
    return float(np.mean(record["scores"]))


def write_selected(
    path: Path, examples: ExampleSet, records: Sequence[Mapping[str, Any]], keep: tuple[float, float]
) -> int:
    """Writes the rows within `keep` with the source's own columns and `pass_rate`; returns their number."""
    low, high = keep
    selected = [record for record in records if low <= pass_rate(record) <= high]
    lines = [
        json.dumps(
            _portable(record["row"], examples, path) | {"pass_rate": pass_rate(record)},
            default=str,
        )
        for record in selected
    ]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(selected)


def histogram(
    records: Sequence[Mapping[str, Any]], keep: tuple[float, float]
) -> tuple[list[str], list[list[str]]]:
    """A table: how many rows are never right, too hard, kept, too easy, always right."""
    low, high = keep
    names = [
        "never right",
        f"below {low:g}",
        f"{low:g} to {high:g} (kept)",
        f"above {high:g}",
        "always right",
    ]
    counts: Counter[str] = Counter()
    for rate in map(pass_rate, records):
        index = 2 if low <= rate <= high else 0 if rate == 0 else 4 if rate == 1 else 1 if rate < low else 3
        counts[names[index]] += 1
    return ["pass rate", "rows"], [[name, str(counts[name])] for name in names]


def _portable(number: int, examples: ExampleSet, path: Path) -> dict[str, Any]:
    """A row as JSON: images that are files by their path, others are written to files beside the rows."""
    numbers = count()

    def as_file(value: Any) -> str:
        target = path.parent / f"{path.stem}_pictures" / f"{number}_{name}_{next(numbers)}.png"
        return _image_path(value, examples.folder, target)

    columns = {}
    for name, value in examples.raw(number).items():
        turns = as_turns(value)
        if turns:
            columns[name] = with_images(turns, as_file)
        elif name in examples.image_columns or holds_image(value):
            paths = [as_file(item) for item in listed(value) if item is not None]
            columns[name] = paths if isinstance(value, list) or len(paths) > 1 else (paths or [None])[0]
        else:
            columns[name] = value
    return columns


def _image_path(value: Any, folder: Path, target: Path) -> str:
    """The path of an image's file; an image that is no file is written to `target`."""
    if is_path(value):
        return str((folder / value).resolve())
    target.parent.mkdir(exist_ok=True)
    decode(value, folder).save(target)
    return str(target.resolve())
