"""A run that is killed at random moments and restarted gives the results of an uninterrupted run."""

import json
import multiprocessing
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import CORPUS, ROOT, SMALL
from tests.training.conftest import metrics, short_run
from vlm_sapo.tools.new_model import new_model
from vlm_sapo.training.trainer import train

KILLS = {1: 8, 2: 4}
"""By number of CPU threads."""
STEPS = 12
OPTIONS = (
    f"train.steps={STEPS}",
    "eval.every=2",
    "checkpoint.every=2",
    "checkpoint.keep_best=1",
    "rollout.resample=1",
    "data.on_error=skip",
)
BACKGROUND = ("checkpoint.background=true",)


PHASES = {
    "Checkpoints._write": "writing a checkpoint",
    "Evaluator.at": "evaluating",
    "Sampler.sample": "sampling",
    "Policy.update": "updating",
}
"""What a process does while it is in a function; the first that holds."""
ANSWERING = {"Environments.step": "answering"}
"""The same where tools answer turns."""
TOOLS = (
    "data.source=data/zoom.py:rows",
    "eval.data.source=data/zoom.py:rows",
    "rollout.environment={tools: [zoom], format: hermes, max_turns: 3}",
    "rollout.max_tokens=120",
    "rollout.ahead=1",
    "train.lr=1e-4",
    "train.steps=6",
)
"""One step ahead, so that checkpoints hold responses with images."""
ZOOM = ROOT / "data/zoom/cold_start"


def run(folder: str, model: str, options: tuple[str, ...], phase, threads: int) -> None:
    """In a process of its own, which says what it does."""
    torch.set_num_threads(threads)
    threading.Thread(target=watch, args=(phase,), daemon=True).start()
    train(short_run(Path(folder), Path(model), *options))


def watch(phase) -> None:
    """Records repeatedly which phase any thread of this process is in."""
    while True:
        running = set()
        for frame in sys._current_frames().values():
            while frame is not None:
                running.add(frame.f_code.co_qualname)
                frame = frame.f_back
        names = ANSWERING | PHASES
        phase.value = next((name for function, name in names.items() if function in running), "").encode()
        time.sleep(0.003)


def started(folder: Path, model: Path, options: tuple[str, ...], threads: int):
    """A process that trains, and what it is doing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlm_sapo.training.trainer"])
    phase = context.Array("c", 40, lock=False)
    process = context.Process(target=run, args=(str(folder), str(model), options, phase, threads))
    process.start()
    return process, phase


def killed(process, phase, run: Path, target: str, step: int, delay: float) -> str:
    """Kills the process shortly after it is first seen in the target phase, with `step` steps done.
    Returns its phase at that time; empty if it ended before."""
    while process.is_alive() and (phase.value.decode() != target or steps_of(run) < step):
        time.sleep(0.003)
    time.sleep(delay)
    last = phase.value.decode() or "between"
    process.kill()
    process.join()
    return f"{last} after {steps_of(run)}" if process.exitcode == -signal.SIGKILL else ""


def steps_of(run: Path) -> int:
    return (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").is_file() else 0


def lines_of(run: Path, name: str, *left_out: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("threads", KILLS)
def test_killed_at_random_moments(tmp_path_factory, capsys, threads):
    """Four times in each run, at a random step while it does each of four things; in every second run
    checkpoints are written in the background."""
    dice, folder = random.Random(1), tmp_path_factory.mktemp("kill")
    new_model(folder / "model", family="qwen3_vl", corpus=CORPUS, shape=SMALL)
    (folder / "whole").mkdir()
    process, _ = started(folder / "whole", folder / "model", OPTIONS, threads)
    process.join()
    assert process.exitcode == 0
    kills, number = [], 0
    while len(kills) < KILLS[threads]:
        number += 1
        parent = folder / f"run{number}"
        parent.mkdir()
        options = OPTIONS + (BACKGROUND if number % 2 else ())
        targets = dice.sample(sorted(PHASES.values()), 4)
        for phase, step in zip(targets, sorted(dice.randrange(STEPS) for _ in targets), strict=True):
            process, doing = started(parent, folder / "model", options, threads)
            kills += filter(
                None, [killed(process, doing, parent / "run", phase, step, dice.uniform(0, 0.02))]
            )
        process, _ = started(parent, folder / "model", options, threads)
        process.join()
        assert process.exitcode == 0
        same(folder / "whole/run", parent / "run")
    with capsys.disabled():
        print(f"\n{len(kills)} kills in {number} runs: {', '.join(kills)}")
    assert all(any(kill.startswith(phase) for kill in kills) for phase in PHASES.values())


@pytest.mark.slow
def test_killed_between_turns(tmp_path):
    """While tools answer, and while a checkpoint with such responses is written."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    process, _ = started(tmp_path / "whole", ZOOM, TOOLS, 1)
    process.join()
    assert process.exitcode == 0
    assert max(row["environment/images"] for row in metrics(tmp_path / "whole/run")) > 0.1
    kills = []
    for phase, step in (("answering", 1), ("writing a checkpoint", 2), ("answering", 3)):
        process, doing = started(tmp_path / "killed", ZOOM, TOOLS, 1)
        kills.append(killed(process, doing, tmp_path / "killed/run", phase, step, 0.0))
    process, _ = started(tmp_path / "killed", ZOOM, TOOLS, 1)
    process.join()
    assert process.exitcode == 0 and all(kills), kills
    same(tmp_path / "whole/run", tmp_path / "killed/run")


def same(whole: Path, run: Path) -> None:
    """No step is missing or there twice, and every number but times is the same."""
    assert metrics(run) == metrics(whole)
    assert lines_of(run, "rollouts.jsonl") == lines_of(whole, "rollouts.jsonl")
    timed = ("seconds", "tokens_per_second")
    assert lines_of(run, "evaluations.jsonl", *timed) == lines_of(whole, "evaluations.jsonl", *timed)
    for samples in whole.glob("evaluations/*/samples.jsonl"):
        assert (run / samples.relative_to(whole)).read_text() == samples.read_text()
    one, two = (load_file(folder / "final/model.safetensors") for folder in (whole, run))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not list((run / "checkpoints").glob(".*"))
