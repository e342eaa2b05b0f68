"""`vlm-sapo eval`: checks the benchmarks' rows, samples and grades responses, writes and prints results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from vlm_sapo.config.evaluation import EvalOptions
from vlm_sapo.config.rollout import EngineConfig
from vlm_sapo.distributed import World
from vlm_sapo.evaluation.benchmarks import Benchmark, build_benchmarks
from vlm_sapo.evaluation.evaluate import Evaluation
from vlm_sapo.evaluation.preflight import check_golds, inspect
from vlm_sapo.evaluation.results import cautions
from vlm_sapo.evaluation.samples import SampleFile, stamp, weights
from vlm_sapo.hub import check_no_revision, commit_of, is_hub_id, local_model
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import load_outline, stored_dtype
from vlm_sapo.models.tool_chat import ToolChat
from vlm_sapo.models.vlm import VLM
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.rewards.verifiers.boxes import missing_coordinates, needs_family
from vlm_sapo.rollout.build import build_episodes, build_tools, open_model
from vlm_sapo.rollout.engine import RolloutEngine
from vlm_sapo.types import Context, Example, Prompt, Response, RowError, Sampling

MAX_NAMED_ROWS = 5
"""Rows that an error names."""
MAX_PROMPT_TOKENS = 16_384
"""Longest prompt that a vLLM engine is prepared for."""
MAX_BREAKDOWN = 8
"""Breakdowns with more values are not printed."""


@dataclass(frozen=True)
class Source:
    """Where responses come from: a model, or a file of recorded ones."""

    engine: RolloutEngine
    encoder_for: Callable[[int], Callable[[Example], Prompt]]
    """The encoder that leaves room for responses of this many tokens."""
    samples: int
    batch: int


def eval_command(options: EvalOptions, engine: EngineConfig) -> dict:
    """Evaluates on the benchmarks one after the other; returns the contents of `results.json`."""
    console = Console()
    options = options.model_copy(update={"revision": _commit(options)})
    benchmarks = build_benchmarks(options.names, limit=options.limit)
    if options.dtype is None and options.responses is None:
        path = local_model(options.model, options.revision, weights=False, field="--model")
        dtype = stored_dtype(path)
        options = options.model_copy(update={"dtype": dtype or "float32"})
        says = "as the checkpoint's config says" if dtype else "since the checkpoint's config doesn't say"
        console.say(f"weights in {options.dtype}, {says} (--dtype for another)")
    folder = RunFolder(options.out)
    for benchmark in benchmarks:
        _claim(folder, benchmark, options)
    longest = max(options.max_tokens or benchmark.max_tokens for benchmark in benchmarks)
    source = _open_source(options, engine, longest, console)
    with closing(source.engine):
        return _run_all(benchmarks, source, options, folder, console)


def _commit(options: EvalOptions) -> str | None:
    """The commit of a model on the hub, which the results then name; None for a folder."""
    if options.model is None or not is_hub_id(options.model):
        check_no_revision(str(options.model), options.revision, field="--model")
        return None
    return commit_of(options.model, options.revision, "model", field="--model")


def _run_all(
    benchmarks: Sequence[Benchmark],
    source: Source,
    options: EvalOptions,
    folder: RunFolder,
    console: Console,
) -> dict:
    results, out = {}, folder.path
    for benchmark in benchmarks:
        console.say(f"{benchmark.name}: {benchmark.about}")
        try:
            results[benchmark.name] = _run(benchmark, source, options, folder, console)
        except KeyboardInterrupt:
            done = len(SampleFile(out, benchmark.name).done)
            console.say(
                f"interrupted; {done} of {len(benchmark.examples)} problems are graded in {out}; "
                "the same command continues from there"
            )
            raise
        path = out / "results.json"
        earlier = json.loads(path.read_text()) if path.is_file() else {}
        folder.replace("results.json", json.dumps(earlier | results, indent=2, ensure_ascii=False) + "\n")
    console.table(*table(results))
    for line in breakdowns(results):
        console.say(line)
    console.say(f"results are in {out}")
    return results


def _run(
    benchmark: Benchmark, source: Source, options: EvalOptions, folder: RunFolder, console: Console
) -> dict:
    max_tokens = options.max_tokens or benchmark.max_tokens
    encode = source.encoder_for(max_tokens)
    samples = SampleFile(folder.path, benchmark.name)
    skip = options.on_error == "skip"
    sampling = Sampling(
        source.samples,
        max_tokens,
        options.sampling_temperature,
        options.seed,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
    )
    if isinstance(source.engine, Recorded):
        source.engine.check_coordinates(benchmark)
        known = {benchmark.examples.key(row) for row in range(len(benchmark.examples))}
        if len(known) < len(benchmark.examples):
            raise ValueError(
                f"rows of {benchmark.name} share ids, so recorded responses can't be assigned; give "
                "each row its own id"
            )
        if unknown := [name for name in source.engine.responses if name not in known]:
            console.warn(
                f"{len(unknown)} recorded ids are no rows of {benchmark.name}: "
                f"{', '.join(unknown[:MAX_NAMED_ROWS])}"
            )
    with closing(RewardPool(benchmark.parts)) as reward:
        if isinstance(encode, Encoder) and not samples.done:
            check(benchmark, encode, reward, skip=skip, console=console)
        total = len(benchmark.examples)
        with console.progress(benchmark.name, total, len(samples.done)) as show:
            evaluation = Evaluation(
                source.engine,
                encode,
                reward,
                sampling,
                benchmark.measure,
                batch=source.batch,
                skip=skip,
            )
            result, records = evaluation.run(benchmark.examples, samples, show)
    samples.flush()
    console.samples(records[:3])
    for caution in cautions(result, limit=options.limit, max_tokens=max_tokens):
        console.warn(f"{benchmark.name}: {caution}")
    return result | {**options.settings, "max_tokens": max_tokens, "samples": source.samples}


def check(benchmark: Benchmark, encode: Encoder, reward: RewardPool, *, skip: bool, console: Console) -> None:
    """Checks every row before anything is generated. Raises ValueError naming the rows that can't be used, or
    with `skip` only warns of them. A row whose gold answer its own verifier rejects can't be used."""
    with console.progress(f"check {benchmark.name}", len(benchmark.examples), lines=2) as show:
        rows = inspect(benchmark.examples, encode, progress=lambda done: show(done, "rows checked"))
    [verdict, *_] = benchmark.parts
    if reward.parts[0].builtin:  # a user's function may want another form of an answer
        rows = check_golds(benchmark.examples, rows, reward, verdict)
    bad = [row.error or f"{row.example.label}: {row.gold}" for row in rows if row.error or row.gold]
    if not bad:
        return
    more = f"\n... and {len(bad) - MAX_NAMED_ROWS} more" if len(bad) > MAX_NAMED_ROWS else ""
    lines = "\n".join(bad[:MAX_NAMED_ROWS])
    message = f"{benchmark.name}: {len(bad)} of {len(rows)} rows can't be used:\n{lines}{more}"
    if not skip:
        raise ValueError(f"{message}\nfix these rows, or leave out the unreadable ones with --on-error skip")
    console.warn(message)


