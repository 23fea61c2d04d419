"""Streaming the classifier's loss over blocks of labels against the plain path."""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from unidec_ds.classifier.config import ClassifierConfig
from unidec_ds.classifier.storage import Placement
from unidec_ds.classifier.stream import block_size, train_by_block
from unidec_ds.classifier.table import ClassifierTable
from unidec_ds.losses import head_loss
from unidec_ds.targets import Targets

B, L, D, LR, WEIGHT = 6, 23, 8, 0.05, 0.3
LABELS = np.arange(L)


def make_table(**config) -> ClassifierTable:
    return ClassifierTable(
        num_labels=L, width=D, rank=0, world_size=1,
        config=ClassifierConfig(**{"kernel": "torch", "format": "fp32", **config}),
        placement=Placement(), device=torch.device("cpu"), seed=3, betas=(0.9, 0.99), eps=1e-8,
        weight_decay=0.1,
    )  # fmt: skip


def make_targets(step: int) -> Targets:
    draw = np.random.default_rng(step).random((B, L))
    positive, ignored = np.nonzero(draw < 0.15), np.nonzero(draw > 0.9)
    return Targets.from_plan(
        batch_size=B, positive_query=positive[0], positive_pool=positive[1],
        ignored_query=ignored[0], ignored_pool=ignored[1],
        columns=LABELS, eligible=np.ones(L, bool),
    )  # fmt: skip


def make_queries(step: int) -> torch.Tensor:
    made = torch.randn(B, D, generator=torch.Generator().manual_seed(step))
    return made.requires_grad_()


def bce(queries, rows, targets, *, l2q, reduction, cosine):
    if cosine:
        queries, rows = normalize(queries, dim=-1), normalize(rows, dim=-1)
    return head_loss(
        "bce", queries, rows, targets, temperature=2.0, l2q=l2q, bce_reduction=reduction,
        block_bytes=1 << 20, combine_logsumexp=lambda local: local,
    )  # fmt: skip


def plain_step(table, step, loss):
    queries, rows = make_queries(step), table.fetch(LABELS)
    head = loss(queries, rows, make_targets(step))
    (WEIGHT * head.total).backward()
    table.apply(rows, lr=LR)
    return head, queries.grad


def streamed_step(table, step, loss, size):
    queries = make_queries(step)
    head = train_by_block(
        table, LABELS, queries, make_targets(step), loss, size=size, weight=WEIGHT, lr=LR
    )
    (WEIGHT * head.total).backward()
    return head, queries.grad


@pytest.mark.parametrize("size", [1, 5, L, 1000])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_streamed_steps_equal_plain_ones(size, optimizer):
    for l2q, reduction, cosine in product((True, False), ("sum", "mean"), (True, False)):
        loss = partial(bce, l2q=l2q, reduction=reduction, cosine=cosine)
        plain = make_table(optimizer=optimizer)
        streamed = make_table(optimizer=optimizer, prefetch_rows="always")
        for step in range(3):
            expected, expected_grad = plain_step(plain, step, loss)
            found, found_grad = streamed_step(streamed, step, loss, size)
            for part in ("total", "q2l", "l2q"):
                torch.testing.assert_close(getattr(found, part), getattr(expected, part))
            torch.testing.assert_close(found_grad, expected_grad)
        assert streamed.step == plain.step == 3
        for name, column in plain.state().items():
            torch.testing.assert_close(streamed.state()[name], column, rtol=1e-4, atol=1e-6)


def test_no_more_than_a_block_of_rows_is_fetched():
    class Watched(ClassifierTable):
        fetched: list[int]

        def fetch(self, label_ids):
            self.fetched.append(len(label_ids))
            return super().fetch(label_ids)

    table = make_table()
    table.__class__, table.fetched = Watched, []
    loss = partial(bce, l2q=False, reduction="sum", cosine=False)
    streamed_step(table, 0, loss, size=5)
    assert table.fetched == [5, 5, 5, 5, 3]


def test_a_rank_without_a_label_takes_the_step_too():
    table, none = make_table(), LABELS[:0]
    targets = Targets.from_plan(
        batch_size=B, positive_query=np.arange(2), positive_pool=np.arange(2),
        ignored_query=none, ignored_pool=none, columns=none, eligible=np.ones(L, bool),
    )  # fmt: skip
    queries = make_queries(0)
    loss = partial(bce, l2q=True, reduction="sum", cosine=False)
    head = train_by_block(table, none, queries, targets, loss, size=4, weight=1.0, lr=LR)
    head.total.backward()
    assert table.step == 1
    assert head.total == 0
    assert (queries.grad == 0).all()


def test_queries_that_are_not_finite_stop_before_any_update():
    table = make_table()
    before, queries = table.read(LABELS), make_queries(0).detach()
    queries[2, 3] = torch.nan
    loss = partial(bce, l2q=False, reduction="sum", cosine=False)
    head = train_by_block(table, LABELS, queries, make_targets(0), loss, size=4, weight=1.0, lr=LR)
    assert head.total.isnan()
    assert torch.equal(table.read(LABELS), before)
    assert table.step == 0


def test_a_block_that_is_not_finite_is_not_updated_nor_is_a_later_one():
    table = make_table()
    table.write(np.array([9]), torch.full((1, D), torch.inf))
    before = table.read(LABELS)
    loss = partial(bce, l2q=False, reduction="sum", cosine=False)
    head = train_by_block(
        table, LABELS, make_queries(0), make_targets(0), loss, size=4, weight=1.0, lr=LR
    )
    assert head.total.isnan()
    after = table.read(LABELS)
    assert (after[:8] != before[:8]).any(1).all()  # blocks 0 and 1
    assert torch.equal(after[8:], before[8:])  # the block of label 9, and the later ones


def test_a_block_keeps_logits_and_rows_within_the_bytes():
    assert block_size(num_queries=1024, width=768, block_bytes=256 << 20) == 65_536
    assert block_size(num_queries=16, width=768, block_bytes=3 << 20) == 1024
    assert block_size(num_queries=10**9, width=8, block_bytes=1 << 20) == 1
