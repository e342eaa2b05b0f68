import pytest
import torch

from vlm_sapo.algo.reductions import constant, sequence_mean, token_mean

LOSSES = torch.tensor([[1.0, 2.0, float("nan")], [4.0, float("inf"), float("nan")], [3.0, 3.0, 6.0]])
MASK = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
COUNTS = {"num_sequences": 4, "num_tokens": 8, "max_tokens": 10}


def test_sequence_mean_weighs_sequences_alike():
    assert sequence_mean(LOSSES, MASK, **COUNTS).item() == pytest.approx((1.5 + 4 + 4) / 4)


def test_token_mean_weighs_tokens_alike():
    assert token_mean(LOSSES, MASK, **COUNTS).item() == pytest.approx(19 / 8)


def test_constant_ignores_the_lengths():
    assert constant(LOSSES, MASK, **COUNTS).item() == pytest.approx(19 / 40)


@pytest.mark.parametrize("reduce", [sequence_mean, token_mean, constant])
def test_parts_add_up_to_the_whole(reduce):
    parts = sum(reduce(LOSSES[row : row + 1], MASK[row : row + 1], **COUNTS) for row in range(3))
    assert parts.item() == pytest.approx(reduce(LOSSES, MASK, **COUNTS).item())
