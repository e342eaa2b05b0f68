"""Runs everything that is worth knowing on a first GPU, step by step, and writes one table: about 9 minutes.

    python eval/gpu.py [--wheels DIR] [--seconds 540] [--out runs/gpu] [--device cpu] [--only STEP ...]

Uses this interpreter's own torch and transformers, and no network: packages that they lack are installed from
the wheels in DIR into a folder of their own. Steps that need a package that is still absent are listed as
skipped. Each step is a process with a time limit, which ends with all its children. After every step
OUT/gpu.json and OUT/gpu.md are written anew, so that a run that is cut off keeps what it has; OUT/gpu.log has
the steps' output. `--device cpu` runs the same steps at miniature size, as a test of this script.

Exit code 0 if no step failed, 1 if one did, 2 if there is no GPU. This file imports the standard library
alone; the steps are in eval/gpu_steps.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS_FILE = HERE / "gpu_steps.py"
RESULT = "RESULT "
"""Begins a line of a step's output that holds measurements, as JSON."""
CHECK_MARKS = ("check ok: shared-prefix", "DISAGREES")
"""What the line of a run's self-check contains."""
MIN_SECONDS = 15
"""A step isn't started with less time left."""
CPU_PATIENCE = 10
"""Factor of the limits without a GPU, where the machine's speed is anyone's guess."""
GRACE_SECONDS = 3
"""Between the request to end and the end by force."""
NO_GPU = 2
"""Exit code."""
ERROR = re.compile(r"(error: |[\w.]*(Error|Exception|Interrupted)\b)", re.IGNORECASE)
"""Begins the line that says why a step failed."""
CORE = (
    "accelerate",
    "antlr4",
    "httpx2",
    "latex2sympy2_extended",
    "math_verify",
    "matplotlib",
    "peft",
    "pebble",
    "pydantic",
    "qwen_vl_utils",
    "rapidfuzz",
    "rich",
    "safetensors",
    "sympy",
    "torchvision",
    "transformers",
    "typer",
    "yaml",
)
"""Modules that a training run imports, beside torch."""


@dataclass(frozen=True)
class Step:
    """A part of the run: the function of its name in eval/gpu_steps.py."""

    name: str
    title: str
    limit: int
    """Seconds after which it is ended."""
    needs: tuple[str, ...] = ()
    """Modules without which it is skipped."""


