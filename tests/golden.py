"""Runs the same commands under two commits on this machine and compares all that they write.

    python tests/golden.py BASE                     BASE against the working tree: everything identical
    python tests/golden.py BASE HEAD --numbers      numbers, verdicts, ids and exit codes; prose and HTML may change
    python tests/golden.py BASE --tolerance 1e-12   numbers may differ by so much; prints the largest difference;
                                                    histograms, whose borders a value may cross, are left out
    python tests/golden.py BASE --only quick ahead  some of the scenarios

Only the command line and the files of a run are used, so modules may move between the commits. One CPU thread,
since with more the order of a sum varies. Durations, speeds, memory, plots and the packing of a checkpoint's
state (whose content shows in the run that goes on from it) are left out. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
START = "data/shapes/cold_start"
SMALL = (
    *("train.prompts_per_step=8", "train.minibatches=4", "rollout.group=4", "log.rollouts=4"),
    *("eval.data.args.size=12", "eval.every=0", "eval.samples=2", "reward.workers=1", "run.dir=run"),
)
TIMES = re.compile(r"(time/.*|memory/.*|.*tokens_per_second|seconds)")
"""Keys that hold durations and speeds."""
PROSE = ("text", "error", "detail", "details", "about")
"""Keys that hold sentences."""
PRESENCE = (".png", ".pt", "manifest.json")
"""Ends of names of files that need only be there."""
CHANGES = [
    (re.compile(r"127\.0\.0\.1:\d+"), "127.0.0.1:PORT"),
    (re.compile(r"\(\d+ tok/s, [\d.]+ GB\)"), "(SPEED)"),
    (re.compile(r"\b[\d.]+ (s|min|h)\b"), "TIME"),
    (re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?"), "DATE"),
]
DECIMAL = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")
SERVER = "import sys, threading; from {} import ModelServer; print(ModelServer(sys.argv[1]).url, flush=True); threading.Event().wait()"
SCORED = [
    ("a", "So \\boxed{\\frac{1}{2}}", "0.5", True),
    ("a", "It is \\boxed{3 cm}.", "3", False),
    ("b", "I don't know.", "2", False),
    ("b", "<answer>\\sqrt{8}</answer>", "2\\sqrt{2}", True),
    ("b", "\\boxed{(1, 2)} or \\boxed{x = 7}", "7", 1.0),
    ("c", "Answer: B", "B", True),
]
EXAMINED = [
    ("How many?", "3"),
    ("How many?", "3"),
    ("Which color?", ""),
    ("Long " * 3000, "4"),
    ("Why?", "yes"),
]


@dataclass
class Side:
    """One commit's code, and the folder its commands run in."""

    tree: Path
    work: Path
    count: int = 0

    @property
    def environment(self) -> dict[str, str]:
        fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
        return os.environ | fixed | {"PYTHONPATH": str(self.tree)}

    def start(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "vlm_sapo.cli", *arguments]
        self.count += 1
        with (
            (self.work / f"{self.count:02}_{arguments[0]}.out").open("w") as out,
            (self.work / f"{self.count:02}_{arguments[0]}.err").open("w") as err,
        ):
            return subprocess.Popen(command, cwd=self.work, env=self.environment, stdout=out, stderr=err)

    def run(self, *arguments: str) -> None:
        """Runs a command; its output and exit code become files."""
        code = self.start(*arguments).wait()
        (self.work / f"{self.count:02}_{arguments[0]}.exit.json").write_text(json.dumps({"exit code": code}))


def quick(side: Side) -> None:
    side.run("train", "quickstart", *SMALL, "train.steps=3", "eval.every=2", "checkpoint.every=2")


def moe(side: Side) -> None:
    side.run("new-model", "moe", "--family", "qwen3_vl_moe")
    algo = ("algo.replay=r2", "algo.balance=0.01", "algo.objective=grpo", "rollout.max_tokens=16")
    (side.work / "reward.py").write_text(
        "def even(response, example):\n    return float(len(response) % 2)\n"
    )
    reward = "reward.parts=[{name: 'reward.py:even'}]"
    side.run("train", "quickstart", *SMALL, "model.path=moe", "train.steps=2", "train.lr=1e-3", *algo, reward)


def lora(side: Side) -> None:
    options = ("model.lora={rank: 4, parts: [language]}", "algo.kl=0.05", "train.lr=1e-3")
    side.run("train", "quickstart", *SMALL, "train.steps=2", *options)


