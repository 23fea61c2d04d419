"""The planner against an oracle of Python sets, and the properties a plan has to have."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unidec_ds.data.keyed import hash64, uniform
from unidec_ds.data.pairs import Pairs
from unidec_ds.data.pool import Planner, PoolConfig, StepPlan
from unidec_ds.errors import UserError


class Corpus(NamedTuple):
    """A small corpus; some pairs are both positive and filtered."""

    num_queries: int
    num_labels: int
    positives: Pairs
    filter_pairs: Pairs
    shortlists: np.ndarray
    query_ids: np.ndarray


def make_corpus(seed: int, num_queries: int = 23, num_labels: int = 40) -> Corpus:
    generator = np.random.default_rng(seed)

    def some_pairs(share: float) -> Pairs:
        rows, columns = np.nonzero(generator.random((num_queries, num_labels)) < share)
        return Pairs.from_pairs(rows, columns, num_queries, num_labels)

    shortlists = np.argsort(generator.random((num_queries, num_labels)), axis=1)[:, :8]
    shortlists[generator.random(shortlists.shape) < 0.2] = -1
    query_ids = generator.permutation(num_queries)[: num_queries - 2]
    return Corpus(
        num_queries,
        num_labels,
        some_pairs(0.1),
        some_pairs(0.05),
        shortlists.astype(np.int32),
        query_ids,
    )


def make_planner(corpus: Corpus, pool: PoolConfig, **changes: Any) -> Planner:
    arguments: dict[str, Any] = {
        "query_ids": corpus.query_ids,
        "positives": corpus.positives,
        "filter_pairs": corpus.filter_pairs,
        "pool": pool,
        "batch_size": 6,
        "seed": 11,
        "shortlists": corpus.shortlists,
    }
    return Planner(**(arguments | changes))


def as_lists(plan: StepPlan) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(plan).items()}


def pairs_of(plan: StepPlan, kind: str) -> list[tuple[int, int]]:
    """The plan's "positive" or "ignored" pairs as (query_id, label_id)."""
    rows, columns = getattr(plan, f"{kind}_query"), getattr(plan, f"{kind}_pool")
    return list(zip(plan.query_ids[rows].tolist(), plan.label_ids[columns].tolist(), strict=True))


def set_of(pairs: Pairs) -> set[tuple[int, int]]:
    return set(zip(pairs.rows_of_pairs().tolist(), pairs.indices.tolist(), strict=True))