STEPS = (
    Step("devices", "card, versions, measured peaks", 60),
    Step("quickstart_float32", "quick start in float32, with its self-check", 75, CORE),
    Step("quickstart_bf16", "quick start in bf16, with its self-check", 75, CORE),
    Step("attention", "attention: kernels, and both against float32", 60, CORE),
    Step("update", "update of Qwen3-VL-2B's shape, with its self-check", 180, CORE),
    Step("trl", "the same by TRL", 180, ("trl", "datasets", "accelerate", "transformers")),
    Step("memory", "measured memory against `vlm-sapo plan`", 120, CORE),
    Step("sampling", "sampling with `hf`: launches per token, tokens per second", 90, CORE),
    Step("offload", "FSDP2 in one process, offloaded, bf16", 75, CORE),
    Step("moe", "MoE: bf16, LoRA", 90, CORE),
    Step("qwen3_5", "Qwen3.5: linear attention", 90, CORE),
    Step("vllm", "vLLM against the trainer", 240, (*CORE, "vllm")),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    name: str
    title: str
    status: str
    """ok, failed, timed out, or skipped."""
    seconds: float = 0.0
    reason: str = ""
    """Why it was skipped or failed."""
    numbers: dict[str, object] = field(default_factory=dict)
    checks: tuple[str, ...] = ()
    """Lines of self-checks."""


class Report:
    """The outcomes so far, in OUT/gpu.json and OUT/gpu.md."""

    def __init__(self, folder: Path, **about: object):
        self.folder, self.about = folder, about
        self.outcomes: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        """Adds an outcome and writes both files; readers see the old files or the new ones, no halves."""
        self.outcomes.append(outcome)
        if outcome.name == "devices":
            self.about |= {key: outcome.numbers[key] for key in DEVICE_KEYS if key in outcome.numbers}
        document = self.about | {"steps": [asdict(outcome) for outcome in self.outcomes]}
        _replace(self.folder / "gpu.json", json.dumps(document, indent=1))
        _replace(self.folder / "gpu.md", markdown(self.about, self.outcomes))

    @property
    def failed(self) -> list[str]:
        return [outcome.name for outcome in self.outcomes if outcome.status in ("failed", "timed out")]


DEVICE_KEYS = ("card", "driver", "python", "torch", "cuda", "transformers")
"""Measurements of the first step that describe the whole run."""


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(f"{path.suffix}.new")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def markdown(about: dict[str, object], outcomes: Iterable[Outcome]) -> str:
    """The table: a line of what it was run on, and a row for each step."""
    lines = ["; ".join(f"{key}: {value}" for key, value in about.items()), ""]
    lines += ["| step | result | seconds | measured |", "|---|---|---|---|"]
    for outcome in outcomes:
        result = f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status
        shown = {key: value for key, value in outcome.numbers.items() if key not in DEVICE_KEYS}
        measured = [f"{key} {number(value)}" for key, value in shown.items()]
        cells = [outcome.title, result, f"{outcome.seconds:.0f}", "; ".join([*measured, *outcome.checks])]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def number(value: object) -> str:
    """A measurement with four significant digits; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def missing(modules: Iterable[str]) -> list[str]:
    """Those that can't be imported here."""
    return [module for module in modules if find_spec(module) is None]


def install(wheels: Path, site: Path) -> Outcome:
    """Installs the wheels of a folder into `site`, which is put on this process's path."""
    started, step = time.monotonic(), ("wheels", "packages from wheels")
    files = sorted(wheels.glob("*.whl"))
    if not files:
        return Outcome(*step, "failed", reason=f"--wheels ({wheels}) must hold .whl files")
    shutil.rmtree(site, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--target", site, *files]
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    sys.path.insert(0, str(site))
    invalidate_caches()
    reason = last_line(process.stderr) if process.returncode else ""
    seconds = time.monotonic() - started
    return Outcome(*step, "failed" if reason else "ok", seconds, reason, {"wheels": len(files)})


@dataclass(frozen=True)
class Runner:
    """Runs steps as processes of their own."""

    device: str
    report: Report
    work: Path
    """For models and runs."""
    deadline: float
    """On the monotonic clock."""
    site: Path | None = None
    """Folder of the installed wheels."""

    def run(self, step: Step) -> Outcome:
        """Runs a step, unless something that it needs is missing."""
        if absent := missing(step.needs):
            return Outcome(step.name, step.title, "skipped", reason=f"not installed: {', '.join(absent)}")
        left = self.deadline - time.monotonic()
        if left < MIN_SECONDS:
            return Outcome(step.name, step.title, "skipped", reason="no time left (--seconds)")
        command = [sys.executable, "-u", str(STEPS_FILE), step.name, "--device", self.device]
        command += ["--work", str(self.work), "--results", str(self.report.folder / "gpu.json")]
        limit = step.limit * (CPU_PATIENCE if self.device == "cpu" else 1)
        return self.watch(step, command, min(limit, left))

    def watch(self, step: Step, command: Sequence[str], limit: float) -> Outcome:
        """Runs a command for at most `limit` seconds, and reads the measurements that it printed."""
        log = self.report.folder / "gpu.log"
        started = time.monotonic()
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n=== {step.name}\n")
            file.flush()
            start = log.stat().st_size
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(self.site),
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(process)
        with log.open("rb") as file:
            file.seek(start)
            output = file.read().decode("utf-8", "replace")
        numbers, checks = parse(output)
        status = {None: "timed out", 0: "ok"}.get(code, "failed")
        reason = {None: f"after {limit:.0f} s", 0: ""}.get(code, last_line(output))
        seconds = time.monotonic() - started
        return Outcome(step.name, step.title, status, seconds, reason, numbers, tuple(checks))


def end(process: subprocess.Popen) -> None:
    """Ends a process and all children in its session, also those of one that is over."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE_SECONDS if number == signal.SIGTERM else None)
        except subprocess.TimeoutExpired:
            continue


def environment(site: Path | None) -> dict[str, str]:
    """The repository's root and the installed wheels are importable; nothing is fetched."""
    inherited = os.environ.get("PYTHONPATH", "")
    paths = [str(path) for path in (HERE.parent, site, inherited) if path]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return os.environ | offline | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def parse(output: str) -> tuple[dict[str, object], list[str]]:
    """The measurements and the self-check's lines in a step's output."""
    numbers: dict[str, object] = {}
    checks = []
    for line in output.splitlines():
        if line.startswith(RESULT):
            numbers |= json.loads(line.removeprefix(RESULT))
        elif any(mark in line for mark in CHECK_MARKS):
            checks.append(line.strip())
    return numbers, checks


def last_line(output: str) -> str:
    """What a failed process said last: its last error, since libraries may say more afterwards."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith(RESULT)]
    errors = [
        line for line in lines if re.match(r"(error: |[\w.]*(Error|Exception|Interrupted)\b)", line, re.I)
    ]
    return (errors or lines or ["no output"])[-1][:300]


def chosen(names: Sequence[str]) -> Iterator[Step]:
    """The steps of these names, or all. Raises ValueError for an unknown name."""
    unknown = set(names) - {step.name for step in STEPS}
    if unknown:
        known = ", ".join(step.name for step in STEPS)
        raise ValueError(f"--only ({', '.join(sorted(unknown))}) must be among {known}")
    return (step for step in STEPS if not names or step.name in (*names, "devices"))


def run_all(steps: Iterable[Step], runner: Runner, say: Callable[[str], None]) -> int:
    """Runs the steps in order. Returns the exit code."""
    for step in steps:
        outcome = runner.run(step)
        runner.report.add(outcome)
        say(f"{outcome.name}: {outcome.status} {outcome.reason}".rstrip() + f" ({outcome.seconds:.0f} s)")
        no_gpu = outcome.numbers.get("no gpu")
        if no_gpu:
            say(f"no GPU: {no_gpu}; `--device cpu` runs the same steps at miniature size")
            return NO_GPU
    return 1 if runner.report.failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what this interpreter lacks")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--seconds", type=float, help="for all steps together; 540 by default, without a GPU 3600"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the table")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_work"), help="folder of models and runs")
    parser.add_argument("--only", nargs="*", default=[], metavar="STEP", help="only these, after `devices`")
    args = parser.parse_args()
    try:
        steps = list(chosen(args.only))
    except ValueError as error:
        parser.error(str(error))
    deadline = time.monotonic() + (args.seconds or (540 if args.device == "cuda" else 3600))
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.log").write_text("", encoding="utf-8")
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    report = Report(args.out.resolve(), date=date, device=args.device)
    work = args.work.resolve()
    site = work / "site" if args.wheels else None
    if site is not None:
        report.add(install(args.wheels, site))
    code = run_all(steps, Runner(args.device, report, work, deadline, site), print)
    if code != NO_GPU:
        print((args.out / "gpu.md").read_text(encoding="utf-8"))
    return code


if __name__ == "__main__":
    sys.exit(main())
