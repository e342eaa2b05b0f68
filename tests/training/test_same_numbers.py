"""The same run gives the same numbers, bit for bit, also with several CPU threads."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.distributed.launcher import ENVIRONMENT
from tests.training.conftest import metrics
from vlm_sapo.training.launch import _use_deterministic_operations

CONFIG = {
    "model": {"path": "data/shapes/cold_start"},
    "data": {"source": "data/shapes.py:rows", "args": {"size": 64}},
    "rollout": {"group": 8, "max_tokens": 24},
    "reward": {"parts": [{"name": "auto"}], "workers": 1},
    "train": {"steps": 2, "lr": 1e-4, "prompts_per_step": 16, "minibatches": 2},
    "checkpoint": {"every": 0},
    "log": {"rollouts": 16},
}


def run(folder, *overrides: str, threads: int = 2) -> tuple[list[dict], list[str], dict]:
    """Metrics, responses and weights of a run in a process of its own."""
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG | {"run": {"dir": str(folder / "run")}}))
    command = [sys.executable, "-m", "vlm_sapo", "train", str(folder / "run.yaml"), *overrides]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rollouts = (folder / "run/rollouts.jsonl").read_text().splitlines()
    responses = [json.loads(line)["response"] for line in rollouts]
    return metrics(folder / "run"), responses, load_file(folder / "run/final/model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("train.precision=bf16",), ("model.path=data/shapes/hard_moe",)])
def test_two_threads_give_the_same_numbers_each_time(tmp_path, overrides):
    first, *others = (run(tmp_path / str(number), *overrides) for number in range(2))
    for other in others:
        assert other[0] == first[0] and other[1] == first[1]
        assert all(torch.equal(other[2][name], first[2][name]) for name in first[2])


def sums_of_repeated_rows() -> torch.Tensor:
    """The gradient of an indexing that takes the same rows many times, as embeddings and images do."""
    table = torch.zeros(4, 64, requires_grad=True)
    indices = torch.randint(4, (20_000,), generator=torch.Generator().manual_seed(0))
    weights = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(1))
    (table[indices] * weights).sum().backward()
    return table.grad


def test_gradients_of_repeated_rows_are_the_same_each_time():
    """Several threads add to one number; without the setting the order, and the last digit, is chance."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _use_deterministic_operations(None)
        first, *others = (sums_of_repeated_rows() for _ in range(20))
        assert all(torch.equal(first, other) for other in others)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("choice", "used"), [(None, True), (True, True), (False, False)])
def test_the_field_decides(choice, used):
    _use_deterministic_operations(choice)
    assert torch.are_deterministic_algorithms_enabled() is used


def test_on_a_gpu_only_who_asks_gets_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for before in (True, False):
        torch.use_deterministic_algorithms(before)
        _use_deterministic_operations(None)
        assert torch.are_deterministic_algorithms_enabled() is before
    _use_deterministic_operations(True)
    assert torch.are_deterministic_algorithms_enabled()
