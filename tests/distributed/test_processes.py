"""Runs in two processes against the same run in one: parameters, metrics, responses, resumption, failures."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tests.conftest import ROOT
from vlm_sapo import config as cfg
from vlm_sapo import configfile
from vlm_sapo.training.sft import sft
from vlm_sapo.training.trainer import train

pytestmark = pytest.mark.distributed
REWARD = """
def even(response, example):
    return float(len(response) % 2)

def some_groups(response, example):
    return float(len(response) % 2) if example.row % 2 else 0.0
"""
ROWS = """
from data.shapes import rows as drawn

def rows(size):
    for number, row in enumerate(drawn(split="train", size=size)):
        yield row if number % 4 == 0 else row | {"images": [], "problem": row["problem"].replace("<image>", "")}

def one_bad(size):
    for number, row in enumerate(drawn(split="train", size=size)):
        yield row | {"answer": ""} if number == 5 else row
"""
LORA = ("model.lora.rank=4", "algo.kl=0.1")
MIXED = ("data.source={folder}/rows.py:rows", "data.args={{size: 24}}", "data.columns={{}}")
RUNS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "frozen": ("model.freeze=[vision, merger]", "algo.kl=0.1", "rollout.resample=1"),
    "lora": LORA,
    "mixed": (*MIXED, "reward.parts=[{{name: {folder}/reward.py:some_groups}}]", "train.optimizer=adamw"),
    "moe": ("model.path={moe}",),
}
SHARDED = ("train.shard=all",)
HALF = ("train.shard=all", "train.offload=true")


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(*command: str, processes: int = 2, **options) -> subprocess.CompletedProcess:
    """Starts processes as docs/multi-node.md says."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    start += ["--master-port", str(port()), *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        start, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False, **options
    )


class Runs:
    """All runs of this file: in one process here, in two by one launch."""

    def __init__(self, folder: Path, model: Path, moe: Path):
        self.folder, self.moe = folder, moe
        (folder / "reward.py").write_text(REWARD)
        (folder / "rows.py").write_text(ROWS)
        values = {
            "model": {"path": str(model)},
            "data": {"source": "data/shapes.py:rows", "args": {"size": 20}},
            "rollout": {"group": 4, "max_tokens": 8},
            "reward": {"parts": [{"name": f"{folder}/reward.py:even"}], "workers": 1},
            "train": {"steps": 3, "lr": 1e-3, "prompts_per_step": 4, "minibatches": 2},
            "eval": {"data": {"source": "data/shapes.py:rows", "args": {"split": "test", "size": 5}}},
            "checkpoint": {"every": 1, "keep": 3},
        }
        (folder / "train.yaml").write_text(yaml.safe_dump(values))
        for name in ("rollout", "reward"):
            del values[name]
        del values["eval"]
        values["train"] = {"steps": 3, "lr": 1e-3, "rows_per_step": 6, "tokens_per_microbatch": 64}
        values["data"]["columns"] = {"response": "demonstration"}
        (folder / "sft.yaml").write_text(yaml.safe_dump(values))

    def run(self, name: str, *overrides: str, verb: str = "train") -> dict:
        filled = [item.format(folder=self.folder, moe=self.moe) for item in overrides]
        return {
            "verb": verb,
            "config": str(self.folder / f"{verb}.yaml"),
            "overrides": [f"run.dir={self.folder / name}", *filled],
        }

    def here(self, run: dict) -> None:
        """In this process."""
        AcceleratorState._reset_state(reset_partial_state=True)
        kind = cfg.SftConfig if run["verb"] == "sft" else cfg.TrainConfig
        config = configfile.load(kind, run["config"], run["overrides"])
        (sft if run["verb"] == "sft" else train)(config)

    def in_two(self, *runs: dict) -> None:
        """In two processes."""
        listed = self.folder / "runs.json"
        listed.write_text(json.dumps(runs))
        done = launch("-m", "tests.distributed.worker", str(listed))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def final(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "final/model.safetensors")

    def metrics(self, name: str) -> list[dict]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [
            {key: value for key, value in json.loads(line).items() if not re.match("time/|rollout/tok", key)}
            for line in lines
        ]

    def resumed_from(self, name: str, source: str, step: int) -> None:
        """A folder with a run as it was after `step` steps of another."""
        old, new = self.folder / source, self.folder / name
        shutil.copytree(old / f"checkpoints/step_{step:06d}", new / f"checkpoints/step_{step:06d}")
        (new / "config.yaml").write_text((old / "config.yaml").read_text().replace(str(old), str(new)))
        for log in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl"):
            shutil.copy(old / log, new / log)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder):
    made = Runs(tmp_path_factory.mktemp("processes"), model_folder(), model_folder("qwen3_vl_moe"))
    two = []
    for name, overrides in RUNS.items():
        made.here(made.run(name, *overrides))
        two += [made.run(f"{name}-copies", *overrides), made.run(f"{name}-sharded", *overrides, *SHARDED)]
    made.here(made.run("sft", verb="sft"))
    made.resumed_from("plain-one-then-two", "plain", 1)
    made.in_two(
        *two,
        made.run("plain-offloaded", *HALF),
        made.run("sft-copies", verb="sft"),
        made.run("sft-sharded", *SHARDED, verb="sft"),
        made.run("plain-one-then-two", *SHARDED),
        made.run("bad", "data.source={folder}/rows.py:one_bad", "data.args={{size: 8}}"),
        made.run(
            "skipping", "data.source={folder}/rows.py:one_bad", "data.args={{size: 8}}", "data.on_error=skip"
        ),
    )
    return made


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], bound: float = 1e-5) -> bool:
    return first.keys() == second.keys() and all(
        (first[name] - second[name]).abs().max() <= bound for name in first
    )