def oracle(corpus: Corpus, pool: PoolConfig, batch_size: int, seed: int, step: int) -> dict:
    """The plan, label by label and query by query."""
    # The batch.
    num_batches = -(-len(corpus.query_ids) // batch_size)
    epoch, number = divmod(step, num_batches)
    shuffled = sorted(
        corpus.query_ids.tolist(), key=lambda q: int(hash64(seed, "batches", epoch, q))
    )
    cuts = [len(shuffled) * i // num_batches for i in range(num_batches + 1)]
    batch = sorted(shuffled[cuts[number] : cuts[number + 1]])

    # What each query has, sampled and drew.
    true = {q: set(corpus.positives.row(q).tolist()) for q in batch}
    filtered = {q: set(corpus.filter_pairs.row(q).tolist()) for q in batch}
    if not pool.mask_filter_pairs:
        filtered = {q: set() for q in batch}
    positives = {q: true[q] - filtered[q] for q in batch}
    sampled, drawn = {}, {}
    for q in batch:
        row = sorted(positives[q])
        if pool.num_positives == 0 or not row:
            sampled[q] = set(row)
        elif pool.with_replacement:
            shares = [
                float(uniform(seed, "positives", step, j, q)) for j in range(pool.num_positives)
            ]
            sampled[q] = {row[int(share * len(row))] for share in shares}
        else:
            row.sort(key=lambda label: int(hash64(seed, "positives", step, q, label)))
            sampled[q] = set(row[: pool.num_positives])
        negatives = set(corpus.shortlists[q].tolist()) - {-1} - true[q] - filtered[q]
        ranked = sorted(
            negatives, key=lambda label: int(hash64(seed, "hard negatives", step, q, label))
        )
        drawn[q] = set(ranked[: pool.num_hard_negatives])

    # The pool, tier by tier.
    chosen: set[int] = set()
    num_hard_negatives = 0
    for tier in (sampled, drawn, positives if pool.fill_with_positives else {}):
        votes = Counter(label for labels in tier.values() for label in labels)
        new = sorted(
            (label for label in votes if label not in chosen), key=lambda x: (-votes[x], x)
        )
        if pool.size:
            new = new[: pool.size - len(chosen)]
        chosen |= set(new)
        if tier is drawn:
            num_hard_negatives = len(new)
    labels = sorted(chosen)

    # The pairs.
    kept = [q for q in batch if positives[q] & chosen]
    positive = [
        (i, labels.index(x)) for i, q in enumerate(kept) for x in sorted(positives[q] & chosen)
    ]
    ignored = [
        (i, labels.index(x)) for i, q in enumerate(kept) for x in sorted(filtered[q] & chosen)
    ]
    return {
        "step": step,
        "epoch": epoch,
        "query_ids": kept,
        "label_ids": labels,
        "positive_query": [i for i, _ in positive],
        "positive_pool": [j for _, j in positive],
        "ignored_query": [i for i, _ in ignored],
        "ignored_pool": [j for _, j in ignored],
        "num_dropped_queries": len(batch) - len(kept),
        "num_hard_negatives": num_hard_negatives,
    }


@settings(max_examples=150, deadline=None)
@given(
    corpus_seed=st.integers(0, 30),
    pool=st.builds(
        PoolConfig,
        size=st.integers(0, 30),
        num_positives=st.integers(0, 4),
        num_hard_negatives=st.sampled_from([0, 1, 3, 8, 20]),
        with_replacement=st.booleans(),
        fill_with_positives=st.booleans(),
        mask_filter_pairs=st.booleans(),
    ),
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 5),
    step=st.integers(0, 60),
)
def test_planner_equals_the_oracle(
    corpus_seed: int, pool: PoolConfig, batch_size: int, seed: int, step: int
) -> None:
    corpus = make_corpus(corpus_seed)
    planner = make_planner(corpus, pool, batch_size=batch_size, seed=seed)
    assert as_lists(planner.plan(step)) == oracle(corpus, pool, batch_size, seed, step)


def test_a_plan_is_a_pure_function_of_the_step() -> None:
    corpus, pool = make_corpus(0), PoolConfig(size=12)
    planner = make_planner(corpus, pool)
    in_order = [as_lists(planner.plan(step)) for step in range(12)]
    backwards = [as_lists(planner.plan(step)) for step in reversed(range(12))]
    assert in_order == backwards[::-1]
    assert in_order == [as_lists(make_planner(corpus, pool).plan(step)) for step in range(12)]
    other_seed = make_planner(corpus, pool, seed=12)
    assert in_order != [as_lists(other_seed.plan(step)) for step in range(12)]
    assert len({str(plan["label_ids"]) for plan in in_order}) == 12


def test_ids_are_int64_whatever_the_storage(tmp_path: Any) -> None:
    corpus = make_corpus(0)
    corpus.positives.save(tmp_path, "positives")
    np.save(tmp_path / "shortlists.npy", corpus.shortlists)
    mapped = make_planner(
        corpus,
        PoolConfig(size=12),
        positives=Pairs.open(tmp_path, "positives", corpus.num_labels),
        shortlists=np.load(tmp_path / "shortlists.npy", mmap_mode="r"),
    ).plan(3)
    assert as_lists(mapped) == as_lists(make_planner(corpus, PoolConfig(size=12)).plan(3))
    assert {v.dtype for v in vars(mapped).values() if isinstance(v, np.ndarray)} == {
        np.dtype(np.int64)
    }


@pytest.mark.parametrize("with_replacement", [False, True])
def test_positives_are_true_and_negatives_are_not(with_replacement: bool) -> None:
    corpus = make_corpus(3)
    true, filtered = set_of(corpus.positives), set_of(corpus.filter_pairs)
    assert true & filtered, "the corpus has to test what wins"
    pool = PoolConfig(size=0, with_replacement=with_replacement, fill_with_positives=False)
    for step in range(40):
        plan = make_planner(corpus, pool).plan(step)
        positive, ignored = set(pairs_of(plan, "positive")), set(pairs_of(plan, "ignored"))
        assert positive <= true - filtered
        assert ignored <= filtered
        grid = {(q, label) for q in plan.query_ids.tolist() for label in plan.label_ids.tolist()}
        assert not (grid - positive - ignored) & (true | filtered)


def test_a_lone_query_never_draws_its_positives_or_filter_pairs_the_last_label_included() -> None:
    last = 5
    positives = Pairs.from_pairs([0, 0, 1, 1], [0, last, 1, last], 2, last + 1)
    filter_pairs = Pairs.from_pairs([0, 1], [2, 0], 2, last + 1)
    shortlists = np.array([[last, 4, 2, 0, 3, -1], [last, 4, 2, 0, 1, -1]], np.int32)
    planner = Planner(
        query_ids=np.arange(2),
        positives=positives,
        filter_pairs=filter_pairs,
        pool=PoolConfig(size=0, num_positives=1, num_hard_negatives=9, fill_with_positives=False),
        batch_size=1,
        seed=0,
        shortlists=shortlists,
    )
    for step in range(30):
        plan = planner.plan(step)
        query = int(plan.query_ids[0])
        negatives = set(plan.label_ids.tolist()) - {x for _, x in pairs_of(plan, "positive")}
        assert negatives == [{3, 4}, {2, 4}][query]
        assert plan.num_hard_negatives == 2
        assert len(plan.positive_pool) == 1
        assert len(plan.ignored_pool) == 0


def test_filter_pairs_have_no_effect_without_the_mask() -> None:
    corpus, pool = make_corpus(5), PoolConfig(size=20, mask_filter_pairs=False)
    without = make_planner(corpus, pool, filter_pairs=None)
    for step in range(8):
        plan = make_planner(corpus, pool).plan(step)
        assert as_lists(plan) == as_lists(without.plan(step))
        assert len(plan.ignored_pool) == 0


def test_pool_size_keeps_the_labels_of_most_queries() -> None:
    # Label 3 is everyone's; 0 and 2 are two queries' each; 1 is nobody else's than query 4's.
    positives = Pairs.from_pairs(
        [0, 0, 1, 1, 2, 2, 3, 3, 4], [3, 0, 3, 0, 3, 2, 3, 2, 1], num_rows=5, num_columns=4
    )
    expected = {1: [3], 2: [0, 3], 3: [0, 2, 3], 4: [0, 1, 2, 3], 0: [0, 1, 2, 3]}
    for size, label_ids in expected.items():
        planner = Planner(
            query_ids=np.arange(5),
            positives=positives,
            filter_pairs=None,
            pool=PoolConfig(size=size),
            batch_size=5,
            seed=0,
        )
        plan = planner.plan(0)
        assert plan.label_ids.tolist() == label_ids
        assert plan.num_dropped_queries == (0 if 1 in label_ids else 1)
        assert plan.query_ids.tolist() == list(range(5 - plan.num_dropped_queries))


def test_a_query_with_every_positive_filtered_is_dropped() -> None:
    planner = Planner(
        query_ids=np.arange(2),
        positives=Pairs.from_pairs([0, 1], [0, 1], 2, 2),
        filter_pairs=Pairs.from_pairs([0], [0], 2, 2),
        pool=PoolConfig(size=0),
        batch_size=1,
        seed=0,
    )
    plans = sorted((planner.plan(step) for step in range(2)), key=lambda p: len(p.query_ids))
    assert [plan.query_ids.tolist() for plan in plans] == [[], [1]]
    assert [plan.num_dropped_queries for plan in plans] == [1, 0]
    assert [plan.label_ids.tolist() for plan in plans] == [[], [1]]


@pytest.mark.parametrize("all_labels", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 6, 21, 100])
def test_an_epoch_covers_every_query_once(batch_size: int, all_labels: bool) -> None:
    corpus = make_corpus(1)
    positives = Pairs.from_pairs(
        np.arange(corpus.num_queries), np.arange(corpus.num_queries), corpus.num_queries, 40
    )
    planner = make_planner(
        corpus,
        PoolConfig(size=0),
        positives=positives,
        filter_pairs=None,
        batch_size=batch_size,
        all_labels=all_labels,
    )
    num_batches = planner.steps_per_epoch
    assert num_batches == -(-len(corpus.query_ids) // batch_size)
    first_batches = set()
    for epoch in range(4):
        plans = [planner.plan(epoch * num_batches + i) for i in range(num_batches)]
        sizes = [len(plan.query_ids) for plan in plans]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= batch_size
        assert {plan.epoch for plan in plans} == {epoch}
        covered = np.concatenate([plan.query_ids for plan in plans])
        assert np.sort(covered).tolist() == np.sort(corpus.query_ids).tolist()
        first_batches.add(str(plans[0].query_ids))
    assert len(first_batches) > 1 or num_batches == 1


def test_clustered_batches_are_the_clusters_in_another_order_each_epoch() -> None:
    corpus = make_corpus(2)
    positives = Pairs.from_pairs(np.arange(23), np.arange(23), 23, 40)
    clusters = np.arange(21) % 4
    random = make_planner(corpus, PoolConfig(size=0), positives=positives, filter_pairs=None)
    planner = random.with_mined(corpus.shortlists, clusters)
    expected = {tuple(sorted(corpus.query_ids[clusters == c].tolist())) for c in range(4)}
    orders = []
    for epoch in range(6):
        batches = [tuple(planner.plan(4 * epoch + i).query_ids.tolist()) for i in range(4)]
        assert set(batches) == expected
        orders.append(tuple(batches))
    assert len(set(orders)) > 1
    assert as_lists(random.with_mined(corpus.shortlists, None).plan(2)) == as_lists(random.plan(2))


def test_every_positive_and_every_negative_is_drawn_equally_often() -> None:
    positives = Pairs.from_pairs(np.zeros(10), np.arange(10), 1, 30)
    shortlists = np.arange(10, 22, dtype=np.int32)[None]
    for with_replacement in (False, True):
        planner = Planner(
            query_ids=np.zeros(1, np.int64),
            positives=positives,
            filter_pairs=None,
            pool=PoolConfig(
                size=0,
                num_positives=3,
                num_hard_negatives=4,
                with_replacement=with_replacement,
                fill_with_positives=False,
            ),
            batch_size=1,
            seed=0,
            shortlists=shortlists,
        )
        num_plans = 1500
        pools = [planner.plan(step).label_ids for step in range(num_plans)]
        counts = np.bincount(np.concatenate(pools), minlength=30) / num_plans
        # Distinct labels after three draws with replacement: 10 (1 - 0.9^3) = 2.71 on average.
        share = 0.271 if with_replacement else 0.3
        np.testing.assert_allclose(counts[:10], share, atol=0.06)  # five standard deviations
        np.testing.assert_allclose(counts[10:22], 4 / 12, atol=0.06)
        assert counts[22:].sum() == 0
        if not with_replacement:
            assert {len(pool) for pool in pools} == {7}
            pairs = Counter(tuple(pool[:3].tolist()) for pool in pools)
            assert len(pairs) == 120, "every triple of positives occurs"


def test_a_pool_that_holds_every_label_has_the_pairs_of_all_labels() -> None:
    corpus = make_corpus(4, num_queries=40, num_labels=12)
    pool = PoolConfig(size=0, num_positives=0)
    psl = make_planner(corpus, pool, batch_size=38, shortlists=None)
    every = make_planner(corpus, pool, batch_size=38, all_labels=True)
    assert psl.plan(0).label_ids.tolist() == list(range(12))
    assert as_lists(psl.plan(0)) == as_lists(every.plan(0))
    unreached = make_planner(make_corpus(4, 4, 100), pool, all_labels=True).plan(0)
    assert unreached.label_ids.tolist() == list(range(100))


def test_a_query_with_very_many_positives() -> None:
    many = 200_000
    positives = Pairs.from_pairs(
        np.r_[np.zeros(many, np.int64), 1], np.r_[np.arange(many), 7], 2, many
    )
    plan = Planner(
        query_ids=np.arange(2),
        positives=positives,
        filter_pairs=None,
        pool=PoolConfig(size=50),
        batch_size=2,
        seed=0,
    ).plan(0)
    assert len(plan.label_ids) == 50
    assert 7 in plan.label_ids
    assert len(plan.positive_pool) == 51


def test_no_query_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"no query to train on.*validation_fraction"):
        make_planner(make_corpus(0), PoolConfig(size=1), query_ids=np.zeros(0, np.int64))
