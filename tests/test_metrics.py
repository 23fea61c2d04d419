import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unidec_ds.data.pairs import Pairs
from unidec_ds.metrics import (
    frequency_breakdown,
    inverse_propensity,
    ranks_of_truth,
    score_predictions,
)


def truth_of(rows, num_labels):
    row_ids = np.repeat(np.arange(len(rows)), [len(labels) for labels in rows])
    return Pairs.from_pairs(
        row_ids, [label for row in rows for label in row], len(rows), num_labels
    )


def score_by_definition(truth, predictions, weight, k):
    """The definitions of the module docstring, one query and one prediction at a time."""
    n = len(truth)
    precision = ndcg = psp = best_psp = psndcg = best_psndcg = recall = 0.0
    covered = set()
    for true, predicted in zip(truth, predictions, strict=True):
        ideal = sum(1 / math.log2(r + 2) for r in range(min(k, len(true))))
        best = sorted((weight[label] for label in true), reverse=True)[:k]
        hits = {}
        for rank, label in enumerate(predicted[:k]):
            if label in true and label not in hits:
                hits[label] = rank
        precision += len(hits) / k
        psp += sum(weight[label] for label in hits)
        best_psp += sum(best)
        covered |= set(hits)
        if true:
            ndcg += sum(1 / math.log2(r + 2) for r in hits.values()) / ideal
            psndcg += sum(weight[label] / math.log2(r + 2) for label, r in hits.items()) / ideal
            best_psndcg += sum(w / math.log2(r + 2) for r, w in enumerate(best)) / ideal
            recall += len(hits) / len(true)
    occurring = {label for true in truth for label in true}
    with_truth = sum(1 for true in truth if true)
    fractions = {
        "P": (precision, n),
        "nDCG": (ndcg, n),
        "PSP": (psp, best_psp),
        "PSnDCG": (psndcg, best_psndcg),
        "R": (recall, with_truth),
        "coverage": (len(covered), len(occurring)),
    }
    return {f"{name}@{k}": 100 * x / y if y else 0.0 for name, (x, y) in fractions.items()}


def test_an_example_worked_by_hand():
    """Three queries, four labels, weights 1, 2, 3, 4; the second query has no truth."""
    truth = truth_of([[0, 3], [], [2]], 4)
    predicted = np.array([[3, 1, 0], [0, 1, 2], [1, 2, -1]])
    scores = score_predictions(
        truth, predicted, inverse_propensity=np.array([1.0, 2, 3, 4]), ks=(1, 2, 3)
    )
    second, third = 1 / math.log2(3), 1 / math.log2(4)  # discounts of places 2 and 3
    ideal = 1 + second  # of query 0 from k = 2 on
    expected = {
        "P@1": 1 / 3,  # label 3 of query 0
        "P@2": 2 / 6,
        "P@3": 3 / 9,
        "nDCG@1": 1 / 3,
        "nDCG@2": (1 / ideal + second) / 3,
        "nDCG@3": ((1 + third) / ideal + second) / 3,
        "PSP@1": 4 / (4 + 3),
        "PSP@2": (4 + 3) / (4 + 1 + 3),
        "PSP@3": 8 / 8,
        "PSnDCG@1": 4 / 7,
        "PSnDCG@2": (4 / ideal + 3 * second) / ((4 + second) / ideal + 3),
        "PSnDCG@3": ((4 + third) / ideal + 3 * second) / ((4 + second) / ideal + 3),
        "R@1": (1 / 2 + 0) / 2,  # over the two queries with truth
        "R@2": (1 / 2 + 1) / 2,
        "R@3": 1.0,
        "coverage@1": 1 / 3,  # label 3 of 0, 2, 3
        "coverage@2": 2 / 3,
        "coverage@3": 1.0,
    }
    assert scores == pytest.approx({key: 100 * value for key, value in expected.items()})


