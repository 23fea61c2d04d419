"""Row-wise AdamW against a loop over elements in float64, in torch and in C."""

import math

import numpy as np
import pytest
import torch

from unidec_ds.classifier.native import native_library
from unidec_ds.classifier.rowwise_adam import RowwiseAdam

BETA2, EPS, DECAY, LR = 0.999, 1e-8, 0.05, 1e-2
BACKENDS = [pytest.param(True, id="c", marks=pytest.mark.kernel), pytest.param(False, id="torch")]


def make_adam(native: bool, weight_decay: float = DECAY) -> RowwiseAdam:
    library = native_library() if native else None
    assert native == (library is not None)
    return RowwiseAdam(beta2=BETA2, eps=EPS, weight_decay=weight_decay, native=library)


def oracle_step(
    row: list[float], grad: list[float], second: float, step: int
) -> tuple[list[float], float]:
    """Returns one row and its second moment after a step."""
    mean_square = sum(g * g for g in grad) / len(grad)
    second = BETA2 * second + (1 - BETA2) * mean_square
    rate = LR / (math.sqrt(second / (1 - BETA2**step)) + EPS)
    return [w * (1 - LR * DECAY) - rate * g for w, g in zip(row, grad, strict=True)], second


@pytest.mark.parametrize("native", BACKENDS)
@pytest.mark.parametrize("width", [1, 7, 16, 100])
@pytest.mark.parametrize("per_row", [False, True])
def test_equals_a_loop_over_elements(native: bool, width: int, per_row: bool) -> None:
    adam, generator = make_adam(native), torch.Generator().manual_seed(0)
    rows, second = torch.randn(5, width, generator=generator), torch.zeros(5, 1)
    wanted_rows, wanted_second = rows.double().tolist(), [0.0] * 5
    for step in range(1, 6):
        grads = torch.randn(5, width, generator=generator) * 10.0**-step
        steps = [step + r for r in range(5)] if per_row else [step] * 5
        adam.step(rows, grads, second, lr=LR, step=torch.tensor(steps) if per_row else step)
        for r in range(5):
            wanted_rows[r], wanted_second[r] = oracle_step(
                wanted_rows[r], grads[r].double().tolist(), wanted_second[r], steps[r]
            )
    np.testing.assert_allclose(rows, wanted_rows, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(second[:, 0], wanted_second, rtol=2e-5)


@pytest.mark.parametrize("native", BACKENDS)
def test_first_step_has_root_mean_square_lr_against_the_gradient(native: bool) -> None:
    rows, grads = torch.zeros(3, 8), torch.randn(3, 8)
    make_adam(native, 0.0).step(rows, grads, torch.zeros(3, 1), lr=LR, step=1)
    torch.testing.assert_close(rows.square().mean(1).sqrt(), torch.full((3,), LR))
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(rows, grads), torch.full((3,), -1.0)
    )


@pytest.mark.parametrize("native", BACKENDS)
def test_a_row_does_not_depend_on_the_others(native: bool) -> None:
    """Ranks and blocks split the rows differently; each comes out the same, bit for bit."""
    rows, grads, second = torch.randn(64, 48), torch.randn(64, 48), torch.rand(64, 1)
    whole = (rows.clone(), second.clone())
    make_adam(native).step(whole[0], grads, whole[1], lr=LR, step=3)
    for start, end in ((0, 1), (1, 20), (20, 64)):
        part = (rows[start:end].clone(), second[start:end].clone())
        make_adam(native).step(part[0], grads[start:end], part[1], lr=LR, step=3)
        assert torch.equal(part[0], whole[0][start:end])
        assert torch.equal(part[1], whole[1][start:end])


@pytest.mark.parametrize("native", BACKENDS)
def test_no_rows_and_a_gradient_of_zero(native: bool) -> None:
    adam = make_adam(native, 0.0)
    adam.step(torch.zeros(0, 8), torch.zeros(0, 8), torch.zeros(0, 1), lr=LR, step=1)
    rows, before = torch.ones(2, 8), torch.ones(2, 8)
    adam.step(rows, torch.zeros(2, 8), torch.zeros(2, 1), lr=LR, step=1)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("native", BACKENDS)
def test_refuses_a_view_that_is_not_contiguous(native: bool) -> None:
    rows, grads = torch.zeros(4, 16)[:, ::2], torch.zeros(4, 8)
    with pytest.raises(AssertionError):
        make_adam(native).step(rows, grads, torch.zeros(4, 1), lr=LR, step=1)