@pytest.mark.parametrize("held", ["copies", "sharded"])
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_does(runs, name, held):
    """Parameters after three steps of two updates; metrics; and which responses were drawn."""
    one, two = runs.final(name), runs.final(f"{name}-{held}")
    assert same(one, two)
    before = runs.metrics(name)
    assert len(before) == 3
    for first, second in zip(before, runs.metrics(f"{name}-{held}"), strict=True):
        assert first.keys() == second.keys()
        off = {key: (first[key], second[key]) for key in first if abs(first[key] - second[key]) > 1e-4}
        assert not off
    drawn = [(runs.folder / n / "rollouts.jsonl").read_text() for n in (name, f"{name}-{held}")]
    assert drawn[0] == drawn[1]


def test_training_moves_far_more_than_that(runs):
    start = load_file(runs.folder / "plain/checkpoints/step_000001/model.safetensors")
    assert not same(start, runs.final("plain"), bound=1e-3)


def test_evaluations_are_the_same(runs):
    def results(name: str) -> list[tuple]:
        lines = (runs.folder / name / "evaluations.jsonl").read_text().splitlines()
        return [(item["step"], item["pass@1"], item["n"]) for item in map(json.loads, lines)]

    samples = "evaluations/step_000003/samples.jsonl"
    one, two = ((runs.folder / name / samples).read_text() for name in ("plain", "plain-copies"))
    assert one == two and len(one.splitlines()) == 5
    assert results("plain") == results("plain-copies") == results("plain-sharded")


def test_host_memory_holds_the_same(runs):
    assert same(runs.final("plain"), runs.final("plain-offloaded"))


@pytest.mark.parametrize("held", ["copies", "sharded"])
def test_supervised_learning_too(runs, held):
    assert same(runs.final("sft"), runs.final(f"sft-{held}"))


def test_a_run_goes_on_with_another_number_of_processes(runs):
    """One step in one process, the others in two that share a copy; and the other way round."""
    assert same(runs.final("plain"), runs.final("plain-one-then-two"))
    runs.resumed_from("plain-two-then-one", "plain-sharded", 2)
    text = (runs.folder / "plain-two-then-one/config.yaml").read_text()
    (runs.folder / "plain-two-then-one/config.yaml").write_text(text)
    runs.here(runs.run("plain-two-then-one", *SHARDED))
    assert same(runs.final("plain"), runs.final("plain-two-then-one"))


def test_a_row_that_fails_in_one_process_ends_both_with_its_name(runs):
    failures = [(runs.folder / f"bad/failure_{rank}.txt").read_text() for rank in (0, 1)]
    assert all("train-5" in failure and "answer" in failure for failure in failures)
    assert sum("ElsewhereError" in failure for failure in failures) == 1


def test_a_row_that_one_process_leaves_out_keeps_them_together(runs):
    assert json.loads((runs.folder / "skipping/summary.json").read_text())["rows_skipped"] >= 1


def test_adapters_are_written_once_and_whole(runs):
    one, two = (
        load_file(runs.folder / name / "final/adapter/adapter_model.safetensors")
        for name in ("lora", "lora-sharded")
    )
    assert same(one, two)
