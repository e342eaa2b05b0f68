"""What `vlm-sapo eval` does: checks the benchmarks' rows, draws and grades responses, writes and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlm_sapo.types import Context, Example, Prompt, Response, RowError, Sampling

if TYPE_CHECKING:
    from vlm_sapo.models.vlm import VLM

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import yaml

from vlm_sapo.config.rollout import EngineConfig
from vlm_sapo.evaluation.benchmarks import Benchmark, build_benchmarks
from vlm_sapo.evaluation.evaluate import Evaluation
from vlm_sapo.evaluation.preflight import check_golds, inspect
from vlm_sapo.evaluation.samples import SampleFile, stamp, weights
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.vlm import VLM
from vlm_sapo.plugins import locate
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import RunFolder
from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.rollout.build import open_model
from vlm_sapo.rollout.engine import RolloutEngine

SHOWN = 5
"""Rows that an error names."""
MANY = 0.1
"""Share of responses from which the user is told that they were cut or state no answer."""
PROMPT = 16_384
"""Tokens of the longest prompt that a vLLM engine is prepared for."""
FEW = 8
"""A breakdown with more values than this is left to results.json."""


@dataclass(frozen=True)
class Settings:
    """What decides the numbers, beside the benchmark's own definition."""

    model: str | None
    responses: str | None
    samples: int
    temperature: float
    seed: int
    max_tokens: int | None
    min_pixels: int | None
    max_pixels: int | None
    dtype: str
    limit: int | None
    on_error: str
    engine: str = "hf"
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass(frozen=True)
class Source:
    """Where responses come from: a model, or a file of recorded ones."""

    engine: RolloutEngine
    encode_for: Callable[[int], Callable[[Example], Prompt]]
    """The encoder for responses of so many tokens."""
    samples: int
    batch: int


def eval_command(
    settings: Settings, names: Sequence[str], out: Path, batch: int, engine: EngineConfig
) -> dict:
    """Evaluates on the named benchmarks one after the other; returns what `results.json` holds."""
    console = Console()
    benchmarks = build_benchmarks(names, limit=settings.limit)
    folder = RunFolder(out)
    for benchmark in benchmarks:
        _claim(folder, benchmark, settings)
    responses = max(settings.max_tokens or benchmark.max_tokens for benchmark in benchmarks)
    source = _open_source(settings, batch, engine, responses, console)
    with closing(source.engine):
        return _run_all(benchmarks, source, settings, folder, console)


def _run_all(benchmarks: Sequence[Benchmark], source: Source, settings, folder: RunFolder, console) -> dict:
    results, out = {}, folder.path
    for benchmark in benchmarks:
        console.say(f"{benchmark.name}: {benchmark.about}")
        try:
            results[benchmark.name] = _run(benchmark, source, settings, folder, console)
        except KeyboardInterrupt:
            done = len(SampleFile(out, benchmark.name).done)
            console.say(
                f"interrupted; {done} of {len(benchmark.examples)} problems are graded in {out}, "
                "and the same command goes on from there"
            )
            raise
        held = json.loads((out / "results.json").read_text()) if (out / "results.json").is_file() else {}
        folder.replace("results.json", json.dumps(held | results, indent=2, ensure_ascii=False) + "\n")
    console.table(*table(results))
    for line in breakdowns(results):
        console.say(line)
    console.say(f"everything is in {out}")
    return results


