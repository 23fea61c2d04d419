"""The row update against torch's own optimizers."""

import os
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unidec_ds.classifier import row_adam
from unidec_ds.classifier.row_adam import KernelName, RowAdam

BETAS, EPS, LR = (0.9, 0.999), 1e-8, 1e-2
KERNELS = ["torch", pytest.param("cpu_adam", marks=pytest.mark.kernel)]
NUM_ROWS, WIDTH, STEPS = 40, 19, 20  # a width that fills no vector register


def packed_steps(
    kernel: KernelName,
    weight_decay: float,
    touched: list[Tensor],
    grads: list[Tensor],
    per_row: bool,
) -> Tensor:
    """Returns a dense [L, D] matrix after `RowAdam` on the touched rows of every step."""
    adam = RowAdam(betas=BETAS, eps=EPS, weight_decay=weight_decay, kernel=kernel)
    rows = initial_rows()
    exp_avg, exp_avg_sq = torch.zeros_like(rows), torch.zeros_like(rows)
    counts = torch.zeros(NUM_ROWS, dtype=torch.int32)
    for step, (index, grad) in enumerate(zip(touched, grads, strict=True), start=1):
        counts[index] += 1
        packed = [array[index].contiguous() for array in (rows, grad, exp_avg, exp_avg_sq)]
        adam.step(*packed, lr=LR, step=counts[index] if per_row else step)
        rows[index], exp_avg[index], exp_avg_sq[index] = packed[0], packed[2], packed[3]
    return rows


def initial_rows() -> Tensor:
    return torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def inputs(all_rows: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the rows touched and a dense gradient for every step."""
    generator = torch.Generator().manual_seed(1)
    touched = [
        torch.arange(NUM_ROWS)
        if all_rows
        else torch.randperm(NUM_ROWS, generator=generator)[:7].sort().values
        for _ in range(STEPS)
    ]
    grads = [torch.randn(NUM_ROWS, WIDTH, generator=generator) for _ in range(STEPS)]
    return touched, grads


@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_sparse_adam_with_the_global_step(kernel: KernelName) -> None:
    touched, grads = inputs(all_rows=False)
    oracle = torch.nn.Parameter(initial_rows())
    optimizer = torch.optim.SparseAdam([oracle], lr=LR, betas=BETAS, eps=EPS)
    for index, grad in zip(touched, grads, strict=True):
        oracle.grad = torch.sparse_coo_tensor(
            index[None], grad[index], oracle.shape, check_invariants=True
        )
        optimizer.step()
    rows = packed_steps(kernel, 0.0, touched, grads, per_row=False)
    torch.testing.assert_close(rows, oracle.detach(), atol=1e-5, rtol=1e-5)  # eps sits elsewhere


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("per_row", [False, True])
def test_equals_dense_adamw_when_every_row_is_touched(kernel: KernelName, per_row: bool) -> None:
    touched, grads = inputs(all_rows=True)
    oracle = torch.nn.Parameter(initial_rows())
    optimizer = torch.optim.AdamW([oracle], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.3)
    for grad in grads:
        oracle.grad = grad
        optimizer.step()
    rows = packed_steps(kernel, 0.3, touched, grads, per_row)
    torch.testing.assert_close(rows, oracle.detach(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_per_row_correction_equals_one_adamw_a_row(kernel: KernelName) -> None:
    touched, grads = inputs(all_rows=False)
    oracle = initial_rows()
    for row in range(NUM_ROWS):
        parameter = torch.nn.Parameter(oracle[row].clone())
        optimizer = torch.optim.AdamW([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.3)
        for index, grad in zip(touched, grads, strict=True):
            if row in index:
                parameter.grad = grad[row]
                optimizer.step()
        oracle[row] = parameter.detach()
    rows = packed_steps(kernel, 0.3, touched, grads, per_row=True)
    torch.testing.assert_close(rows, oracle, atol=1e-5, rtol=1e-5)  # eps sits elsewhere


@pytest.mark.kernel
def test_kernel_at_a_late_step_is_the_same_after_a_jump() -> None:
    """A resumed run enters at step 61; a straight one gets there one step at a time."""
    results = []
    for first in (1, 61):
        adam = RowAdam(betas=BETAS, eps=EPS, weight_decay=0.1, kernel="cpu_adam")
        for step in range(first, 61):
            adam.step(*torch.zeros(4, 1, 8), lr=LR, step=step)
        packed = [initial_rows() for _ in range(3)] + [initial_rows().square()]
        adam.step(*packed, lr=LR, step=61)
        results.append(packed[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("kernel", KERNELS)
def test_refuses_a_view_that_is_not_contiguous(kernel: KernelName) -> None:
    adam = RowAdam(betas=BETAS, eps=EPS, weight_decay=0.0, kernel=kernel)
    packed = [torch.zeros(4, 8) for _ in range(3)]
    with pytest.raises(AssertionError):
        adam.step(torch.zeros(4, 16)[:, ::2], *packed, lr=LR, step=1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_rows_and_a_learning_rate_of_zero(kernel: KernelName) -> None:
    adam = RowAdam(betas=BETAS, eps=EPS, weight_decay=0.1, kernel=kernel)
    adam.step(*torch.zeros(4, 0, 8), lr=LR, step=1)
    rows = initial_rows()
    adam.step(rows, torch.ones_like(rows), *torch.zeros(2, NUM_ROWS, WIDTH), lr=0.0, step=1)
    assert torch.equal(rows, initial_rows())


def test_a_kernel_built_for_another_torch_is_not_taken_for_built(tmp_path: Path) -> None:
    assert not row_adam._is_built(tmp_path)
    (tmp_path / "cpu_adam.so").touch()
    (tmp_path / "build.ninja").write_text("-isystem /elsewhere/torch/include")
    assert not row_adam._is_built(tmp_path)
    (tmp_path / "build.ninja").write_text(f"-isystem {Path(torch.__file__).parent}/include")
    assert row_adam._is_built(tmp_path)


def test_abandoned_build_lock_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 1000, time.time() - 1000))
    row_adam._wait_for_other_build(lock)
    assert not lock.exists()
    assert str(lock) in capsys.readouterr().err


def test_a_lock_that_somebody_holds_is_not_abandoned(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with lock.open("w"):
        assert row_adam._is_open_somewhere(lock)
    assert not row_adam._is_open_somewhere(lock)


def test_without_a_compiler_torch_serves_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_adam, "_loaded", [])
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="no-such-compiler"):
        adam = RowAdam(betas=BETAS, eps=EPS, weight_decay=0.0, kernel="cpu_adam")
    assert adam.kernel == "torch"
    RowAdam(betas=BETAS, eps=EPS, weight_decay=0.0, kernel="cpu_adam")  # warns once only
