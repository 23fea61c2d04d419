"""Clusters are exactly balanced, reproducible to the last row, and of similar rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unidec_ds.data.pairs import Pairs
from unidec_ds.data.pool import Planner, PoolConfig
from unidec_ds.mining import clustering
from unidec_ds.mining.clustering import balanced_clusters


def unit_vectors(count: int, width: int = 16, seed: int = 0, num_topics: int = 0) -> torch.Tensor:
    """Random directions, or random directions around some topics."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, width, generator=generator)
    if num_topics:
        topics = torch.randn(num_topics, width, generator=generator)
        vectors = topics.repeat_interleave(-(-count // num_topics), 0)[:count] + 0.1 * vectors
        vectors = vectors[torch.randperm(count, generator=generator)]
    return torch.nn.functional.normalize(vectors, dim=1)


def mean_similarity(vectors_ND: torch.Tensor, clusters_N: np.ndarray) -> float:
    """Mean cosine over the pairs of different rows of one cluster, averaged over clusters."""
    means = []
    for cluster in range(clusters_N.max() + 1):
        rows = vectors_ND[clusters_N == cluster].double()
        means.append((rows.sum(0).square().sum() - len(rows)) / (len(rows) * (len(rows) - 1)))
    return float(torch.stack(means).mean())


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 300), st.integers(0, 3))
def test_sizes_differ_by_at_most_one(data, count, seed):
    num_clusters = data.draw(st.integers(1, count))
    sizes = np.bincount(balanced_clusters(unit_vectors(count, 4, seed), num_clusters, seed))
    assert len(sizes) == num_clusters
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("sample", [16, 1 << 14])
def test_the_sampled_split_is_balanced_too(monkeypatch, sample):
    monkeypatch.setattr(clustering, "SAMPLE", sample)
    sizes = np.bincount(balanced_clusters(unit_vectors(1001), 37, 0))
    assert sorted(set(sizes)) == [27, 28]


def test_the_planner_takes_them():
    num_queries, batch_size = 103, 10
    query_ids = np.arange(num_queries)
    positives = Pairs.from_pairs(query_ids, query_ids % 7, num_queries, 7)
    clusters = balanced_clusters(unit_vectors(num_queries), -(-num_queries // batch_size), 0)
    planner = Planner(
        query_ids=query_ids,
        positives=positives,
        filter_pairs=None,
        pool=PoolConfig(size=0),
        batch_size=batch_size,
        seed=0,
        clusters=clusters,
    )
    batches = [planner.plan(step).query_ids for step in range(planner.steps_per_epoch)]
    assert sorted(np.concatenate(batches)) == list(query_ids)
    assert {frozenset(batch) for batch in batches} == {
        frozenset(np.flatnonzero(clusters == c)) for c in range(planner.steps_per_epoch)
    }


def test_topics_are_found_whole():
    vectors = unit_vectors(512, num_topics=8)
    clusters = balanced_clusters(vectors, 8, 0)
    assert mean_similarity(vectors, clusters) > 0.75
    shuffled = np.random.default_rng(0).permutation(clusters)
    assert mean_similarity(vectors, shuffled) < 0.2


@pytest.mark.parametrize("sample", [256, 1 << 14])
def test_neighbours_are_nearer_than_chance_without_topics(monkeypatch, sample):
    monkeypatch.setattr(clustering, "SAMPLE", sample)
    vectors = unit_vectors(3000)
    clusters = balanced_clusters(vectors, 30, 0)
    assert mean_similarity(vectors, clusters) > 0.2  # 0 by chance


def test_pure_function_of_vectors_and_seed():
    vectors = unit_vectors(500)
    first = balanced_clusters(vectors, 9, 3)
    np.testing.assert_array_equal(first, balanced_clusters(vectors.clone(), 9, 3))
    assert (first != balanced_clusters(vectors, 9, 4)).any()


def test_arithmetic_is_exact(monkeypatch):
    """Sums in another precision and order change no cluster, so neither do threads nor devices."""
    vectors = unit_vectors(10_000, 768, num_topics=50)
    monkeypatch.setattr(clustering, "SAMPLE", 2048)
    expected = balanced_clusters(vectors, 20, 0)

    def rounded_in_float64(vectors_ND, rows_n):
        return torch.round(vectors_ND[torch.from_numpy(rows_n)].double() * 2048)

    monkeypatch.setattr(clustering, "_rounded", rounded_in_float64)
    np.testing.assert_array_equal(expected, balanced_clusters(vectors, 20, 0))


def test_equal_rows_are_split_by_position():
    clusters = balanced_clusters(unit_vectors(1).expand(10, -1), 4, 0)
    assert np.bincount(clusters).tolist() == [2, 3, 2, 3]
    assert (np.diff(clusters) >= 0).all()


def test_vectors_that_are_not_finite_are_refused():
    vectors = unit_vectors(10)
    vectors[3, 2] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        balanced_clusters(vectors, 2, 0)
