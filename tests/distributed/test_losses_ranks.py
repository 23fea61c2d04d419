"""The loss and its gradients are the same at any number of ranks, on real gloo processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from loss_oracle import OBJECTIVES, oracle, random_problem
from ranks import run_ranks

from unidec_ds import comm
from unidec_ds.losses import head_loss

SEEDS = range(4)
ONE_LABEL, ONE_BLOCK = 1, 1 << 30


def problem_of(seed: int):
    return random_problem(seed, scale=(0.3, 5.0)[seed % 2])


def owner_of(seed: int, world_size: int) -> np.ndarray:
    """Pool labels by turns, or, at every other seed, none for the last rank."""
    return np.arange(9) % (world_size if seed % 2 or world_size == 1 else world_size - 1)


def shares_of_this_rank():
    """(share of the loss, gradient of queries, gradient of pool labels) of every case."""
    results = []
    for seed in SEEDS:
        problem = problem_of(seed)
        owned = owner_of(seed, comm.world_size()) == comm.rank()
        columns = np.flatnonzero(problem.eligible & owned)
        for kind, l2q, reduction in OBJECTIVES:
            queries = problem.queries.clone().requires_grad_()
            labels = problem.labels.clone().requires_grad_()
            loss = head_loss(
                kind,
                queries,
                labels[columns],
                problem.targets(columns),
                temperature=2.0,
                l2q=l2q,
                bce_reduction=reduction,
                block_bytes=(ONE_LABEL, ONE_BLOCK)[seed // 2],
                combine_logsumexp=comm.combine_logsumexp,
            )
            with torch.autograd.set_detect_anomaly(True):
                loss.total.backward()
            results.append((loss.total.detach(), queries.grad, labels.grad))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shares_of_all_ranks_add_up_to_the_double_loop(world_size):
    cases = [(problem_of(seed), *objective) for seed in SEEDS for objective in OBJECTIVES]
    results = run_ranks(world_size, shares_of_this_rank)
    for case, *shares in zip(cases, *results, strict=True):
        total = tuple(torch.stack(parts).sum(0) for parts in zip(*shares, strict=True))
        torch.testing.assert_close(total, oracle(*case, 2.0), rtol=1e-7, atol=1e-9)


def test_the_cases_hold_what_they_should():
    spread = problem_of(1)
    owners = [{p % 3 for i, p in spread.positives if i == query} for query in range(6)]
    assert any(len(ranks) == 3 for ranks in owners)  # one query's positives on every rank
    assert not (owner_of(0, 3) == 2).any()  # a rank that owns no label
    assert any(problem_of(seed).ignored for seed in SEEDS)
