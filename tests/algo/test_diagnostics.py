from dataclasses import replace

import pytest
import torch

from vlm_sapo.algo.diagnostics import (
    clip_metrics,
    effective_update,
    gate_metrics,
    ratio_metrics,
    update_metrics,
)
from vlm_sapo.algo.objectives import TokenTensors, cispo, clip, gate_weight, sapo
from vlm_sapo.training.loss import Objective

RATIOS = torch.tensor([[1.02, 1.01, 0.99, 2.5]], dtype=torch.float64)
MASK = torch.ones(1, 4, dtype=torch.bool)
OLD = torch.full((1, 4), -1.0, dtype=torch.float64)
PLUS = torch.ones(1, 4, dtype=torch.float64)
TENSORS = TokenTensors(logprobs=OLD + RATIOS.log(), old=OLD, advantages=PLUS, mask=MASK)
SAPO = Objective(sapo, tau_pos=1.0, tau_neg=1.05)


def test_gate_deviation_of_the_worked_example():
    metrics = gate_metrics(OLD + RATIOS.log(), OLD, PLUS, MASK, tau_pos=1.0, tau_neg=1.05)
    assert metrics["gate_deviation"] == pytest.approx(0.9864 - 0.9540, abs=1e-4)
    assert metrics["gate_deviation_bound"] == pytest.approx(0.0388, abs=1e-4)
    assert metrics["gate_mean"] == pytest.approx(0.8991, abs=1e-4)


def test_effective_update_of_sapo_is_the_gate_weight():
    update = effective_update(SAPO, TENSORS)
    assert torch.allclose(update, gate_weight(RATIOS, 1.0))


def test_effective_update_of_grpo_is_one_minus_the_clip_fraction():
    update = effective_update(Objective(clip, low=0.2, high=0.2), TENSORS)
    metrics = update_metrics(update, PLUS, MASK)
    assert metrics["effective_update"] == metrics["effective_update_pos"] == 0.75
    assert "effective_update_neg" not in metrics
    assert clip_metrics(OLD + RATIOS.log(), OLD, PLUS, MASK)["grpo_would_clip"] == 0.25


def test_effective_update_of_cispo_is_the_capped_share():
    update = effective_update(Objective(cispo, cap=2.0), TENSORS)
    assert torch.allclose(update, (RATIOS.clamp(max=2.0) / RATIOS))


def test_ratio_metrics_leave_masked_tokens_out():
    mask = torch.tensor([[True, True, True, False]])
    metrics = ratio_metrics(OLD + RATIOS.log(), OLD, mask)
    assert metrics["ratio_max"] == pytest.approx(1.02)
    logs = RATIOS[mask].log()
    assert metrics["sequence_variance_max"] == pytest.approx(((logs - logs.mean()) ** 2).mean().item())
    assert metrics["kl_old_k1"] == pytest.approx(-logs.mean().item())


def test_on_policy_nothing_is_attenuated():
    update = effective_update(SAPO, replace(TENSORS, logprobs=OLD))
    metrics = ratio_metrics(OLD, OLD, MASK) | update_metrics(update, PLUS, MASK)
    assert metrics["ratio_max"] == metrics["effective_update"] == 1.0
    assert metrics["update_under_90"] == metrics["kl_old_k3"] == metrics["sequence_variance_max"] == 0.0
