"""Row normalisation against torch's, whose gradient is autograd's own."""

import pytest
import torch
from torch.nn.functional import normalize

from unidec_ds.unit_rows import unit_rows


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 7), (64, 384)])
def test_values_and_gradients_are_those_of_torch(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if len(x) > 3:
        x[1] = 0
        x[2] = 1e-14
        x[3] *= 1e6
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (unit_rows, lambda x: normalize(x, dim=1)):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        (value * weights).sum().backward()
        results.append((value.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def test_gradient_is_that_of_differences() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit_rows, x)
