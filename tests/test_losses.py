from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from loss_oracle import KINDS, OBJECTIVES, Problem, oracle, random_problem
from pydantic import ValidationError
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from unidec_ds.losses import HeadLoss, ObjectiveConfig, Targets, head_loss

ONE_BLOCK = 1 << 30
ONE_LABEL = 1


def run(problem: Problem, kind, l2q=True, reduction="sum", block_bytes=ONE_BLOCK, temperature=2.0):
    """(HeadLoss, gradient of queries, gradient of all pool labels) on one rank."""
    queries = problem.queries.clone().requires_grad_()
    labels = problem.labels.clone().requires_grad_()
    loss = loss_of(
        queries,
        labels[problem.eligible],
        problem.targets(),
        kind,
        l2q=l2q,
        bce_reduction=reduction,
        block_bytes=block_bytes,
        temperature=temperature,
    )
    loss.total.backward()
    return loss, queries.grad, labels.grad


def loss_of(queries, labels, targets, kind, **options) -> HeadLoss:
    defaults = dict(
        temperature=2.0,
        l2q=True,
        bce_reduction="sum",
        block_bytes=ONE_BLOCK,
        combine_logsumexp=lambda x: x,
    )
    return head_loss(kind, queries, labels, targets, **(defaults | options))


@pytest.mark.parametrize("block_bytes", [ONE_LABEL, 6 * 8 * 2, ONE_BLOCK])
@pytest.mark.parametrize("scale", [0.3, 20.0], ids=["small", "large"])
@pytest.mark.parametrize(("kind", "l2q", "reduction"), OBJECTIVES)
def test_equals_the_double_loop(kind, l2q, reduction, scale, block_bytes):
    for seed in range(6):
        problem = random_problem(seed, scale=scale)
        expected, expected_queries, expected_labels = oracle(problem, kind, l2q, reduction, 2.0)
        loss, grad_queries, grad_labels = run(problem, kind, l2q, reduction, block_bytes)
        torch.testing.assert_close(loss.total.detach(), expected, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(grad_queries, expected_queries, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(grad_labels, expected_labels, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_logged_directions_make_the_total(kind):
    problem = random_problem(3)
    both, *_ = run(problem, kind)
    alone, *_ = run(problem, kind, l2q=False)
    assert both.total.item() == pytest.approx((both.q2l + both.l2q).item() / 2)
    assert both.q2l.item() == pytest.approx(alone.total.item()) == pytest.approx(alone.q2l.item())
    assert alone.l2q.item() == 0
    assert not both.q2l.requires_grad
    assert not both.l2q.requires_grad


@pytest.mark.parametrize(("kind", "l2q", "reduction"), OBJECTIVES)
@pytest.mark.parametrize("block_bytes", [ONE_LABEL, ONE_BLOCK])
def test_gradcheck(kind, l2q, reduction, block_bytes):
    problem = random_problem(1, size=(4, 5, 3))
    targets = replace(problem, eligible=np.ones(5, bool)).targets()

    def total(queries, labels):
        options = dict(l2q=l2q, bce_reduction=reduction, block_bytes=block_bytes)
        return loss_of(queries, labels, targets, kind, **options).total

    inputs = (problem.queries.requires_grad_(), problem.labels.requires_grad_())
    assert torch.autograd.gradcheck(total, inputs)


def test_softmax_of_one_positive_is_torch_cross_entropy():
    problem = random_problem(0)
    one_each = {(i, (2 * i) % 9) for i in range(6)}
    problem = replace(problem, positives=one_each, ignored=set(), eligible=np.ones(9, bool))
    logits = 2.0 * problem.queries @ problem.labels.T
    expected = cross_entropy(logits, torch.tensor([(2 * i) % 9 for i in range(6)]))
    for kind in ("softmax", "decoupled", "balanced"):
        assert run(problem, kind, l2q=False)[0].total.item() == pytest.approx(expected.item())


def test_bce_mean_is_torch_binary_cross_entropy():
    problem = random_problem(0)
    problem = replace(problem, ignored=set(), eligible=np.ones(9, bool))
    dense = torch.zeros(6, 9, dtype=torch.float64)
    for pair in {(i, i) for i in range(6)} | problem.positives:
        dense[pair] = 1
    problem = replace(problem, positives={tuple(pair) for pair in dense.nonzero().tolist()})
    logits = 2.0 * problem.queries @ problem.labels.T
    expected = binary_cross_entropy_with_logits(logits, dense)
    assert run(problem, "bce", False, "mean")[0].total.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("block_bytes", [ONE_LABEL, ONE_BLOCK])
@pytest.mark.parametrize("scale", [1.0, 1e3], ids=["small", "large"])
@pytest.mark.parametrize("kind", KINDS)
def test_queries_and_labels_without_a_negative_give_no_nan(kind, scale, block_bytes):
    problem = Problem(
        torch.eye(3, dtype=torch.float64) * scale,
        torch.ones(2, 3, dtype=torch.float64),
        positives={(0, 0), (0, 1), (1, 0), (2, 0)},  # query 0 and label 0 have no negative
        ignored={(1, 1)},  # nor has query 1
        eligible=np.ones(2, bool),
    )
    loss, grad_queries, grad_labels = run(problem, kind, block_bytes=block_bytes)
    expected = oracle(problem, kind, True, "sum", 2.0)
    actual = (loss.total.detach(), grad_queries, grad_labels)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-11 * scale + 1e-9)


@pytest.mark.parametrize("scale", [1.0, 200.0], ids=["small", "large"])
@pytest.mark.parametrize(("kind", "l2q", "reduction"), OBJECTIVES)
def test_ignored_pairs_get_no_gradient(kind, l2q, reduction, scale):
    problem = random_problem(4, size=(6, 9, 6), scale=scale)
    assert problem.ignored
    # With unit queries the label's gradient is temperature times the column of logit gradients.
    problem = replace(problem, queries=torch.eye(6, dtype=torch.float64), eligible=np.ones(9, bool))
    for block_bytes in (ONE_LABEL, ONE_BLOCK):
        grad_PB = run(problem, kind, l2q, reduction, block_bytes)[2]
        assert all(grad_PB[label, i] == 0 for i, label in problem.ignored)
        assert grad_PB.count_nonzero() > len(problem.positives) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_queries_and_labels_does_not_matter(kind):
    problem = random_problem(2)
    at_query, at_label = (
        np.random.default_rng(0).permutation(6),
        np.random.default_rng(1).permutation(9),
    )
    moved = Problem(
        problem.queries[np.argsort(at_query)],
        problem.labels[np.argsort(at_label)],
        {(at_query[i], at_label[p]) for i, p in problem.positives},
        {(at_query[i], at_label[p]) for i, p in problem.ignored},
        problem.eligible[np.argsort(at_label)],
    )
    loss, grad_queries, grad_labels = run(problem, kind)
    moved_loss, moved_queries, moved_labels = run(moved, kind)
    torch.testing.assert_close(moved_loss.total, loss.total)
    torch.testing.assert_close(moved_queries[at_query], grad_queries)
    torch.testing.assert_close(moved_labels[at_label], grad_labels)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_slices_give_a_differentiable_zero(kind):
    for num_queries, num_labels in ((4, 0), (0, 3), (4, 3)):
        queries = torch.randn(num_queries, 5, requires_grad=True)
        labels = torch.randn(num_labels, 5, requires_grad=True)
        none = np.zeros(0, np.int64)
        targets = Targets.from_plan(
            batch_size=num_queries,
            positive_query=none,
            positive_pool=none,
            ignored_query=none,
            ignored_pool=none,
            columns=np.arange(num_labels),
            eligible=np.ones(num_labels, bool),
        )
        loss = loss_of(queries, labels, targets, kind)
        loss.total.backward()
        assert loss.total.item() == 0
        assert torch.equal(queries.grad, torch.zeros_like(queries))
        assert torch.equal(labels.grad, torch.zeros_like(labels))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.5, 10.0, 100.0])
