"""The command line. Arguments are checked before anything heavy is imported."""

from __future__ import annotations

import inspect
import os
import platform
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_sapo.api import (
    evaluate_with,
    load_config,
    load_sft_config,
    sft,
    silence_libraries,
    train,
    use_expandable_segments,
)
from vlm_sapo.config.evaluation import EvalOptions, ScoreOptions
from vlm_sapo.config.fields import Section, as_parameter, scalar
from vlm_sapo.config.load import check as check_section
from vlm_sapo.config.load import load
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.distributed import ElsewhereError, Interrupted
from vlm_sapo.reporting.console import escape_control

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the plain help is there in half the time
)
ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped config.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Config fields to set, such as train.lr=1e-6."),
]
OnCpu = Annotated[
    bool,
    typer.Option("--cpu", help="Run on the CPU, whatever the machine has and the model needs."),
]
Command = Callable[..., None]
SMALLEST = 1e-9
"""Lower end of an option that must be greater than 0."""


def load_without_steps(config: str, overrides: list[str] | None) -> TrainConfig:
    """A config for a command that doesn't train, so that train.steps may be missing."""
    return load(TrainConfig, config, ["train.steps=1", *(overrides or [])])


def hide_gpus(cpu: bool) -> None:
    """Carries out `--cpu`: hides the GPUs from this process before torch looks for them."""
    if cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def with_options(section: type[Section]) -> Callable[[Command], Command]:
    """Gives a command an option for each field of a section: name, type, default, bounds and help. The
    command gets them as its argument `options`, checked."""
    options = []
    for name, field in section.model_fields.items():
        parameter, (_, bounds) = as_parameter(name, field), scalar(field.annotation, field.metadata)
        option = typer.Option(
            help=field.description,
            min=bounds.get("ge", SMALLEST if "gt" in bounds else None),
            max=bounds.get("le"),
        )
        options.append(parameter.replace(annotation=Annotated[parameter.annotation, option]))

    def decorate(command: Command) -> Command:
        parameters = inspect.signature(command, eval_str=True).parameters
        own = [parameter for name, parameter in parameters.items() if name != "options"]

        @wraps(command)
        def checked(**values: Any) -> None:
            arguments = {parameter.name: values.pop(parameter.name) for parameter in own}
            command(**arguments, options=check_section(section, values))

        checked.__signature__ = inspect.Signature([*own, *options])
        return checked

    return decorate


def _print_versions(requested: bool) -> None:
    """Prints what a report of a fault needs, from the packages' metadata: nothing is imported."""
    if not requested:
        return
    lines = []
    for name in ("vlm-sapo", "torch", "transformers", "vllm"):
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} not installed")
    lines.insert(1, f"python {platform.python_version()}")
    typer.echo("\n".join(lines))
    raise typer.Exit()


@app.callback()
def main_options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print the versions of vlm-sapo, Python, torch, transformers and vLLM.",
        ),
    ] = False,
) -> None:
    """Reinforcement learning for vision-language models with Soft Adaptive Policy Optimization."""


@app.command("train")
def train_(config: ConfigArgument, overrides: Overrides = None, cpu: OnCpu = False) -> None:
    """Train a model with reinforcement learning."""
    hide_gpus(cpu)
    _report(train(load_config(config, *(overrides or []))))


@app.command("sft")
def sft_(config: ConfigArgument, overrides: Overrides = None, cpu: OnCpu = False) -> None:
    """Supervised fine-tuning on demonstrations (cold start)."""
    hide_gpus(cpu)
    _report(sft(load_sft_config(config, *(overrides or []))))


@app.command()
def doctor(
    config: ConfigArgument,
    overrides: Overrides = None,
    against: Annotated[
        str,
        typer.Option(help="More benchmarks to search for training images: NAME[=FILE], separated by commas."),
    ] = "",
    out: Annotated[Path, typer.Option(help="File for the findings, as JSON.")] = Path("runs/doctor.json"),
) -> None:
    """Check config, data and rewards before training.

    Exit code 1 if something would break the run.
    """
    parsed = load_without_steps(config, overrides)
    silence_libraries()
    from vlm_sapo.tools.doctor import doctor_command

    if not doctor_command(parsed, [name for name in against.split(",") if name], out):
        raise typer.Exit(1)


