"""Importance weights between engine and policy, worked out by hand in float64."""

import math

import pytest
import torch

from vlm_sapo.algo.correction import (
    correction_metrics,
    importance,
    masked,
    mismatch_metrics,
    truncated,
)
from vlm_sapo.algo.objectives import sapo
from vlm_sapo.config.schema import AlgoConfig
from vlm_sapo.training.batch import Batch, MicroBatch
from vlm_sapo.training.loss import build_loss
from vlm_sapo.training.policy import ForwardPass

LOG2 = math.log(2)
POLICY = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, float("nan")]], dtype=torch.float64)
ENGINE = torch.tensor([[-1.0 - LOG2, -2.0, -3.0 + 2 * LOG2], [-1.0 + LOG2, -1.0, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_token_weights():
    weights = importance(POLICY, ENGINE, MASK, level="token")
    torch.testing.assert_close(
        weights, torch.tensor([[2.0, 1.0, 0.25], [0.5, 1.0, 1.0]], dtype=torch.float64)
    )


def test_sequence_weights_are_products_and_not_means():
    weights = importance(POLICY, ENGINE, MASK, level="sequence")
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 1.0]], dtype=torch.float64))


def test_distant_log_probs_do_not_overflow():
    far = torch.tensor([[0.0, -1e4]])
    weights = importance(far, far.flip(1), torch.ones(1, 2, dtype=torch.bool), level="token")
    assert torch.isfinite(weights).all() and weights[0, 0] > 1e8 > 1e-8 > weights[0, 1]


def test_truncated_and_masked():
    weights = torch.tensor([0.25, 0.5, 1.0, 2.0, 3.0])
    assert truncated(weights, low=0.5, high=2.0).tolist() == [0.25, 0.5, 1.0, 2.0, 2.0]
    assert masked(weights, low=0.5, high=2.0).tolist() == [0.0, 0.5, 1.0, 2.0, 0.0]


def test_metrics():
    metrics = mismatch_metrics(POLICY, ENGINE, MASK)
    gaps = torch.tensor([LOG2, 0.0, -2 * LOG2, -LOG2, 0.0])
    assert metrics["mismatch_mean"] == pytest.approx(4 * LOG2 / 5)
    assert metrics["mismatch_max"] == pytest.approx(2 * LOG2)
    assert metrics["mismatch_kl"] == pytest.approx(float((gaps.exp() - 1 - gaps).mean()))
    weights = importance(POLICY, ENGINE, MASK, level="token")
    corrected = masked(weights, low=0.5, high=1.5)
    metrics = correction_metrics(weights, corrected, MASK)
    assert metrics["correction_mean"] == pytest.approx((0 + 1 + 0 + 0.5 + 1) / 5)
    assert metrics["correction_cut"] == pytest.approx(2 / 5)
    assert metrics["correction_ess"] == pytest.approx(2.5**2 / 2.25 / 5)


@pytest.mark.parametrize("kind", ["truncated", "masked"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_weight_is_outside_the_gate_and_has_no_gradient(kind, level):
    generator = torch.Generator().manual_seed(0)
    shape = (3, 5)
    old, sampled, new = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    old, sampled = new + 0.1 * old, new + 0.3 * sampled
    new.requires_grad_()
    mask = torch.arange(5) < torch.tensor([[5], [3], [4]])
    advantages = torch.tensor([[1.0], [-0.5], [0.7]], dtype=torch.float64)
    micro = MicroBatch([], torch.arange(3), mask, advantages, sampled, old=old)
    low = {"low": 0.5} if kind == "masked" else {}
    correction = {"type": kind, "level": level, "high": 1.5} | low
    loss = build_loss(AlgoConfig.model_validate({"correction": correction}), max_tokens=5)
    passed = ForwardPass(logprobs=new, entropies=torch.zeros_like(old), old=old, usage=None)
    batch = Batch(groups=(), mask=mask, sampled=sampled, num_sequences=3, num_tokens=12)
    loss(passed, micro, batch).backward()
    gap = old - sampled
    weight = (torch.where(mask, gap, 0).sum(-1, keepdim=True) if level == "sequence" else gap).exp()
    weight = weight.clamp(max=1.5) if kind == "truncated" else weight * ((weight >= 0.5) & (weight <= 1.5))
    leaf = (new.detach() - old).requires_grad_()
    sapo(leaf, advantages, tau_pos=1.0, tau_neg=1.05).sum().backward()
    expected = torch.where(mask, weight * leaf.grad / mask.sum(-1, keepdim=True) / 3, 0.0)
    torch.testing.assert_close(new.grad, expected)
    assert new.grad.abs().max() > 0