@given(
    seed=st.integers(0, 10**6),
    num_queries=st.integers(1, 8),
    num_labels=st.integers(1, 12),
    depth=st.integers(0, 12),
)
@settings(max_examples=100, deadline=None)
def test_metrics_equal_their_definition(seed, num_queries, num_labels, depth):
    g = np.random.default_rng(seed)
    truth = [
        g.permutation(num_labels)[: g.integers(0, num_labels + 1)].tolist()
        for _ in range(num_queries)
    ]
    predicted = np.full((num_queries, depth), -1, np.int64)
    for row in predicted:
        count = g.integers(0, depth + 1)
        row[:count] = g.integers(0, num_labels, count)  # repeats occur: first place only
    weight = 1 + g.random(num_labels)
    ks = (1, 2, 3, 15)
    scores = score_predictions(
        truth_of(truth, num_labels), predicted, inverse_propensity=weight, ks=ks
    )
    expected = {}
    for k in ks:
        expected |= score_by_definition(truth, predicted.tolist(), weight, k)
    assert scores == pytest.approx(expected)


def test_blocks_of_comparisons_do_not_show(monkeypatch):
    g = np.random.default_rng(0)
    truth = truth_of([g.permutation(50)[:5] for _ in range(40)], 50)
    predicted = np.argsort(g.random((40, 50)), axis=1)[:, :20]
    whole = ranks_of_truth(truth, predicted)
    monkeypatch.setattr("unidec_ds.metrics._BLOCK_ENTRIES", 64)
    np.testing.assert_array_equal(ranks_of_truth(truth, predicted), whole)


def test_inverse_propensity_of_a_label_seen_once_is_the_log_of_the_number_of_queries():
    train = truth_of([[0], [1, 2], [1], [1], []], 4)
    for a, b in ((0.55, 1.5), (0.6, 2.6), (0.5, 0.4)):
        q = inverse_propensity(train, a, b)
        c = (math.log(5) - 1) * (b + 1) ** a
        assert q == pytest.approx([math.log(5), 1 + c * (3 + b) ** -a, math.log(5), 1 + c * b**-a])


def test_parts_of_a_breakdown_sum_to_the_whole():
    g = np.random.default_rng(3)
    truth = truth_of([g.permutation(60)[:4] for _ in range(50)], 60)
    predicted = np.argsort(g.random((50, 60)), axis=1)[:, :30]
    counts = g.geometric(0.1, 60)
    scores = score_predictions(truth, predicted, inverse_propensity=np.ones(60))
    bins = frequency_breakdown(truth, predicted, train_counts=counts)
    for k in (1, 3, 5, 10, 100):
        assert sum(part.scores[f"P@{k}"] for part in bins) == pytest.approx(scores[f"P@{k}"])
        found = sum(part.scores[f"R@{k}"] * part.num_truth_pairs for part in bins)
        # All queries have four true labels, so the micro average is the macro average.
        assert found / truth.num_pairs == pytest.approx(scores[f"R@{k}"])
    assert sum(part.num_labels for part in bins) == 60
    assert [part.name for part in bins] == ["head", "torso", "tail"]
    head, torso, tail = bins
    assert head.min_count > torso.max_count > torso.min_count > tail.max_count


def test_bins_are_thirds_of_the_train_positives_and_equal_counts_stay_together():
    counts = np.array([1, 12, 6, 1, 0, 6, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])  # 12 + 2 x 6 + 12 x 1
    bins = frequency_breakdown(
        truth_of([range(16)], 16), np.arange(16)[None], train_counts=counts, ks=(16,)
    )
    described = [(b.min_count, b.max_count, b.num_labels, b.num_truth_pairs) for b in bins]
    assert described == [(12, 12, 1, 1), (6, 6, 2, 2), (0, 1, 13, 13)]
    assert [b.scores["R@16"] for b in bins] == [100.0] * 3
    # One frequency alone: everything falls in the middle, and empty bins score 0.
    only = frequency_breakdown(
        truth_of([[0]], 3), np.array([[0]]), train_counts=np.array([2, 2, 2]), ks=(1,)
    )
    assert [(b.num_labels, b.scores["P@1"]) for b in only] == [(0, 0.0), (3, 100.0), (0, 0.0)]