@app.command()
@with_options(ScoreOptions)
def score(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Rows with responses and gold answers.")],
    options: ScoreOptions,
) -> None:
    """Grade a file of responses.

    If the rows have verdicts, the two are compared.
    """
    from vlm_sapo.tools.score import score_command

    score_command(file, options)


@app.command("eval")
@with_options(EvalOptions)
def evaluate_(options: EvalOptions, cpu: OnCpu = False) -> None:
    """Evaluate a model, or recorded responses, on benchmarks."""
    hide_gpus(cpu)
    evaluate_with(options)


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(help="Folder of an evaluation.")],
    run_b: Annotated[Path, typer.Argument(help="Folder of another evaluation on the same problems.")],
    out: Annotated[Path | None, typer.Option(help="HTML file; RUN_B/compare.html by default.")] = None,
) -> None:
    """Compare two evaluations with a paired test.

    Also writes an HTML page of the problems whose verdict changed.
    """
    from vlm_sapo.tools.compare import compare_command

    compare_command(run_a, run_b, out or run_b / "compare.html")


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of runs, or of evaluations (of `vlm-sapo eval`, or RUN/evaluations/STEP)."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="HTML file; report.html in the first folder by default.")
    ] = None,
    groups: Annotated[
        int | None,
        typer.Option(
            min=2, help="Problems with their responses to include; 100 of a run, 1000 of an evaluation."
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve a live page at http://localhost:PORT instead.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --watch; 0 for any free port.")] = 8600,
) -> None:
    """Write an HTML report of one or more runs, or of evaluations.

    It says what changed and how certain that is, and shows results, curves, clipping and policy ratios, and
    responses with their images, which can be searched and sorted.
    """
    from vlm_sapo.tools.report.command import report_command

    report_command(runs, out or runs[0] / "report.html", groups=groups, watch=watch, port=port)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    repo: Annotated[
        str | None,
        typer.Option(help="owner/name on the Hugging Face hub; hub.push of the config by default."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, if it is created.")
    ] = False,
) -> None:
    """Upload a run's model to the Hugging Face hub.

    Uploads weights, processor and model card. The token is that of HF_TOKEN or `hf auth login`.
    """
    from vlm_sapo.tools.push import push_command

    push_command(run, repo, private=private or None)


@app.command("filter")
def filter_rows(
    config: ConfigArgument,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=2, help="Responses per row.")] = 16,
    keep: Annotated[
        str, typer.Option(help="Keep rows whose pass rate is in this range, ends included.")
    ] = "0.05..0.9",
    out: Annotated[Path, typer.Option(help="Folder for responses and selected rows.")] = Path("runs/filter"),
    cpu: OnCpu = False,
) -> None:
    """Keep training rows that the model solves sometimes.

    Samples the model on every row of the config's data and selects rows by their pass rate.
    """
    parsed = load_without_steps(config, overrides)
    try:
        low, high = map(float, keep.split(".."))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise ValueError(f"--keep ({keep}) must be two rates from 0 to 1 such as 0.05..0.9")
    hide_gpus(cpu)
    use_expandable_segments(parsed.rollout.engine)
    silence_libraries()
    from vlm_sapo.tools.filter import filter_command

    filter_command(parsed, samples=samples, keep=(low, high), out=out)


@app.command()
def check(
    config: ConfigArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to use.")] = 4,
    samples: Annotated[int, typer.Option(min=1, help="Responses per row.")] = 4,
    cpu: OnCpu = False,
) -> None:
    """Compare generation engine and trainer on the same prompts.

    Compares token ids, images, log-probs, banned tokens and weight sync. Exit code 1 if they differ.
    """
    parsed = load_without_steps(config, overrides)
    hide_gpus(cpu)
    use_expandable_segments(parsed.rollout.engine)
    silence_libraries()
    from vlm_sapo.tools.check import check_command

    if not check_command(parsed, rows=rows, samples=samples):
        raise typer.Exit(1)


