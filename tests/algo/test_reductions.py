import pytest
import torch

from vlm_sapo.algo.reductions import constant, sequence_mean, token_mean
from vlm_sapo.training.loss import Reduction

LOSSES = torch.tensor([[1.0, 2.0, float("nan")], [4.0, float("inf"), float("nan")], [3.0, 3.0, 6.0]])
MASK = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])


def reduced(function, losses, mask) -> float:
    """As an update of 4 sequences and 8 tokens does, of which the longest may have 10."""
    return Reduction(function, max_tokens=10)(losses, mask, num_sequences=4, num_tokens=8).item()


def test_sequence_mean_weighs_sequences_alike():
    assert reduced(sequence_mean, LOSSES, MASK) == pytest.approx((1.5 + 4 + 4) / 4)


def test_token_mean_weighs_tokens_alike():
    assert reduced(token_mean, LOSSES, MASK) == pytest.approx(19 / 8)


def test_constant_ignores_the_lengths():
    assert reduced(constant, LOSSES, MASK) == pytest.approx(19 / 40)


@pytest.mark.parametrize("function", [sequence_mean, token_mean, constant])
def test_parts_add_up_to_the_whole(function):
    parts = sum(reduced(function, LOSSES[row : row + 1], MASK[row : row + 1]) for row in range(3))
    assert parts == pytest.approx(reduced(function, LOSSES, MASK))
