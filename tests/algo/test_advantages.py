import pytest
import torch

from vlm_sapo.algo.advantages import ADVANTAGES, centred, leave_one_out, zscore


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_zscore_has_mean_zero_and_unit_deviation():
    advantages = zscore(double(1, 0, 0, 1, 1, 0.5))
    assert advantages.mean().item() == pytest.approx(0, abs=1e-15)
    assert advantages.std().item() == pytest.approx(1)
    assert torch.allclose(zscore(double(1, 0)), double(0.5**0.5, -(0.5**0.5)))


def test_leave_one_out_compares_with_the_others():
    rewards = double(1, 0, 0.5, 0.25)
    others = double(*((rewards.sum() - reward).item() / 3 for reward in rewards))
    assert torch.allclose(leave_one_out(rewards), rewards - others)


def test_centred_subtracts_the_mean():
    assert torch.equal(centred(double(1, 0, 0, 0)), double(0.75, -0.25, -0.25, -0.25))


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("rewards", [[0.9] * 7, [0.1 + 0.2, 0.3, 0.3], [0.0] * 4, [1.0]])
def test_rewards_that_agree_give_no_signal(name, rewards):
    assert not ADVANTAGES[name](double(*rewards)).any()