def _run(
    benchmark: Benchmark, source: Source, settings: Settings, folder: RunFolder, console: Console
) -> dict:
    max_tokens = settings.max_tokens or benchmark.max_tokens
    encode = source.encode_for(max_tokens)
    samples = SampleFile(folder.path, benchmark.name)
    skip = settings.on_error == "skip"
    sampling = Sampling(
        source.samples,
        max_tokens,
        settings.temperature,
        settings.seed,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
    )
    if isinstance(source.engine, Recorded):
        known = {benchmark.examples.key(row) for row in range(len(benchmark.examples))}
        if len(known) < len(benchmark.examples):
            raise ValueError(
                f"rows of {benchmark.name} share ids, so recorded responses cannot be told apart; give its "
                "rows ids of their own"
            )
        if unknown := [name for name in source.engine.responses if name not in known]:
            console.warn(
                f"{len(unknown)} recorded ids are no rows of {benchmark.name}: {', '.join(unknown[:SHOWN])}"
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
    for caution in cautions(result, settings, max_tokens):
        console.warn(f"{benchmark.name}: {caution}")
    return result | {**vars(settings), "max_tokens": max_tokens, "samples": source.samples}


def cautions(result: dict, settings: Settings, max_tokens: int) -> list[str]:
    """What a reader of the numbers must know."""
    found = []
    if settings.limit == result["n"] + result.get("skipped", 0):
        found.append(f"only the first {settings.limit} problems were asked; that is not the benchmark")
    if "skipped" in result:
        found.append(f"{result['skipped']} problems were left out; that is not the whole benchmark")
    if result.get("truncated", 0.0) > MANY:
        share = f"{result['truncated']:.0%}"
        found.append(f"{share} of the responses were cut at {max_tokens} tokens; raise --max-tokens")
    if result["no_answer"] > MANY:
        found.append(f"{result['no_answer']:.0%} of the responses state no answer")
    return found


def check(benchmark: Benchmark, encode: Encoder, reward: RewardPool, *, skip: bool, console: Console) -> None:
    """Looks at every row before anything is generated. Raises ValueError naming the rows that can't be used,
    or only warns of them with `skip`; a gold answer that its own verifier rejects is such a row."""
    with console.progress(f"check {benchmark.name}", len(benchmark.examples), lines=2) as show:
        rows = inspect(benchmark.examples, encode, progress=lambda done: show(done, "rows looked at"))
    [verdict, *_] = benchmark.parts
    if reward.parts[0].builtin:  # a user's function may want another form of an answer
        rows = check_golds(benchmark.examples, rows, reward, verdict)
    bad = [row.error or f"{row.example.label}: {row.gold}" for row in rows if row.error or row.gold]
    if not bad:
        return
    more = f"\n... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    message = (
        f"{benchmark.name}: {len(bad)} of {len(rows)} rows cannot be used:\n" + "\n".join(bad[:SHOWN]) + more
    )
    if not skip:
        raise ValueError(f"{message}\nmend these rows, or leave out what cannot be read with --on-error skip")
    console.warn(message)


def table(results: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """The results as a table: header and rows, without columns that no benchmark has."""
    header = [
        "benchmark",
        "n",
        "pass@1",
        "95 % interval",
        "official rule",
        "tokens",
        "truncated",
        "authors' metric",
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
                _flat(result.get("metric", {})),
            ]
        )
    used = [place for place in range(len(header)) if any(row[place] for row in rows)]
    return [header[place] for place in used], [[row[place] for place in used] for row in rows]


def breakdowns(results: dict[str, dict]) -> list[str]:
    """A line for each short breakdown: pass@1 and number of problems by value."""
    return [
        f"{name} by {column}: "
        + ", ".join(f"{value} {item['pass@1']:.3f} ({item['n']})" for value, item in values.items())
        for name, result in results.items()
        for column, values in result.get("by", {}).items()
        if 1 < len(values) <= FEW
    ]


def _flat(metric: dict) -> str:
    return ", ".join(
        f"{name} {value['score']:.3f}" if isinstance(value, dict) else f"{name} {value:.3g}"
        for name, value in metric.items()
    )


def _open_source(
    settings: Settings, batch: int, engine: EngineConfig, responses: int, console: Console
) -> Source:
    if settings.responses:
        recorded = Recorded(Path(settings.responses))
        return Source(recorded, lambda max_tokens: recorded.encode, recorded.samples, batch)
    longest = None if engine.shares_weights else responses + PROMPT
    vlm, drawing = open_model(
        engine,
        str(locate(settings.model)),
        dtype=settings.dtype,
        longest=longest,
        prompts_per_batch=batch,
        warn=console.warn,
    )

    def encode_for(max_tokens: int) -> Encoder:
        return _encoder(vlm, settings, max_tokens, min(longest or vlm.context, vlm.context))

    return Source(drawing, encode_for, settings.samples, max(drawing.problems_at_once, batch))