def ahead(side: Side) -> None:
    """One step ahead, from a server on loopback that speaks vLLM's routes."""
    [file] = (side.tree / "tests").rglob("model_server.py")
    module = ".".join(file.relative_to(side.tree).with_suffix("").parts)
    command = [sys.executable, "-c", SERVER.format(module), START]
    server = subprocess.Popen(
        command,
        cwd=side.tree,
        env=side.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        engine = f"rollout.engine={{type: vllm_server, servers: ['{server.stdout.readline().strip()}']}}"
        ratio = ("rollout.ahead=1", "algo.correction=truncated", "data.max_prompt_tokens=256")
        side.run("train", "quickstart", *SMALL, "train.steps=3", engine, *ratio, "rollout.check_every=1")
    finally:
        server.terminate()
        server.wait()


def resumed(side: Side) -> None:
    for steps in (2, 3):
        side.run("train", "quickstart", *SMALL, f"train.steps={steps}")


def stopped(side: Side) -> None:
    """SIGTERM after the first step of a run two steps ahead, so that its checkpoint holds responses. What is
    printed depends on the moment and isn't compared."""
    options = ("train.steps=6", "rollout.ahead=2", "train.old_logprobs=rollout", "checkpoint.keep_last=1")
    first = side.start("train", "quickstart", *SMALL, *options)
    metrics = side.work / "run/metrics.jsonl"
    while first.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    first.wait()
    side.run("train", "quickstart", *SMALL, *options)
    for file in (*side.work.glob("*.out"), *side.work.glob("*.err")):
        file.unlink()


def sft(side: Side) -> None:
    options = ("train.steps=2", "train.rows_per_step=8", "eval.data.args.size=12", "eval.samples=1")
    side.run("sft", "cold_start", f"model.path={START}", *options, "reward.workers=1", "run.dir=run")


def services(side: Side) -> None:
    """`eval`, `compare`, `score`, `doctor` and `plan` on the miniature."""
    for seed in ("0", "1"):
        options = ("--limit", "12", "--samples", "2", "--seed", seed, "--out", f"eval{seed}")
        side.run("eval", "--model", START, "--benchmark", "shapes", *options)
    side.run("compare", "eval0", "eval1")
    names = ("source", "response", "gold", "verdict")
    rows = [json.dumps(dict(zip(names, row, strict=True)) | {"id": f"s{i}"}) for i, row in enumerate(SCORED)]
    (side.work / "scored.jsonl").write_text("\n".join([*rows, "not json", '{"response": "no gold"}\n']))
    for reward in ("auto", "math"):
        side.run("score", "scored.jsonl", "--reward", reward, "--out", f"{reward}.jsonl")
    small = ("data.args.size=60", "eval.data.args.size=12")
    side.run("doctor", "quickstart", *small, "--against", "shapes", "--out", "doctor.json")
    rows = [json.dumps({"id": f"d{i}", "problem": p, "answer": a}) for i, (p, a) in enumerate(EXAMINED)]
    (side.work / "examined.jsonl").write_text("\n".join(rows))
    side.run("doctor", "quickstart", "data={source: examined.jsonl}", "--out", "findings.json")
    side.run("plan", "quickstart", "--gpus", "1x24GB")
    side.run("plan", "quickstart", "--gpus", "1x2GB", "--recommend", "fits.yaml")
    side.run("plan", "shapes_hard", "train.shard=all", "--gpus", "2x80GB")


SCENARIOS: dict[str, Callable[[Side], None]] = {
    function.__name__: function for function in (quick, moe, lora, ahead, resumed, stopped, sft, services)
}


@dataclass
class Comparison:
    """What differs between two folders, the first being the base's."""

    numbers: bool
    tolerance: float | None
    largest: float = 0.0
    differences: list[str] = field(default_factory=list)

    def folders(self, base: Side, head: Side) -> None:
        names = [{str(f.relative_to(s.work)) for f in s.work.rglob("*") if f.is_file()} for s in (base, head)]
        if self.numbers:
            names = [{name for name in half if not name.endswith(".html")} for half in names]
        self.differences += [f"{name} is only there in one of them" for name in sorted(names[0] ^ names[1])]
        for name in sorted(names[0] & names[1], key=lambda name: (name.endswith(".safetensors"), name)):
            one, two = (dict(self.values(side.work / name, side)) for side in (base, head))
            added = self.numbers and name.endswith(".yaml")  # a config may have new fields
            for where in [*one, *(() if added else (where for where in two if where not in one))]:
                missing = "(nothing)"
                self.compare(f"{name} {where}".strip(), one.get(where, missing), two.get(where, missing))

    def values(self, path: Path, side: Side) -> Iterator[tuple[str, Any]]:
        """What counts of a file, by where it stands."""
        if path.name.endswith(PRESENCE) or (path.suffix == ".err" and self.numbers):
            return
        if path.name == "histograms.jsonl" and self.tolerance is not None:
            return
        if path.suffix == ".safetensors":
            yield from load_file(path).items()
            return
        try:
            text = path.read_text().replace(str(side.tree), "TREE").replace(str(side.work), "WORK")
        except UnicodeDecodeError:
            yield "", hashlib.sha256(path.read_bytes()).hexdigest()
            return
        for pattern, word in CHANGES:
            text = pattern.sub(word, text)
        if path.suffix == ".jsonl":
            for number, line in enumerate(text.splitlines(), 1):
                yield from self.flat(json.loads(line) if line.startswith("{") else line, f"line {number}")
        elif path.suffix in (".json", ".yaml"):
            yield from self.flat(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))
        elif path.suffix == ".out" and (self.numbers or self.tolerance is not None):
            yield from enumerate(sorted(map(float, DECIMAL.findall(text))))
        else:
            lines = text.splitlines()
            if path.suffix == ".err":  # beside what libraries print there
                lines = [line for line in lines if line.startswith("error:")]
            yield from ((f"line {number}", line) for number, line in enumerate(lines, 1))

    def flat(self, value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                if not TIMES.fullmatch(str(key)) and not (self.numbers and key in PROSE):
                    yield from self.flat(item, f"{where} {key}".strip())
        elif isinstance(value, list) and value:
            for number, item in enumerate(value):
                yield from self.flat(item, f"{where}[{number}]")
        else:
            yield where, value

    def compare(self, where: str, one: Any, two: Any) -> None:
        numeric = all(isinstance(v, int | float | np.ndarray) and not isinstance(v, bool) for v in (one, two))
        if numeric and np.shape(one) == np.shape(two):
            one, two = (np.asarray(value, np.float64) for value in (one, two))
            same = np.array_equal(one, two, equal_nan=True)
            gap = 0.0 if same else gap_of(one, two)
            self.largest = max(self.largest, gap)
            if not same and (self.tolerance is None or not gap <= self.tolerance):
                shown = f"{one} and {two}, " if np.ndim(one) == 0 else ""
                self.differences.append(f"{where}: {shown}{gap:.1e} apart")
        elif type(one) is not type(two) or numeric or one != two:
            self.differences.append(f"{where}: {str(one)[:150]!r} and {str(two)[:150]!r}")


def gap_of(one: np.ndarray, two: np.ndarray) -> float:
    """The largest difference, relative where values are over 1; infinite where one alone is not finite."""
    with np.errstate(invalid="ignore"):
        gaps = np.abs(one - two) / np.maximum(1.0, np.maximum(np.abs(one), np.abs(two)))
    return float(np.nan_to_num(gaps, nan=np.inf).max(initial=0.0))


def check_out(commit: str | None, tree: Path) -> None:
    """A commit's files, or the working tree's, all of one time, which evaluations write down."""
    tree.mkdir(parents=True)
    git = ("git", "-C", str(ROOT))
    if commit is None:
        listed = subprocess.check_output([*git, "ls-files", "-z", "-co", "--exclude-standard"], text=True)
        for name in filter(lambda name: (ROOT / name).is_file(), listed.strip("\0").split("\0")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    else:
        archive = subprocess.check_output([*git, "archive", commit])
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
    for file in tree.rglob("*.safetensors"):
        os.utime(file, (0, 0))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="a commit")
    parser.add_argument("head", nargs="?", help="another one; the working tree by default")
    parser.add_argument("--numbers", action="store_true", help="ignore prose and HTML")
    parser.add_argument(
        "--tolerance", type=float, help="largest difference of numbers, relative where over 1"
    )
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--show", type=int, default=8, help="differences to print for a scenario")
    parser.add_argument("--keep", type=Path, help="a new folder for everything that was written")
    arguments = parser.parse_args()
    folder = arguments.keep.resolve() if arguments.keep else Path(tempfile.mkdtemp(prefix="golden_"))
    failed = False
    try:
        for name, commit in (("base", arguments.base), ("head", arguments.head)):
            check_out(commit, folder / name / "tree")
        for scenario in arguments.only:
            sides = [Side(folder / name / "tree", folder / name / scenario) for name in ("base", "head")]
            for side in sides:
                side.work.mkdir()
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(SCENARIOS[scenario], sides))
            comparison = Comparison(arguments.numbers, arguments.tolerance)
            comparison.folders(*sides)
            verdict = f"{len(comparison.differences)} differences" if comparison.differences else "identical"
            if comparison.largest and not comparison.differences:
                verdict = f"within {comparison.largest:.1e}"
            codes = [
                json.loads(f.read_text())["exit code"] for f in sorted(sides[0].work.glob("*.exit.json"))
            ]
            print(f"{scenario:10} {verdict}, exit codes {codes}", flush=True)
            for line in comparison.differences[: arguments.show]:
                print(f"    {line}", flush=True)
            failed |= bool(comparison.differences)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