@app.command()
def serve(
    config: ConfigArgument,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    extra: Annotated[str, typer.Option(help="Further options of `vllm serve`, in one string.")] = "",
    only_print: Annotated[bool, typer.Option("--print", help="Only print the command.")] = False,
) -> None:
    """Start a vLLM server for rollout.engine=vllm_server."""
    parsed = load_without_steps(config, overrides)
    silence_libraries()
    from vlm_sapo.tools.serve import serve_command

    serve_command(parsed, host=host, port=port, extra=extra, only_print=only_print)


@app.command()
def plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    gpus: Annotated[
        str,
        typer.Option(help="GPUs that train, with their memory: 1x24GB, 8x80GB, or nodes first: 4x8x141GB."),
    ] = "1x80GB",
    card: Annotated[
        str | None, typer.Option(help="H100, RTX 4090, ...: for the duration; the usual one of that memory.")
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the config that fits, with the reason of each change."),
    ] = None,
) -> None:
    """Estimate the memory and the step time of a config on your GPUs.

    If it doesn't fit, suggests the nearest settings that do; exit code 1. Ends with the command to start it.
    """
    load(TrainConfig, config, overrides or [])
    silence_libraries()
    from vlm_sapo.tools.plan.cards import find_card
    from vlm_sapo.tools.plan.command import parse_gpus, plan_command

    named = None if card is None else find_card(card)
    if not plan_command(config, overrides or [], parse_gpus(gpus), write, card=named):
        raise typer.Exit(1)


@app.command("new-model")
def new_model(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the model.")],
    family: Annotated[
        str, typer.Option(help="Model family from docs/families.md: qwen3_vl_moe, internvl, ...")
    ] = "qwen3_vl",
    corpus: Annotated[
        str, typer.Option(help="`file.py:function` that yields texts to train the tokenizer on.")
    ] = "data/shapes.py:corpus",
    size: Annotated[
        str, typer.Option(help="Parameters. tiny: 1M; twin: 1M MoE counterpart of tiny; bench: 1.6M; 2b: 2B.")
    ] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Create a model of a family with random weights, for tests.

    The folder gets weights, processor and tokenizer. RL can't teach it anything: it never earns a reward.
    """
    silence_libraries()
    from vlm_sapo.plugins import resolve
    from vlm_sapo.tools.new_model import SHAPES
    from vlm_sapo.tools.new_model import new_model as build

    if size not in SHAPES:
        raise ValueError(f"--size ({size}) must be one of {', '.join(SHAPES)}")
    texts = resolve(corpus, field="--corpus")()
    parameters = build(folder, family=family, corpus=texts, shape=SHAPES[size], seed=seed)
    typer.echo(f"{folder}: {family}, {parameters:,} random parameters")


def _report(summary: dict) -> None:
    """Prints each evaluation's result before and after, by its name, and whether nothing was learnt."""
    if not main_process():
        return
    for key, before in summary.items():
        when, _, name = key.partition("/")
        after = summary.get(f"eval_after/{name}" if name else "eval_after")
        if when == "eval_before" and after:  # older runs have the first one without a name
            label = name or "held-out"
            typer.echo(f"{label} pass@1: {before['pass@1']:.3f} before, {after['pass@1']:.3f} after")
    for name in summary.get("not_evaluated_before", []):
        after = summary[f"eval_after/{name}"]["pass@1"]
        typer.echo(f"{name} pass@1: not evaluated before, {after:.3f} after")
    if conclusion := summary.get("learnt_nothing"):
        typer.echo(f"warning: {conclusion.partition(';')[0]}")


ALARM = 3
"""Exit code of a run that an alarm stopped."""


def run(app: Callable[[], None]) -> None:
    """Runs the command line. A user's mistake is reported in one sentence, with exit code 1."""
    signal.signal(signal.SIGTERM, _ended)  # so that child processes end, too, when a scheduler stops a run
    os.umask(os.umask(0o077) | 0o002)  # other users can't write to a run's files
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
            typer.echo(escape_control(f"{error}\ncontinue with: {launcher}{shlex.join([name, *words])}"))
        if error.alarm:
            sys.exit(ALARM)
    except ElsewhereError:
        sys.exit(1)  # the process that failed says why


def _ended(number: int, _) -> None:
    typer.echo(f"ended by {signal.Signals(number).name}", err=True)
    sys.exit(128 + number)


def main_process() -> bool:
    """Whether this process prints, where a launcher started several."""
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