def table(results: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """The results as a table: header and rows, without columns that no benchmark has."""
    header = [
        "benchmark",
        "n",
        "pass@1",
        "95 % interval",
        "official scorer",
        "tokens",
        "truncated",
        "per response",
        "official metric",
    ]
    rows = []
    for name, result in results.items():
        low, high = result["ci95"]
        official = result.get("official")
        rows.append(
            [
                name,
                str(result["n"]),
                f"{result['pass@1']:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{official['pass@1']:.3f}" if official else "",
                f"{result['response_tokens']:.0f}" if "response_tokens" in result else "",
                f"{result['truncated']:.1%}" if "truncated" in result else "",
                _turns_text(result),
                _metric_text(result.get("metric", {})),
            ]
        )
    used = [column for column in range(len(header)) if any(row[column] for row in rows)]
    return [header[column] for column in used], [[row[column] for column in used] for row in rows]


def _turns_text(result: dict) -> str:
    means = result.get("episodes", {})
    return ", ".join(f"{means[name]:.2g} {name}" for name in ("turns", "calls", "images") if name in means)


def breakdowns(results: dict[str, dict]) -> list[str]:
    """A line for each short breakdown: pass@1 and number of problems by value."""
    return [
        f"{name} by {column}: "
        + ", ".join(f"{value} {item['pass@1']:.3f} ({item['n']})" for value, item in values.items())
        for name, result in results.items()
        for column, values in result.get("by", {}).items()
        if 1 < len(values) <= MAX_BREAKDOWN
    ]


def _metric_text(metric: dict) -> str:
    return ", ".join(
        f"{name} {value['score']:.3f}" if isinstance(value, dict) else f"{name} {value:.3g}"
        for name, value in metric.items()
    )


def _open_source(options: EvalOptions, engine: EngineConfig, max_tokens: int, console: Console) -> Source:
    if options.responses:
        encoder = None
        if options.model:
            vlm = load_outline(local_model(options.model, options.revision, weights=False, field="--model"))
            encoder = Encoder(
                vlm, min_pixels=options.min_pixels, max_pixels=options.max_pixels, max_tokens=float("inf")
            )
        recorded = Recorded(Path(options.responses), encoder)
        return Source(recorded, recorded.encoder_for, recorded.samples, options.batch)
    environment = options.environment_config()
    longest = None if engine.shares_weights else max_tokens + MAX_PROMPT_TOKENS
    vlm, rollout_engine = open_model(
        engine,
        local_model(options.model, options.revision, field="--model"),
        dtype=options.dtype,
        longest=longest,
        sequences_per_batch=options.batch * options.samples,
        warn=console.warn,
        returned_images=0 if environment is None else environment.max_images,
    )

    tools = build_tools(environment, vlm)

    def encoder_for(max_tokens: int) -> Encoder:
        return _encoder(vlm, options, tools, max_tokens, min(longest or vlm.context, vlm.context))

    if environment is not None:
        encode = encoder_for(max_tokens)
        rollout_engine = build_episodes(environment, rollout_engine, encode, World(), console.warn)
    batch = max(rollout_engine.problems_at_once(options.samples), options.batch)
    return Source(rollout_engine, encoder_for, options.samples, batch)


def _encoder(vlm: VLM, options: EvalOptions, tools: ToolChat, max_tokens: int, context: int) -> Encoder:
    room = context - max_tokens
    if room <= 0:
        raise ValueError(
            f"--max-tokens ({max_tokens}) must leave room for a prompt in the model's context of "
            f"{vlm.context} tokens; lower it"
        )
    owner = "model" if context == vlm.context else "engine"
    return Encoder(
        vlm,
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
        max_tokens=room,
        limit=(
            f"what the {owner}'s context of {context} tokens leaves beside --max-tokens {max_tokens}; "
            "lower --max-tokens or --max-pixels"
        ),
        tools=tools,
    )


def _claim(folder: RunFolder, benchmark: Benchmark, options: EvalOptions) -> None:
    """Records in the folder what is evaluated there. Raises ValueError where it has samples of the same
    benchmark with other settings."""
    path = folder.path / "eval.yaml"
    stored: dict[str, Any] = yaml.safe_load(path.read_text()) if path.is_file() else {}
    settings = options.settings | {
        "weights": weights(options.model),
        "problems": len(benchmark.examples),
        "recorded": stamp(options.responses),
        "definition": benchmark.origin,
    }
    settings = json.loads(json.dumps(settings))
    before = stored.get(benchmark.name, settings)
    differing = [name for name in settings if before.get(name) != settings[name]]
    if differing and SampleFile(folder.path, benchmark.name).done:
        raise ValueError(
            f"--out ({folder.path}) has samples of {benchmark.name} that differ in {', '.join(differing)}; "
            "choose another folder, or remove this one"
        )
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.replace("eval.yaml", yaml.safe_dump(stored | {benchmark.name: settings}, sort_keys=False))


class Recorded:
    """An engine that returns recorded responses by row id, from JSON lines `id, response` (or `responses`, a
    list). Its prompts are those of the model that wrote them, by its encoder, or the examples alone; its
    responses have no tokens."""

    in_background = False
    shares_weights = True

    def __init__(self, path: Path, encoder: Encoder | None = None):
        self.path, self.encoder = path, encoder
        if not path.is_file():
            raise ValueError(f"--responses ({path}) must be a file of JSON lines; there is none")
        self.responses: dict[str, list[str]] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                name, texts = _read_line(path, number, line)
                self.responses.setdefault(name, []).extend(texts)
        counts = {name: len(texts) for name, texts in self.responses.items()}
        if len(set(counts.values())) != 1:
            fewest, most = min(counts, key=counts.get, default=""), max(counts, key=counts.get, default="")
            raise ValueError(
                f"--responses ({path}) must have equally many responses for every id; it has "
                f"{counts.get(fewest, 0)} for {fewest!r} and {counts.get(most, 0)} for {most!r}"
            )
        [self.samples] = set(counts.values())

    def encoder_for(self, max_tokens: int) -> Callable[[Example], Prompt]:
        """The encoder, whatever the length."""
        return self.encode

    def encode(self, example: Example) -> Prompt:
        """Raises RowError where the file has no response for the row."""
        if example.id not in self.responses:
            raise RowError(
                f"{example.label}: {self.path} has no response with this id; add it, or skip such rows with "
                "--on-error skip"
            )
        if self.encoder:
            return self.encoder(example)
        empty = torch.zeros(0, dtype=torch.int64)
        return Prompt(example, "", "", empty, empty.expand(3, 0), example.images, None, None)

    def check_coordinates(self, benchmark: Benchmark) -> None:
        """Raises ValueError where boxes are graded and neither model nor benchmark says their coordinates."""
        if self.encoder is None and any(needs_family(part["name"], part["args"]) for part in benchmark.parts):
            raise ValueError(
                f"--responses ({self.path}) are boxes: give --model with the model that wrote them, of which "
                "only config and processor are read; or "
                + missing_coordinates(f"a copy of {benchmark.name}.yaml, in verifier.args,")
            )

    def problems_at_once(self, samples: int) -> int:
        """One: there is nothing to compute."""
        return 1

    def sync(self, vlm: VLM) -> None:
        """Recorded responses need no weights."""

    def close(self) -> None:
        """The file is read already."""

    def generate(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Response]]:
        """The first `sampling.group` recorded responses to each prompt."""
        return [
            [_recorded(text) for text in self.responses[item.prompt.example.id][: sampling.group]]
            for item in contexts
        ]


def _recorded(text: str) -> Response:
    """A response of which only the text is known."""
    empty = torch.zeros(0)
    return Response(
        ids=empty.long(),
        mask=empty.bool(),
        logprobs=empty,
        positions=empty.long().expand(3, 0),
        spans=(),
        text=text,
        finish="stop",
    )


def _read_line(path: Path, number: int, line: str) -> tuple[str, list[str]]:
    """Id and responses of a line. Raises ValueError naming file and line."""
    try:
        row = json.loads(line)
        texts = row["responses"] if "responses" in row else [row["response"]]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TypeError("a response must be a text, responses a list of texts")
        return str(row["id"]), texts
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line {number}: a JSON object with id and response is needed ({error!r})"
        ) from error