def _encoder(vlm: VLM, settings: Settings, max_tokens: int, context: int) -> Encoder:
    room = context - max_tokens
    if room <= 0:
        raise ValueError(
            f"--max-tokens ({max_tokens}) must leave room for a prompt in the model's context of "
            f"{vlm.context} tokens; lower it"
        )
    limit = (
        f"what the {'model' if context == vlm.context else 'engine'}'s context of {context} tokens leaves "
        f"beside --max-tokens {max_tokens}; "
        "lower --max-tokens or --max-pixels"
    )
    return Encoder(
        vlm,
        min_pixels=settings.min_pixels,
        max_pixels=settings.max_pixels,
        max_tokens=room,
        limit=limit,
    )


def _claim(folder: RunFolder, benchmark: Benchmark, settings: Settings) -> None:
    """Notes in the folder what is evaluated there, or raises ValueError where samples of the same benchmark
    were drawn with other settings."""
    path = folder.path / "eval.yaml"
    held: dict[str, Any] = yaml.safe_load(path.read_text()) if path.is_file() else {}
    wanted = vars(settings) | {"weights": weights(settings.model), "problems": len(benchmark.examples)}
    wanted |= {"recorded": stamp(settings.responses), "definition": benchmark.origin}
    wanted = json.loads(json.dumps(wanted))
    other = held.get(benchmark.name, wanted)
    differ = [name for name in wanted if other.get(name) != wanted[name]]
    if differ and SampleFile(folder.path, benchmark.name).done:
        raise ValueError(
            f"--out ({folder.path}) holds samples of {benchmark.name} that differ in {', '.join(differ)}; "
            "give another folder, or remove that one"
        )
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.replace("eval.yaml", yaml.safe_dump(held | {benchmark.name: wanted}, sort_keys=False))


class Recorded:
    """Reads JSON lines `id, response` (or `responses`, a list) and gives them back by row id.

    It stands in for the encoder too: a prompt is the example alone. Its completions have no tokens.
    """

    in_background = False
    shares_weights = True
    problems_at_once = 1

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise ValueError(f"--responses ({path}) must be a file of JSON lines; there is none")
        self.responses: dict[str, list[str]] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                name, texts = _read_line(path, number, line)
                self.responses.setdefault(name, []).extend(texts)
        counts = {name: len(texts) for name, texts in self.responses.items()}
        if len(set(counts.values())) != 1:
            few, many = min(counts, key=counts.get, default=""), max(counts, key=counts.get, default="")
            raise ValueError(
                f"--responses ({path}) must hold equally many responses for every id; it has "
                f"{counts.get(few, 0)} for {few!r} and {counts.get(many, 0)} for {many!r}"
            )
        [self.samples] = set(counts.values())

    def encode(self, example: Example) -> Prompt:
        """Raises RowError where nothing was recorded for the row."""
        if example.id not in self.responses:
            raise RowError(
                f"{example.label}: {self.path} has no response of this id; add it, or --on-error skip leaves "
                "such rows out"
            )
        nothing = torch.zeros(0, dtype=torch.int64)
        return Prompt(example, "", "", nothing, nothing.expand(3, 0), example.images, None, None)

    def sync(self, vlm: VLM) -> None:
        """Nothing to take over."""

    def close(self) -> None:
        """Nothing is held."""

    def generate(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Response]]:
        """The first `sampling.group` responses that were recorded for each."""
        return [
            [_recorded(text) for text in self.responses[item.prompt.example.id][: sampling.group]]
            for item in contexts
        ]


def _recorded(text: str) -> Response:
    """A response of which nothing but the text is known."""
    nothing = torch.zeros(0)
    return Response(
        ids=nothing.long(),
        mask=nothing.bool(),
        logprobs=nothing,
        positions=nothing.long().expand(3, 0),
        spans=(),
        text=text,
        finish="stop",
    )


def _read_line(path: Path, number: int, line: str) -> tuple[str, list[str]]:
    """Id and responses of a line."""
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
