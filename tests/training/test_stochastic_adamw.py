"""Weights in bfloat16 learn what float32 weights learn; rounding is unbiased and the same everywhere."""

import numpy as np
import pytest
import torch

from tests.distributed import rounding_worker
from tests.distributed.launcher import launch
from vlm_sapo.training import stochastic_adamw
from vlm_sapo.training.optimizer import OptimizerSettings, build_optimizer
from vlm_sapo.training.stochastic_adamw import (
    StochasticAdamW,
    random_bits,
    random_key,
    round_stochastically,
)

WEIGHTS = 200_000


def bf16_weights() -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.Parameter((torch.randn(WEIGHTS, generator=generator) * 0.02).bfloat16())


def train(parameter, optimizer, updates: int) -> None:
    """Updates that agree in the sign of each weight's gradient, and differ in its size."""
    generator = torch.Generator().manual_seed(1)
    signs = torch.randn(WEIGHTS, generator=generator).sign()
    for _ in range(updates):
        noise = torch.randn(WEIGHTS, generator=generator)
        parameter.grad = (signs * (1 + 0.3 * noise) * 1e-3).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("rate", [1e-6, 1e-5])
def test_small_updates_add_up(rate):
    """torch's AdamW keeps 2 % of them at 1e-6; the intended change is that of float32 weights."""
    changes = {}
    for name in ("float32", "torch", "own"):
        parameter = bf16_weights()
        start = parameter.detach().float().clone()
        if name == "float32":
            parameter = torch.nn.Parameter(start.clone())
        if name == "torch":
            optimizer = torch.optim.AdamW([parameter], lr=rate, weight_decay=0.0, fused=True)
        else:
            optimizer = build_optimizer([parameter], OptimizerSettings(rate, 100))
        train(parameter, optimizer, 100)
        changes[name] = parameter.detach().float() - start
    intended = changes["float32"]
    kept = {
        name: float((change * intended.sign()).mean() / intended.abs().mean())
        for name, change in changes.items()
    }
    assert kept["own"] == pytest.approx(1, abs=0.05)
    assert kept["torch"] < 0.2


def test_float32_weights_are_updated_as_by_torch(monkeypatch):
    monkeypatch.setattr(stochastic_adamw, "CHUNK_ELEMENTS", 70_001)
    settings = {"lr": 1e-3, "betas": (0.8, 0.95), "weight_decay": 0.1}
    one, two = (torch.nn.Parameter(bf16_weights().detach().float()) for _ in range(2))
    train(one, torch.optim.AdamW([one], **settings), 5)
    train(two, StochasticAdamW([two], **settings), 5)
    assert torch.allclose(one, two, rtol=1e-6, atol=1e-9)


def test_rounding_is_unbiased_and_to_a_neighbour():
    generator = torch.Generator().manual_seed(2)
    value = torch.randn(50, generator=generator)
    bits = random_bits(0, 50 * 20_000, random_key(0, 1, 2), torch.device("cpu")).view(20_000, 50)
    rounded = round_stochastically(value.repeat(20_000, 1), bits)
    assert torch.equal(rounded, rounded.bfloat16().float())
    gap = value.abs() * 2**-7
    assert bool(((rounded - value).abs() < gap).all())
    assert bool(((rounded.mean(0) - value).abs() < 0.02 * gap).all())
    exact = value.bfloat16().float()
    assert torch.equal(round_stochastically(exact.clone(), bits[0]), exact)
    odd = torch.tensor([float("inf"), -float("inf"), 0.0])
    assert torch.equal(round_stochastically(odd, bits[0][:3]), odd)


def test_random_bits_are_the_finalizer_of_murmurhash3():
    """By numpy's unsigned integers; also beyond 2**31 elements."""
    key = random_key(3, 4, 5)
    for first in (0, 1_000_003, 3 * 2**30):
        with np.errstate(over="ignore"):
            x = np.uint32(first % 2**32) + np.arange(1003, dtype=np.uint32)
            x = (x * np.uint32(0x9E3779B1)) ^ np.uint32(key % 2**32)
            x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
            x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
            x = (x ^ (x >> np.uint32(16))) & np.uint32(0xFFFF)
        assert random_bits(first, 1003, key, torch.device("cpu")).tolist() == x.tolist()


def test_random_bits_of_steps_and_parameters_are_independent():
    samples = torch.stack(
        [
            random_bits(0, 20_000, random_key(0, step, number), torch.device("cpu"))
            for step in (1, 2, 3)
            for number in (0, 1)
        ]
    )
    correlations = torch.corrcoef(samples.double()) - torch.eye(len(samples))
    assert float(correlations.abs().max()) < 0.03
    assert float(torch.corrcoef(torch.stack([samples[0][1:], samples[0][:-1]]).double())[0, 1]) < 0.03
    counts = torch.bincount(samples.flatten() >> 12, minlength=16)
    assert float((counts / counts.sum() * 16 - 1).abs().max()) < 0.05


def test_processes_round_alike_and_seeds_differ(monkeypatch):
    results = []
    for seed, chunk in ((0, WEIGHTS), (0, 12_345), (1, WEIGHTS)):
        monkeypatch.setattr(stochastic_adamw, "CHUNK_ELEMENTS", chunk)
        parameter = bf16_weights()
        train(parameter, StochasticAdamW([parameter], lr=1e-6, seed=seed), 3)
        results.append(parameter.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.distributed
def test_shards_and_copies_round_as_the_whole_and_resume_exactly(tmp_path):
    """Two copies of two shards, whose optimizer is stored and read in the middle, against one process."""
    done = launch("-m", "tests.distributed.rounding_worker", str(tmp_path), processes=4)
    assert done.returncode == 0, done.stderr[-3000:]
    module = rounding_worker.model()
    rounding_worker.train(module)
    for rank in range(4):
        weights = torch.load(tmp_path / f"weights_{rank}.pt")
        assert all(torch.equal(weights[name], value) for name, value in module.named_parameters())
