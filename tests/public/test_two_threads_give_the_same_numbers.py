"""The same config with the same seed gave other losses each time, from the first update on.

Source: https://github.com/modelscope/ms-swift/issues/2811
"""

import pytest
import torch

from vlm_sapo.training.launch import _use_deterministic_operations


def embedding(rows: int) -> torch.Tensor:
    """The gradient of an embedding whose rows occur many times each."""
    table = torch.zeros(rows, 32, requires_grad=True)
    indices = torch.randint(rows, (30_000,), generator=torch.Generator().manual_seed(3))
    weights = torch.randn(30_000, 32, generator=torch.Generator().manual_seed(4))
    (table[indices] * weights).sum().backward()
    return table.grad


def positions(rows: int) -> torch.Tensor:
    """The gradient of values that are gathered into several places, as a shared prompt's are."""
    values = torch.zeros(rows, requires_grad=True)
    indices = torch.randint(rows, (60_000,), generator=torch.Generator().manual_seed(5))
    weights = torch.randn(60_000, generator=torch.Generator().manual_seed(6))
    (values.gather(0, indices) * weights).sum().backward()
    return values.grad


@pytest.fixture
def two_threads():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])


@pytest.mark.parametrize("gradient", [embedding, positions])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_sums_of_repeated_rows(two_threads, gradient, rows):
    _use_deterministic_operations(None)
    first, *others = (gradient(rows) for _ in range(8))
    assert all(torch.equal(first, other) for other in others)


def test_who_says_false_gets_the_other_operations(two_threads):
    _use_deterministic_operations(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.allclose(embedding(5), embedding(5), atol=1e-3)
