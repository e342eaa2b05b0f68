"""DPPO and VESPO: golden values by hand, gradients in closed form, in float64."""

import math

import pytest
import torch

from vlm_sapo.algo.diagnostics import effective_update
from vlm_sapo.algo.objectives import TokenTensors, dppo, vespo
from vlm_sapo.config.schema import AlgoConfig
from vlm_sapo.training.loss import build_loss

VESPO = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}


def tensors(new, old, advantages, mask=None, **fields) -> TokenTensors:
    """From probabilities of tokens, [N, T] lists."""
    new, old = (torch.tensor(values, dtype=torch.float64).log() for values in (new, old))
    advantages = torch.tensor(advantages, dtype=torch.float64).expand_as(new)
    mask = torch.ones_like(new, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return TokenTensors(new.requires_grad_(), old, advantages, mask, **fields)


def losses(name, item: TokenTensors, **parameters):
    objective = build_loss(AlgoConfig(objective={"type": name, **parameters}), max_tokens=8).objective
    return objective(item)


@pytest.mark.parametrize(
    ("new", "old", "advantage", "loss"),
    [
        (0.75, 0.5, 1.0, 0.0),  # up by .25 where more is wanted: outside
        (0.65, 0.5, 1.0, -1.3),  # up by .15: r A, r = 1.3
        (0.75, 0.5, -2.0, 3.0),  # up where less is wanted: r A, r = 1.5
        (0.2, 0.5, -1.0, 0.0),  # down by .3 where less is wanted: outside
        (0.2, 0.5, 1.0, -0.4),  # down where more is wanted
        (0.03, 0.001, 1.0, -30.0),  # a rare token may grow thirtyfold: its probability has hardly moved
    ],
)
def test_dppo_masks_by_the_change_of_probability(new, old, advantage, loss):
    item = tensors([[new]], [[old]], advantage)
    assert float(losses("dppo", item).detach()) == pytest.approx(loss, abs=1e-12)
    direct = dppo(item.token_log_ratio, item.logprobs, item.old, item.advantage, low=0.2, high=0.2)
    assert float(direct.detach()) == pytest.approx(loss, abs=1e-12)


def test_dppo_has_a_gradient_within_the_trust_region_alone():
    item = tensors([[0.65, 0.75, 0.4]], [[0.5, 0.5, 0.5]], [[2.0, 2.0, -1.0]])
    losses("dppo", item).sum().backward()
    assert item.logprobs.grad.tolist() == [pytest.approx([-1.3 * 2.0, 0.0, 0.8])]
    objective = build_loss(AlgoConfig(objective="dppo"), max_tokens=8).objective
    assert effective_update(objective, item).tolist() == [pytest.approx([1.0, 0.0, 1.0])]


@pytest.mark.parametrize(
    ("advantage", "phi"),
    [(1.0, 0.36 * math.exp(3 * 0.4)), (-1.0, 0.216 * math.exp(2 * 0.4))],
)
def test_vespo_weighs_by_the_product_of_ratios(advantage, phi):
    """Ratios 1.2 and .5: W = .6, and phi(W) is 1.195242 for positive, .480717 for negative advantages."""
    item = tensors([[0.6, 0.2]], [[0.5, 0.4]], advantage)
    assert phi == pytest.approx(1.195242 if advantage > 0 else 0.480717, abs=1e-6)
    loss = losses("vespo", item)
    expected = [-phi * advantage * math.log(1.2), -phi * advantage * math.log(0.5)]
    assert loss.detach().tolist() == [pytest.approx(expected)]
    loss.sum().backward()
    assert item.logprobs.grad.tolist() == [pytest.approx([-phi * advantage] * 2)]


def test_vespo_peaks_at_k_over_lambda_and_fades_on_both_sides():
    weights = torch.linspace(-4, 3, 2001, dtype=torch.float64)
    phi = -vespo(
        weights[:, None].exp().log().requires_grad_(), torch.ones(2001, 1, dtype=torch.float64), **VESPO
    )
    values = (phi[:, 0] / weights).detach()[weights != 0]
    peak = float(weights[weights != 0][values.argmax()].exp())
    assert peak == pytest.approx(2 / 3, abs=2e-3)
    assert values[0] < 1e-2 and values[-1] < 1e-12


@pytest.mark.parametrize("name", ["dppo", "vespo"])
def test_masked_and_extreme_tokens_leave_finite_gradients(name):
    new = torch.tensor([[-0.1, -90.0, float("nan")]], dtype=torch.float64)
    logprobs = torch.where(torch.isnan(new), torch.zeros_like(new), new).requires_grad_()
    old = torch.tensor([[-95.0, -0.1, float("-inf")]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    item = TokenTensors(logprobs, old, torch.ones_like(old), mask)
    torch.where(mask, losses(name, item), 0.0).sum().backward()
    assert logprobs.grad.isfinite().all() and logprobs.grad[0, 2] == 0


@pytest.mark.parametrize("name", ["dppo", "vespo"])
def test_on_policy_they_are_the_plain_policy_gradient(name):
    item = tensors([[0.3, 0.9]], [[0.3, 0.9]], [[0.5, -2.0]])
    losses(name, item).sum().backward()
    assert item.logprobs.grad.tolist() == [pytest.approx([-0.5, 2.0])]
