"""Golden values and closed forms, in float64."""

import math
from functools import partial

import pytest
import torch

from vlm_sapo.algo.objectives import (
    cispo,
    clip,
    gate,
    gate_weight,
    k3,
    sapo,
    sequence_log_ratio,
    token_log_ratio,
)

GOLDEN = [
    # r, (f, w, w r) at tau 1.0, the same at tau 1.05
    (0.5, (1.510163, 0.940015, 0.470007), (1.415938, 0.934140, 0.467070)),
    (0.8, (1.800664, 0.990066, 0.792053), (1.705494, 0.989056, 0.791244)),
    (1.0, (2.000000, 1.0, 1.0), (1.904762, 1.0, 1.0)),
    (1.2, (2.199336, 0.990066, 1.188080), (2.104030, 0.989056, 1.186867)),
    (1.5, (2.489837, 0.940015, 1.410022), (2.393585, 0.934140, 1.401210)),
    (2.0, (2.924234, 0.786448, 1.572895), (2.822000, 0.768110, 1.536220)),
    (3.0, (3.523188, 0.419974, 1.259923), (3.393917, 0.388779, 1.166336)),
    (5.0, (3.928055, 0.070651, 0.353254), (3.753242, 0.058223, 0.291115)),
]
SAPO = partial(sapo, tau_pos=1.0, tau_neg=1.05)
ALL = {
    "sapo": SAPO,
    "grpo": partial(clip, low=0.2, high=0.2),
    "gspo": partial(clip, low=3e-4, high=4e-4),
    "cispo": partial(cispo, cap=5.0),
}


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slope(objective, ratio: float, advantage: float) -> float:
    log_ratio = double(math.log(ratio)).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(log_ratio, double(advantage)).sum(), log_ratio)
    return gradient.item()


@pytest.mark.parametrize(("ratio", "at_one", "at_105"), GOLDEN)
def test_gate_has_its_golden_values(ratio, at_one, at_105):
    for tau, (value, weight, coefficient) in ((1.0, at_one), (1.05, at_105)):
        assert gate(double(ratio), tau).item() == pytest.approx(value, abs=6e-7)
        assert gate_weight(double(ratio), tau).item() == pytest.approx(weight, abs=6e-7)
        assert (gate_weight(double(ratio), tau) * ratio).item() == pytest.approx(coefficient, abs=6e-7)


@pytest.mark.parametrize("ratio", [row[0] for row in GOLDEN])
@pytest.mark.parametrize("advantage", [1.7, -0.6])
def test_autograd_coefficient_is_w_r_a(ratio, advantage):
    tau = 1.0 if advantage > 0 else 1.05
    expected = -gate_weight(double(ratio), tau).item() * ratio * advantage
    assert slope(SAPO, ratio, advantage) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("advantage", [0.8, -1.3])
def test_loss_is_the_gate_shifted_to_zero_on_policy(advantage):
    tau = 1.0 if advantage > 0 else 1.05
    ratios = double(*(row[0] for row in GOLDEN))
    shifted = -(gate(ratios, tau) - 2 / tau) * advantage
    assert torch.allclose(SAPO(ratios.log(), double(advantage)), shifted, atol=1e-14)
    assert SAPO(double(0.0), double(advantage)).item() == 0.0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("advantage", [2.0, -0.5])
def test_on_policy_every_objective_is_the_policy_gradient(name, advantage):
    assert slope(ALL[name], 1.0, advantage) == pytest.approx(-advantage, rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "passes"),
    [(1.3, 1, False), (1.3, -1, True), (0.7, 1, True), (0.7, -1, False), (1.1, 1, True), (0.9, -1, True)],
)
def test_grpo_clips_one_side_only(ratio, advantage, passes):
    assert slope(ALL["grpo"], ratio, advantage) == pytest.approx(-ratio * advantage if passes else 0.0)


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    assert slope(ALL["cispo"], 9.0, 1.5) == pytest.approx(-5.0 * 1.5)
    assert slope(ALL["cispo"], 2.0, 1.5) == pytest.approx(-2.0 * 1.5)


def test_larger_temperature_fades_faster():
    assert slope(partial(sapo, tau_pos=4.0, tau_neg=1.0), 2.0, 1.0) > slope(SAPO, 2.0, 1.0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("level", [token_log_ratio, sequence_log_ratio])
def test_extreme_and_masked_logprobs_give_finite_gradients(name, level):
    logprobs = torch.tensor([[-1e4, -0.1, float("nan"), -500.0], [-0.1, -2.0, 0.0, 0.0]], requires_grad=True)
    old = torch.tensor([[-0.1, -1e4, float("-inf"), -0.2], [-0.1, -2.0, float("-inf"), float("nan")]])
    mask = torch.tensor([[True, True, False, True], [True, True, False, False]])
    loss = ALL[name](level(logprobs, old, mask), torch.tensor([[1.0], [-1.0]]))
    torch.where(mask, loss, 0.0).sum().backward()
    assert torch.isfinite(logprobs.grad).all()
    assert (logprobs.grad[~mask] == 0).all()


def test_sequence_ratio_is_the_geometric_mean_and_spreads_its_gradient():
    logprobs = double(-1.0, -2.0, -3.0)[None].requires_grad_()
    old = double(-1.3, -2.0, -2.4)[None]
    mask = torch.tensor([[True, True, True]])
    log_ratio = sequence_log_ratio(logprobs, old, mask)
    assert torch.allclose(log_ratio, torch.full_like(log_ratio, -0.1))
    log_ratio.sum().backward()
    assert torch.equal(logprobs.grad, torch.ones_like(logprobs))


def test_k3_is_zero_on_policy_and_positive_elsewhere():
    assert k3(double(-1.0), double(-1.0)).item() == 0.0
    assert k3(double(-1.0), double(-2.0)).item() == pytest.approx(math.exp(-1) + 1 - 1)
    assert torch.isfinite(k3(double(-1e5), double(0.0))).all()
