"""The balance loss and the router metrics in closed form."""

import pytest
import torch

from vlm_sapo.algo.balance import router_metrics, sequence_balance


def sums(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and counts [N, M, E] of logits [N, T, M, E], summed over the tokens."""
    probabilities = logits.softmax(-1)
    selected = torch.zeros_like(logits).scatter(-1, logits.topk(k).indices, 1.0)
    return probabilities.sum(1), selected.sum(1)


def test_sequence_balance_is_the_papers_sum():
    """E / (k T) sum_i (tokens that select i) (mean probability of i), token by token, in float64."""
    logits = torch.randn(3, 5, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = sequence_balance(*sums(logits, 2), torch.tensor([5, 5, 5]))
    for response, layers in enumerate(logits.softmax(-1).tolist()):
        expected = 0.0
        for layer in range(2):
            for expert in range(4):
                probabilities = [token[layer][expert] for token in layers]
                likeliest = [sorted(token[layer])[-2:] for token in layers]
                count = sum(value in best for value, best in zip(probabilities, likeliest, strict=True))
                expected += 4 / (2 * 5) * count * sum(probabilities) / 5
        assert float(losses[response]) == pytest.approx(expected / 2, rel=1e-12)


def test_even_use_gives_one_and_a_single_expert_gives_their_number():
    even = torch.full((1, 1, 4), 3.0, dtype=torch.float64)
    assert float(sequence_balance(even, even, torch.tensor([12]))) == pytest.approx(1.0)
    one = torch.tensor([[[12.0, 0, 0, 0]]], dtype=torch.float64)
    assert float(sequence_balance(one, one, torch.tensor([12]))) == pytest.approx(4.0)


def test_a_gradient_step_evens_out_the_probabilities():
    logits = torch.randn(1, 6, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits[..., 0] += 2.0
    logits.requires_grad_()
    sequence_balance(*sums(logits, 1), torch.tensor([6])).sum().backward()
    mean = (logits - logits.grad).softmax(-1).mean((0, 1, 2))
    assert mean[0] < logits.softmax(-1).mean((0, 1, 2))[0]
    assert logits.grad[..., 0].min() > 0 > logits.grad[..., 1:].max()


def test_metrics():
    """Loads 4, 2, 1, 1 and even ones: 2 and 1 times the mean."""
    counts = torch.tensor([[[3.0, 1, 0, 0], [1, 1, 1, 1]], [[1, 1, 1, 1], [1, 1, 1, 1]]])
    metrics = router_metrics(counts, torch.tensor([3.0, 1.0]), torch.tensor([0.5, 1.5]), 8)
    assert metrics == {"expert_load": 1.5, "router_entropy": 0.5, "experts_changed": 0.25}
    assert "experts_changed" not in router_metrics(counts, torch.tensor([3.0, 1.0]), None, 8)
