"""The command line. Arguments are read before anything heavy is imported."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from vlm_sapo.api import quieten
from vlm_sapo.distributed import ElsewhereError, Interrupted
from vlm_sapo.reporting.console import escape_control

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the plain help is there in half the time
    help="Reinforcement learning for vision-language models with Soft Adaptive Policy Optimization.",
)
ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped config.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Fields to override.")]


ANY_LENGTH = ["train.steps=1"]
"""What only looks at rows needs no length of training."""


@app.command("train")
def train_(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Train a model by reinforcement learning."""
    from vlm_sapo.api import load_config, train

    _report(train(load_config(config, *(overrides or []))))


@app.command("sft")
def sft_(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Cold start: supervised learning on demonstrations."""
    from vlm_sapo.api import load_sft_config, sft

    _report(sft(load_sft_config(config, *(overrides or []))))


@app.command()
def doctor(
    config: ConfigArgument,
    overrides: Overrides = None,
    against: Annotated[
        str,
        typer.Option(
            help="Further benchmarks, NAME[=FILE] with commas, whose pictures must not be trained on."
        ),
    ] = "",
    out: Annotated[Path, typer.Option(help="Where to write the findings.")] = Path("runs/doctor.json"),
) -> None:
    """Look at every row of a config before any GPU hour: exit code 1 where something would break the run."""
    from vlm_sapo.config.load import load
    from vlm_sapo.config.schema import TrainConfig

    parsed = load(TrainConfig, config, [*ANY_LENGTH, *(overrides or [])])
    quieten()
    from vlm_sapo.tools.doctor import doctor_command

    if not doctor_command(parsed, [name for name in against.split(",") if name], out):
        raise typer.Exit(1)


@app.command()
def score(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Rows with responses and gold answers.")],
    reward: Annotated[
        str, typer.Option(help="A verifier, `auto`, `file.py:function` or `package.module:function`.")
    ] = "auto",
    args: Annotated[str, typer.Option(help="Keyword arguments of the reward, as a YAML mapping.")] = "{}",
    response: Annotated[
        str, typer.Option(help="Columns with the response; the first that is not empty counts.")
    ] = "response",
    gold: Annotated[str, typer.Option(help="Column with the gold answer, if not `gold` or `answer`.")] = "",
    out: Annotated[Path | None, typer.Option(help="Where to write the rows with score and outcome.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for a response.")] = 10.0,
    on_error: Annotated[str, typer.Option(help="When a function raises: stop, or zero.")] = "stop",
) -> None:
    """Grade a file of responses, and compare with the verdicts that its rows carry."""
    from vlm_sapo.tools.score import ScoreOptions, score_command

    options = ScoreOptions(args, response, gold, out, timeout, on_error)
    score_command(file, reward, options)


@app.command("eval")
def evaluate_(
    benchmark: Annotated[
        str, typer.Option(help="NAME[:VARIANT][=FILE], several with commas; eval/README.md.")
    ],
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the model.")] = None,
    data: Annotated[str | None, typer.Option(help="The one benchmark's rows from a local file.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Responses per problem; pass@1 is their mean.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many problems only.")] = None,
    engine: Annotated[str, typer.Option(help="What draws responses: hf, vllm or vllm_server.")] = "hf",
    engine_args: Annotated[
        str, typer.Option(help="Fields of rollout.engine, as a YAML mapping; docs/rollouts.md.")
    ] = "{}",
    out: Annotated[Path, typer.Option(help="Folder for results.json and samples.jsonl.")] = Path("runs/eval"),
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0 takes the likeliest token, as by default for one sample; else 1."),
    ] = None,
    top_p: Annotated[float, typer.Option(min=1e-9, max=1.0, help="Sample from so much probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many tokens; 0 for all.")] = 0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from tokens so likely.")] = 0.0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest response; else the benchmark's.")
    ] = None,
    min_pixels: Annotated[int | None, typer.Option(min=1, help="Smallest area of a resized picture.")] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Largest area of a resized picture.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch: Annotated[int, typer.Option(min=1, help="Problems that are drawn at the same time.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    on_error: Annotated[str, typer.Option(help="A row that can't be used: stop, or skip it.")] = "stop",
    responses: Annotated[
        str | None,
        typer.Option(help="Grade this file of recorded responses (id, response) instead of a model."),
    ] = None,
) -> None:
    """Evaluate a model on benchmarks."""
    from vlm_sapo.api import evaluate

    evaluate(
        benchmark,
        model=model,
        data=data,
        samples=samples,
        limit=limit,
        engine=engine,
        engine_args=engine_args,
        out=out,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        max_tokens=max_tokens,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        dtype=dtype,
        batch=batch,
        seed=seed,
        on_error=on_error,
        responses=responses,
    )


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(help="Folder of an evaluation.")],
    run_b: Annotated[Path, typer.Argument(help="Folder of another one on the same problems.")],
    out: Annotated[Path | None, typer.Option(help="The page; RUN_B/compare.html by default.")] = None,
) -> None:
    """Compare two evaluations: a paired test, and the pictures whose verdict changed."""
    from vlm_sapo.tools.compare import compare_command

    compare_command(run_a, run_b, out or run_b / "compare.html")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are laid over each other.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; report.html in the first run's folder by default.")
    ] = None,
    groups: Annotated[int, typer.Option(min=2, help="Groups of responses to hold, by run.")] = 100,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page on loopback while the runs go on, instead.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --watch; 0 for a free one.")] = 8600,
) -> None:
    """Write one HTML page of runs: results, curves, what the updates did, and the responses with pictures."""
    from vlm_sapo.tools.report.command import report_command

    report_command(runs, out or runs[0] / "report.html", groups=groups, watch=watch, port=port)


@app.command("filter")
def filter_rows(
    config: ConfigArgument,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=2, help="Responses per row.")] = 16,
    keep: Annotated[
        str, typer.Option(help="Pass rates worth training on, both ends included.")
    ] = "0.05..0.9",
    out: Annotated[Path, typer.Option(help="Folder for samples and kept rows.")] = Path("runs/filter"),
) -> None:
    """Sample the current model on the training rows, and write those that it solves sometimes."""
    from vlm_sapo.config.load import load
    from vlm_sapo.config.schema import TrainConfig

    parsed = load(TrainConfig, config, [*ANY_LENGTH, *(overrides or [])])
    try:
        low, high = map(float, keep.split(".."))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise ValueError(f"--keep ({keep}) must be two rates from 0 to 1 such as 0.05..0.9")
    quieten()
    from vlm_sapo.tools.filter import filter_command

    filter_command(parsed, samples=samples, keep=(low, high), out=out)


@app.command()
def check(
    config: ConfigArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to read.")] = 4,
    samples: Annotated[int, typer.Option(min=1, help="Responses per row.")] = 4,
) -> None:
    """Let engine and trainer read the same rows: where do they differ? Exit code 1 where they do."""
    from vlm_sapo.config.load import load
    from vlm_sapo.config.schema import TrainConfig

    parsed = load(TrainConfig, config, [*ANY_LENGTH, *(overrides or [])])
    quieten()
    from vlm_sapo.tools.check import check_command

    if not check_command(parsed, rows=rows, samples=samples):
        raise typer.Exit(1)


@app.command()
def serve(
    config: ConfigArgument,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    extra: Annotated[str, typer.Option(help="Further options of vllm serve, as one text.")] = "",
    only_print: Annotated[bool, typer.Option("--print", help="Print the command and don't run it.")] = False,
) -> None:
    """Print and run the `vllm serve` that a config with rollout.engine=vllm_server trains with."""
    from vlm_sapo.config.load import load
    from vlm_sapo.config.schema import TrainConfig

    parsed = load(TrainConfig, config, [*ANY_LENGTH, *(overrides or [])])
    quieten()
    from vlm_sapo.tools.serve import serve_command

    serve_command(parsed, host=host, port=port, extra=extra, only_print=only_print)


@app.command()
def plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    gpus: Annotated[
        str, typer.Option(help="GPUs x memory, or nodes x GPUs x memory: 1x24GB, 8x80GB, 4x8x141GB.")
    ] = "1x80GB",
    recommend: Annotated[
        Path | None, typer.Option(help="Where to write the config, or the nearest one that fits.")
    ] = None,
) -> None:
    """Say what a config takes on given GPUs; where it does not fit, the nearest setting that does, and exit
    code 1."""
    from vlm_sapo.config.load import load
    from vlm_sapo.config.schema import TrainConfig

    load(TrainConfig, config, overrides or [])
    quieten()
    from vlm_sapo.tools.plan.command import parse_gpus, plan_command

    if not plan_command(config, overrides or [], parse_gpus(gpus), recommend):
        raise typer.Exit(1)


@app.command("new-model")
def new_model(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it.")],
    family: Annotated[
        str, typer.Option(help="A family of docs/families.md: qwen2_5_vl, qwen3_vl_moe, ...")
    ] = "qwen3_vl",
    corpus: Annotated[
        str, typer.Option(help="`file.py:function` that yields the texts the tokenizer is trained on.")
    ] = "data/shapes.py:corpus",
    size: Annotated[
        str, typer.Option(help="tiny (a million parameters), twin (as a mixture), bench (1.6) or 2b.")
    ] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write a real Qwen-VL model with random weights, processor and tokenizer, for tests and measurements."""
    quieten()
    from vlm_sapo.plugins import resolve
    from vlm_sapo.tools.new_model import SHAPES
    from vlm_sapo.tools.new_model import new_model as build

    if size not in SHAPES:
        raise ValueError(f"--size ({size}) must be one of {', '.join(SHAPES)}")
    texts = resolve(corpus, field="--corpus")()
    parameters = build(folder, family=family, corpus=texts, shape=SHAPES[size], seed=seed)
    typer.echo(f"{folder}: {family}, {parameters:,} parameters")


def _report(summary: dict) -> None:
    before, after = summary.get("eval_before"), summary.get("eval_after")
    if before and after and main_process():
        typer.echo(f"held-out pass@1: {before['pass@1']:.3f} before, {after['pass@1']:.3f} after")


ALARM = 3
"""Exit code of a run that an alarm stopped."""


def run(app: Callable[[], None]) -> None:
    """Runs the command line. What this package says of a user's mistake is one sentence and exit code 1."""
    signal.signal(signal.SIGTERM, _ended)  # schedulers end runs so; processes end with them
    os.umask(os.umask(0o077) | 0o002)  # what a run writes is no one else's to change
    try:
        app()
    except ValueError as error:
        if not _raised_here(error):
            raise
        typer.echo(escape_control(f"error: {error}"), err=True)
        sys.exit(1)
    except Interrupted as error:
        if main_process():
            words = [word for word in sys.argv[1:] if not word.startswith("run.overwrite")]
            launcher = "your launcher and " if "RANK" in os.environ else ""
            name = "vlm-sapo" if shutil.which("vlm-sapo") else sys.argv[0]
            typer.echo(escape_control(f"{error}\ngo on with: {launcher}{shlex.join([name, *words])}"))
        if error.alarm:
            sys.exit(ALARM)
    except ElsewhereError:
        sys.exit(1)  # that process says why


def _ended(number: int, _) -> None:
    typer.echo(f"ended by {signal.Signals(number).name}", err=True)
    sys.exit(128 + number)


def main_process() -> bool:
    """Whether this is the process that prints, where a launcher started several."""
    return os.environ.get("RANK", "0") == "0"


def _raised_here(error: BaseException) -> bool:
    """Whether the error was raised by this package's own code, and not inside a library."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def main() -> None:
    """Runs the command line."""
    run(app)


if __name__ == "__main__":
    main()
