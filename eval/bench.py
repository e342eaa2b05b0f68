"""Times our trainer's step, the same with the plain layout, and TRL's, in turn, and prints a Markdown table.

    python eval/bench.py [--trl PYTHON] [--device cuda] [--rounds 3]

Each measurement is a process of its own (eval/speed.py, eval/trl_step.py); a round measures every side once.
PYTHON is the interpreter of an environment that has TRL; without it the TRL rows are left out. The model has
random weights: for the CPU 1.6 million parameters, for a GPU the shape of Qwen3-VL-2B. Results are added to
runs/bench/DEVICE.jsonl as they come; a later call with the same options continues from there, and --fresh
starts over. --only measures the workloads with a word in their name.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

from vlm_sapo.plugins import resolve
from vlm_sapo.reporting.console import Console
from vlm_sapo.tools.new_model import SHAPES, new_model

HERE = Path(__file__).resolve().parent
WORKLOADS = {
    "cpu": {
        "4 prompts, 512 x 512, G 8, 64 tokens": "--side 512 --prompts 4 --group 8 --steps 3",
        "Qwen3.5, 4 prompts, 512 x 512, G 8, 64 tokens": "--side 512 --prompts 4 --group 8 --steps 3",
        "Qwen3.5, 2 prompts, 1024 x 1024, G 8, 64 tokens": "--side 1024 --prompts 2 --group 8 --steps 3",
        "2 prompts, 1024 x 1024, G 8, 64 tokens": "--side 1024 --prompts 2 --group 8 --steps 3",
        "2 prompts of two images 1024 x 1024, G 16, 1 to 64 tokens": (
            "--side 1024 --prompts 2 --group 16 --images 2 --unequal --steps 1"
        ),
        "2 prompts, 1024 x 1024, G 8, two turns of 64 tokens with a crop 512 x 512 between": (
            "--side 1024 --prompts 2 --group 8 --turns 2 --steps 3"
        ),
    },
    "cuda": {
        "8 prompts, 1024 x 1024, G 8, 512 tokens, bfloat16": (
            "--side 1024 --prompts 8 --group 8 --tokens 512 --checkpointing --dtype bfloat16 --device cuda"
            " --steps 3"
        ),
    },
}
SIZES = {"cpu": "bench", "cuda": "2b"}
HYBRID = "Qwen3.5"
"""Workloads of this name are of a model with linear attention in three of four layers; others of Qwen3-VL."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl", type=Path, help="the interpreter of an environment that has TRL")
    parser.add_argument("--device", choices=list(WORKLOADS), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", metavar="WORD", default="", help="workloads with this in their name")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    args = parser.parse_args()
    sides = {"ours": [sys.executable, HERE / "speed.py"], "ours, plain": [sys.executable, HERE / "speed.py"]}
    if args.trl:
        sides["TRL"] = [args.trl, HERE / "trl_step.py"]
    workloads = [name for name in WORKLOADS[args.device] if args.only in name]
    if not workloads:
        parser.error(
            f"--only {args.only}: no workload has this in its name: {', '.join(WORKLOADS[args.device])}"
        )
    results = Results(Path("runs/bench") / f"{args.device}.jsonl", fresh=args.fresh)
    jobs = [
        (number, workload, side) for number in range(args.rounds) for workload in workloads for side in sides
    ]
    with Console().progress("bench", len(jobs)) as show:
        for done, (number, workload, side) in enumerate(jobs, 1):
            if not results.has(number, workload, side):
                options = WORKLOADS[args.device][workload].split()
                options += ["--plain"] if side == "ours, plain" else []
                model = make_model(hybrid=workload.startswith(HYBRID), size=SIZES[args.device])
                measured = run([*sides[side], model, *options])
                results.add({"round": number, "workload": workload, "side": side} | measured)
            show(done, f"{workload}: {side}")
    print(table(results.rows, workloads, list(sides)))


class Results:
    """Measurements in a file of JSON lines."""

    def __init__(self, path: Path, *, fresh: bool):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def has(self, number: int, workload: str, side: str) -> bool:
        key = (number, workload, side)
        return any((row["round"], row["workload"], row["side"]) == key for row in self.rows)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def make_model(*, hybrid: bool, size: str) -> Path:
    """The model that is timed, written once."""
    folder = Path("runs/bench") / (f"{size}_hybrid" if hybrid else size)
    if not (folder / "config.json").exists():
        corpus = resolve("data/shapes.py:corpus", field="corpus")()
        shape = replace(SHAPES[size], layers=max(4, SHAPES[size].layers)) if hybrid else SHAPES[size]
        new_model(folder, family="qwen3_5" if hybrid else "qwen3_vl", corpus=corpus, shape=shape)
    return folder


def run(command: list) -> dict:
    """The JSON line that a measurement prints last; raises RuntimeError with its last lines if it fails."""
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if process.returncode:
        last = "\n".join(process.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}: {last}")
    return json.loads(process.stdout.strip().splitlines()[-1])


def table(rows: list[dict], workloads: list[str], sides: list[str]) -> str:
    """Medians over rounds, and how many times ours is faster: the update by about as much as it reads fewer
    tokens, or images."""
    lines = [
        "| workload | side | step | generation | old log-probs | update | memory | tokens in the update "
        "| ours has fewer by | updates faster by | ours is faster by |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
    for workload in workloads:
        for side in sides:
            cells = {key: typical(rows, workload, side, key) for key in KEYS}
            ours = {key: typical(rows, workload, "ours", key) for key in RATIOS}
            ratios = [
                f"{cells[key] / ours[key]:.1f}" if side != "ours" and ours[key] else "" for key in RATIOS
            ]
            memory = cells.pop("peak_gpu_gb") or cells["peak_rss_gb"]
            cells.pop("peak_rss_gb")
            count = cells.pop("update_tokens")
            tokens = f"{count:,.0f}" if count else ""
            times = (f"{value:.2f} s" for value in cells.values())
            columns = [workload, side, *times, f"{memory:.2f} GB", tokens, *ratios]
            lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


KEYS = (
    "seconds_per_rollout_batch",
    "generation",
    "old_logprobs",
    "update",
    "peak_gpu_gb",
    "peak_rss_gb",
    "update_tokens",
)
RATIOS = ("update_tokens", "update", "seconds_per_rollout_batch")


def typical(rows: list[dict], workload: str, side: str, key: str) -> float:
    """The median over rounds; 0 where the key was not measured."""
    values = [row.get(key, 0.0) for row in rows if (row["workload"], row["side"]) == (workload, side)]
    return median(values)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(str(error))
