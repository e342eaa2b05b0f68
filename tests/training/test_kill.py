"""A run that is killed at any moment and started again ends as the one that nothing happened to."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import CORPUS, SMALL
from tests.training.conftest import metrics, short_run
from vlm_sapo.models.tiny import new_model
from vlm_sapo.training.trainer import train

KILLS = 20
OPTIONS = (
    "train.steps=12",
    "eval.every=2",
    "checkpoint.every=2",
    "checkpoint.keep_best=1",
    "rollout.resample=1",
    "data.on_error=skip",
)
BACKGROUND = ("checkpoint.background=true",)


def run(folder: str, model: str, options: tuple[str, ...]) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    train(short_run(Path(folder), Path(model), *options))


def started(folder: Path, model: Path, options: tuple[str, ...]) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlm_sapo.training.trainer"])
    process = context.Process(target=run, args=(str(folder), str(model), options))
    process.start()
    return process


def wait_for(file: Path, process: multiprocessing.Process) -> float:
    """Until the run has begun, and writes its config anew; when that was."""
    before = file.stat().st_mtime_ns if file.is_file() else 0
    while process.is_alive() and (not file.is_file() or file.stat().st_mtime_ns == before):
        time.sleep(0.01)
    return time.perf_counter()


def phase_of(run: Path) -> str:
    """What a run was doing when it was killed, from what it left."""

    def lines(name: str) -> int:
        return (run / name).read_text().count("\n") if (run / name).is_file() else 0

    if any((run / "checkpoints").glob(".*.partial")):
        return "writing a checkpoint"
    begun = len(list((run / "evaluations").glob("step_*")))
    doing = "evaluating" if begun > lines("evaluations.jsonl") else "drawing or updating"
    return f"{doing} after {lines('metrics.jsonl')} steps"


def lines_of(run: Path, name: str, *left_out: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path_factory, capsys):
    """Until there were twenty kills; in every second run checkpoints are written in the background."""
    dice, folder = random.Random(1), tmp_path_factory.mktemp("kill")
    new_model(folder / "model", family="qwen3_vl", corpus=CORPUS, shape=SMALL)
    (folder / "whole").mkdir()
    process = started(folder / "whole", folder / "model", OPTIONS)
    begun = wait_for(folder / "whole/run/config.yaml", process)
    process.join()
    seconds = time.perf_counter() - begun
    assert process.exitcode == 0
    kills, number = [], 0
    while len(kills) < KILLS:
        number += 1
        place = folder / f"run{number}"
        place.mkdir()
        options = OPTIONS + (BACKGROUND if number % 2 else ())
        left = 4
        while True:
            process = started(place, folder / "model", options)
            if left:
                wait_for(place / "run/config.yaml", process)
            process.join(dice.uniform(0, seconds * left / 4) if left else None)
            if process.exitcode is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            left -= 1
            kills.append(phase_of(place / "run"))
        assert process.exitcode == 0
        same(folder / "whole/run", place / "run")
    with capsys.disabled():
        print(f"\n{len(kills)} kills in {number} runs: {', '.join(kills)}")


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