def test_fp32_follows_fp64(kind, scale):
    problem = random_problem(5, scale=scale, size=(20, 30, 8))
    expected = oracle(problem, kind, True, "sum", 2.0)
    single = replace(problem, queries=problem.queries.float(), labels=problem.labels.float())
    loss, *grads = run(single, kind, block_bytes=20 * 4 * 7)
    for actual, wanted in zip((loss.total.detach(), *grads), expected, strict=True):
        assert actual.dtype == torch.float32
        error = (actual - wanted).abs().max() / wanted.abs().max()
        assert error < 2e-4 * max(1.0, scale**2 / 1000)  # logits reach 4 · scale², eps 6e-8


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_inputs_and_autocast_compute_in_fp32(kind):
    problem = random_problem(6)
    queries, labels = problem.queries.bfloat16(), problem.labels[problem.eligible].bfloat16()
    wanted = loss_of(queries.float(), labels.float(), problem.targets(), kind).total
    queries.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss_of(queries, labels, problem.targets(), kind).total
        actual.backward()
    assert actual.dtype == torch.float32
    assert torch.equal(actual, wanted)
    assert queries.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_reaches_the_loss(kind):
    problem = random_problem(7)
    problem.queries[min(problem.positives)[0]] = torch.nan
    assert run(replace(problem, eligible=np.ones(9, bool)), kind)[0].total.isnan()


