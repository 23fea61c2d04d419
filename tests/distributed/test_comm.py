"""The collectives and their gradients on real gloo ranks."""

import pytest
import torch
from ranks import run_ranks

from unidec_ds import comm


def _gather_and_combine(sizes):
    torch.manual_seed(0)
    rows = torch.randn(sum(sizes), 3, dtype=torch.float64)
    scores = torch.randn(3, 4, dtype=torch.float64)  # [world size at most 3, B]
    scores[2] = float("-inf")
    weights = torch.randn(3, sum(sizes), 3, dtype=torch.float64)
    upstream = torch.randn(3, 4, dtype=torch.float64)
    rank, start = comm.rank(), sum(sizes[: comm.rank()])
    mine = rows[start : start + sizes[rank]].clone().requires_grad_()
    gathered = comm.all_gather_rows(mine, sizes)
    local = scores[rank].clone().requires_grad_()
    combined = comm.combine_logsumexp(local)
    ((gathered * weights[rank]).sum() + (combined * upstream[rank]).sum()).backward()
    return gathered.detach(), mine.grad, combined.detach(), local.grad


@pytest.mark.parametrize("sizes", [[5], [3, 2], [2, 2, 1], [3, 0, 1]])
def test_gather_and_logsumexp_equal_one_process_and_so_do_their_gradients(sizes):
    world_size = len(sizes)
    answers = run_ranks(world_size, _gather_and_combine, sizes)
    torch.manual_seed(0)
    rows = torch.randn(sum(sizes), 3, dtype=torch.float64)
    scores = torch.randn(3, 4, dtype=torch.float64)
    scores[2] = float("-inf")
    weights = torch.randn(3, sum(sizes), 3, dtype=torch.float64)
    upstream = torch.randn(3, 4, dtype=torch.float64)
    scores = scores[:world_size].requires_grad_()
    combined = scores.logsumexp(0)
    (combined * upstream[:world_size].sum(0)).sum().backward()
    row_grads = weights[:world_size].sum(0).split(sizes)
    for rank, (gathered, rows_grad, lse, lse_grad) in enumerate(answers):
        torch.testing.assert_close(gathered, rows)
        torch.testing.assert_close(rows_grad, row_grads[rank])
        torch.testing.assert_close(lse, combined.detach())
        torch.testing.assert_close(lse_grad, scores.grad[rank])


def _all_ranks_without_a_term():
    local = torch.full((2,), float("-inf")).requires_grad_()
    combined = comm.combine_logsumexp(local)
    combined.sum().backward() if comm.is_distributed() else None
    flags = comm.any_true([comm.rank() == 1, False, True], torch.device("cpu"))
    return combined.detach(), local.grad, flags


def test_no_term_on_any_rank_gives_minus_infinity_and_a_zero_gradient():
    for lse, grad, flags in run_ranks(2, _all_ranks_without_a_term):
        assert torch.isneginf(lse).all()
        assert (grad == 0).all()
        assert flags == [True, False, True]


def _objects():
    return comm.broadcast_object(comm.rank()), comm.gather_objects(comm.rank() * 10)


def test_objects():
    assert run_ranks(2, _objects) == [(0, [0, 10]), (0, [0, 10])]
    assert run_ranks(1, _objects) == [(0, [0])]


def test_ranks_of_a_machine_under_launchers_that_name_it_differently(monkeypatch):
    """`deepspeed` says LOCAL_SIZE; its ranks each took all cores and all of the host's memory."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    assert comm.local_world_size() == 1
    monkeypatch.setenv("LOCAL_SIZE", "8")
    assert comm.local_world_size() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert comm.local_world_size() == 4