class Watch(TorchDispatchMode):
    """Records the largest tensor made and the number of matrix products."""

    largest = gemms = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        self.gemms += "addmm" in str(func)
        return result


@pytest.mark.parametrize("scale", [0.1, 10.0], ids=["small", "large"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_exist_in_blocks_only(kind, scale):
    num_queries, num_labels, width, block = 64, 1000, 8, 128
    problem = random_problem(8, scale=scale, size=(num_queries, num_labels, width))
    sparse = set(sorted(problem.positives)[::200])
    problem = replace(problem, positives=sparse, ignored=set(), eligible=np.ones(num_labels, bool))
    with Watch() as blocked:
        run(problem, kind, block_bytes=8 * num_queries * block)
    assert blocked.largest == max(num_queries * block, num_labels * width)
    num_blocks = -(-num_labels // block)
    assert blocked.gemms == num_blocks * (3 if kind == "bce" else 4)
    with Watch() as whole:
        run(problem, kind)
    assert whole.gemms == 3
    with Watch() as forward, torch.no_grad():
        loss_of(problem.queries, problem.labels, problem.targets(), kind)
    assert forward.gemms == 1


def test_targets_of_a_plan():
    targets = Targets.from_plan(
        batch_size=4,
        positive_query=np.array([0, 0, 1, 2]),
        positive_pool=np.array([3, 4, 1, 2]),
        ignored_query=np.array([0, 3]),
        ignored_pool=np.array([1, 4]),
        columns=np.array([1, 4]),
        eligible=np.array([True, True, False, True, True]),  # query 2's only positive is not
    )
    assert (targets.num_queries, targets.num_anchors, targets.num_labels) == (2, 3, 4)
    assert targets.positives_per_query.tolist() == [2, 1, 0, 0]
    assert targets.positives_per_label.tolist() == [1, 1]
    assert (targets.positive_query.tolist(), targets.positive_label.tolist()) == ([1, 0], [0, 1])
    assert (targets.ignored_query.tolist(), targets.ignored_label.tolist()) == ([0, 3], [0, 1])


def test_objective_weights_the_heads_that_train():
    assert ObjectiveConfig(weight_de=0.25).head_weights == {"de": 0.25, "classifier": 0.75}
    assert ObjectiveConfig(de="none").head_weights == {"classifier": 1.0}
    assert ObjectiveConfig(classifier="none").head_weights == {"de": 1.0}
    with pytest.raises(ValidationError, match="nothing to train"):
        ObjectiveConfig(de="none", classifier="none")
    with pytest.raises(ValidationError, match="greater than 0"):
        ObjectiveConfig(temperature=0.0)
