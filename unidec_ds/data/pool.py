"""The plan of one step: which queries, which label pool, which pairs are positive.

First stage of a training step. A plan is a pure function of the planner's arguments and the step:
every rank makes the same plan without communication, in any order, and a resumed run makes the
plans of the run it resumes. Only the batch's rows of the positives, the filter pairs and the
shortlists are read, so all three may be memory-mapped.

How labels come into the pool, each tier only while there is room under `pool.size`:

1. positives sampled for the batch's queries;
2. hard negatives drawn from the queries' shortlists;
3. further positives of the batch's queries.

A tier that overflows keeps the labels chosen by most queries, ties by label id.

Source: pick-some-labels (PSL), UniDEC, arXiv 2405.03714; filter pairs are ours.
Cost: two sorts and a few passes over the batch's positives, one search per shortlist entry;
only the permutation made once an epoch grows with the number of queries, nothing with L
(`scripts/bench/plan.py`).

Shape letters: B queries of the batch, M their positive pairs, G their filter pairs, K shortlist
length, U distinct labels of the pairs, P pool, L labels.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from unidec_ds.data.keyed import hash64, uniform
from unidec_ds.data.pairs import Ids, Pairs
from unidec_ds.errors import UserError
from unidec_ds.settings import Settings

Mask = NDArray[np.bool_]


class PoolConfig(Settings):
    """How a step chooses the labels that its losses are computed over."""

    size: Annotated[int, Field(ge=0)]
    """Most labels in the pool; 0 = no limit. Step time and memory grow with it."""
    num_positives: Annotated[int, Field(ge=0)] = 3
    """Positives sampled per query and step; 1 is POL, 0 takes all of them (PAL)."""
    num_hard_negatives: Annotated[int, Field(ge=0)] = 6
    """Hard negatives drawn per query and step from its shortlist, without replacement."""
    with_replacement: bool = False
    """Whether one query may sample the same positive more than once (the authors' choice)."""
    fill_with_positives: bool = True
    """Whether room left under `size` goes to further positives of the batch's queries. With
    `size` 0 that is every positive; switch it off for exact PSL or POL without a limit."""
    mask_filter_pairs: bool = True
    """Whether filter pairs are neither positive nor negative; off, they have no effect."""


class BatchesConfig(Settings):
    """How the queries of an epoch are cut into batches."""

    kind: Literal["random", "clustered"] = "random"
    """`clustered`: from the first mining on, a batch is one cluster of similar queries."""


@dataclass(frozen=True)
class StepPlan:
    """What one step trains on. All ids and indices are int64."""

    step: int
    """The step it is for, counted from 0 over the whole run."""
    epoch: int
    """The epoch of that step, counted from 0."""
    query_ids: Ids
    """[B] kept queries, ascending; each has a positive in the pool."""
    label_ids: Ids
    """[P] the label pool, ascending."""
    positive_query: Ids
    """[M] index into `query_ids` of each positive pair; pairs are sorted by (query, pool)."""
    positive_pool: Ids
    """[M] index into `label_ids` of each positive pair."""
    ignored_query: Ids
    """[G] index into `query_ids` of each pair that is neither positive nor negative."""
    ignored_pool: Ids
    """[G] index into `label_ids` of each such pair."""
    num_dropped_queries: int
    """Queries of the batch left out because the pool holds none of their positives."""
    num_hard_negatives: int
    """Pool labels that came in as hard negatives: sampled by no query as a positive."""


class Planner:
    """Makes the plan of any step.

    Args:
        query_ids: int64 [N], the queries to train on, each once.
        positives: true positives by query_id; `num_columns` is L.
        filter_pairs: filter pairs by query_id, or None if the corpus has none.
        pool: the pool's settings.
        batch_size: global number of queries per step; an epoch has ceil(N / batch_size) batches
            whose sizes differ by at most one.
        seed: the run's seed.
        shortlists: int32 [number of queries, K] by query_id, label ids that do not repeat within
            a row, -1 = empty; None draws no hard negatives.
        clusters: int [N], the cluster of each of `query_ids`: as many clusters as an epoch has
            batches, differing in size by at most one; None shuffles the queries.
        all_labels: put every label in the pool (`objective.pool: all`); sampling, `pool.size` and
            `shortlists` then have no effect.

    Raises:
        UserError: there is no query to train on.
    """

    def __init__(
        self,
        *,
        query_ids: Ids,
        positives: Pairs,
        filter_pairs: Pairs | None,
        pool: PoolConfig,
        batch_size: int,
        seed: int,
        shortlists: NDArray[np.int32] | None = None,
        clusters: NDArray[np.integer] | None = None,
        all_labels: bool = False,
    ) -> None:
        if len(query_ids) == 0:
            raise UserError(
                "found no query to train on; at least one train query with a text and a positive "
                "label is needed; check the corpus and corpus.validation_fraction"
            )
        assert batch_size >= 1
        shape = (positives.num_rows, positives.num_columns)
        if filter_pairs is None or not pool.mask_filter_pairs:
            filter_pairs = Pairs.empty(*shape)
        assert (filter_pairs.num_rows, filter_pairs.num_columns) == shape
        self._query_ids = query_ids
        self._positives = positives
        self._filter_pairs = filter_pairs
        self._pool = pool
        self._seed = seed
        self._every_label: Ids | None = None
        if all_labels:
            self._every_label = np.arange(positives.num_columns)
            self._every_label.setflags(write=False)  # shared by all plans
        self.steps_per_epoch = -(-len(query_ids) // batch_size)
        """Batches per epoch, ceil(N / batch_size)."""
        self._set_mined(shortlists, clusters)

    def with_mined(
        self, shortlists: NDArray[np.int32] | None, clusters: NDArray[np.integer] | None
    ) -> Planner:
        """Returns a planner like this one with other `shortlists` and `clusters`."""
        planner = copy(self)
        planner._set_mined(shortlists, clusters)
        return planner

    def _set_mined(
        self, shortlists: NDArray[np.int32] | None, clusters: NDArray[np.integer] | None
    ) -> None:
        self._shortlists = shortlists
        num_queries, num_batches = len(self._query_ids), self.steps_per_epoch
        self._clustered_ids: Ids | None = None
        self._bounds = np.arange(num_batches + 1) * num_queries // num_batches
        if clusters is not None:
            assert clusters.shape == (num_queries,)
            sizes = np.bincount(clusters, minlength=num_batches)
            assert len(sizes) == num_batches
            assert sizes.max() - sizes.min() <= 1
            self._clustered_ids = self._query_ids[np.argsort(clusters, kind="stable")]
            self._bounds = np.concatenate([[0], np.cumsum(sizes)])
        self._shuffled: tuple[int, Ids] = (-1, self._query_ids)  # (epoch, its permutation)

    def plan(self, step: int) -> StepPlan:
        """Returns the plan of `step`; it does not depend on earlier calls. Thread-safe."""
        batch_B = self._batch(step)
        num_labels = self._positives.num_columns
        query_M, label_M = self._positives.take(batch_B)
        query_G, label_G = self._filter_pairs.take(batch_B)
        keys_M, keys_G = query_M * num_labels + label_M, query_G * num_labels + label_G

        drawn = self._draw_hard_negatives(step, batch_B, np.concatenate([keys_M, keys_G]))
        if len(keys_G):
            at_G, filtered_G = _find(keys_M, keys_G)
            effective_M = np.ones(len(keys_M), np.bool_)
            effective_M[at_G[filtered_G]] = False
            query_M, label_M = query_M[effective_M], label_M[effective_M]
        if self._every_label is None:
            sampled_M = self._sample_positives(step, batch_B, query_M, label_M)
            labels_P, pool_M, num_hard_negatives = self._choose(label_M, sampled_M, drawn)
        else:
            labels_P, pool_M, num_hard_negatives = self._every_label, label_M, 0

        paired_M = pool_M >= 0
        kept_B = np.zeros(len(batch_B), np.bool_)
        kept_B[query_M[paired_M]] = True
        row_B = np.cumsum(kept_B) - 1
        pool_G, in_pool_G = _find(labels_P, label_G)
        ignored_G = in_pool_G & kept_B[query_G]
        return StepPlan(
            step=step,
            epoch=step // self.steps_per_epoch,
            query_ids=batch_B[kept_B],
            label_ids=labels_P,
            positive_query=row_B[query_M[paired_M]],
            positive_pool=pool_M[paired_M],
            ignored_query=row_B[query_G[ignored_G]],
            ignored_pool=pool_G[ignored_G],
            num_dropped_queries=int(np.count_nonzero(~kept_B)),
            num_hard_negatives=num_hard_negatives,
        )

    def _batch(self, step: int) -> Ids:
        """Returns the query ids of `step`'s batch, ascending (so that reads go forward)."""
        assert step >= 0
        epoch, batch = divmod(step, self.steps_per_epoch)
        shuffled_epoch, order = self._shuffled
        if shuffled_epoch != epoch:
            ids = self._query_ids
            if self._clustered_ids is not None:
                ids = np.arange(self.steps_per_epoch)
            order = ids[np.argsort(hash64(self._seed, "batches", epoch, ids), kind="stable")]
            self._shuffled = (epoch, order)
        if self._clustered_ids is not None:
            batch, order = int(order[batch]), self._clustered_ids
        return np.sort(order[self._bounds[batch] : self._bounds[batch + 1]])

    def _sample_positives(self, step: int, batch_B: Ids, query_M: Ids, label_M: Ids) -> Mask:
        """Returns which positive pairs are sampled, bool [M]."""
        num_positives = self._pool.num_positives
        if num_positives == 0:
            return np.ones(len(query_M), np.bool_)
        sampled_M = np.zeros(len(query_M), np.bool_)
        counts_B = np.bincount(query_M, minlength=len(batch_B))
        starts_B = np.cumsum(counts_B) - counts_B
        if self._pool.with_replacement:
            draws = np.arange(num_positives)[:, None]
            share = uniform(self._seed, "positives", step, draws, batch_B)
            nth = starts_B + (share * counts_B).astype(np.int64)
            sampled_M[nth[:, counts_B > 0]] = True
        else:
            hash_M = hash64(self._seed, "positives", step, batch_B[query_M], label_M)
            # One sort by (query, hash): the query in the high bits, the hash in the others.
            bits = np.uint64(max(len(batch_B) - 1, 1).bit_length())
            packed_M = (query_M.astype(np.uint64) << (np.uint64(64) - bits)) | (hash_M >> bits)
            rank_M = np.arange(len(query_M)) - starts_B[query_M]
            sampled_M[np.argsort(packed_M)[rank_M < num_positives]] = True
        return sampled_M

    def _draw_hard_negatives(self, step: int, batch_B: Ids, barred_keys: Ids) -> Ids:
        """Returns the labels drawn by the batch's queries, once per query that drew them.

        Args:
            step: the step.
            batch_B: the batch's query ids.
            barred_keys: (batch position * L + label id) of the pairs not to draw.
        """
        num_drawn = self._pool.num_hard_negatives
        if self._shortlists is None or num_drawn == 0 or self._every_label is not None:
            return np.zeros(0, np.int64)
        labels_BK = self._shortlists[batch_B].astype(np.int64)
        keys_BK = np.arange(len(batch_B))[:, None] * self._positives.num_columns + labels_BK
        allowed_BK = (labels_BK >= 0) & ~_find(np.sort(barred_keys), keys_BK)[1]
        if num_drawn < labels_BK.shape[1]:
            hash_BK = hash64(self._seed, "hard negatives", step, batch_B[:, None], labels_BK)
            hash_BK[~allowed_BK] = np.iinfo(np.uint64).max
            nth = num_drawn - 1
            allowed_BK &= hash_BK <= np.partition(hash_BK, nth, axis=1)[:, nth : nth + 1]
        return labels_BK[allowed_BK]

    def _choose(self, label_M: Ids, sampled_M: Mask, drawn: Ids) -> tuple[Ids, Ids, int]:
        """Returns the pool [P], each positive pair's pool_index or -1 [M], and tier 2's share."""
        labels_U, inverse = np.unique(np.concatenate([label_M, drawn]), return_inverse=True)
        at_M, at_drawn = inverse[: len(label_M)], inverse[len(label_M) :]
        size = self._pool.size or len(labels_U)
        in_pool_U = np.zeros(len(labels_U), np.bool_)
        further_M = at_M if self._pool.fill_with_positives else at_M[:0]
        admitted: list[int] = []
        for chosen in (at_M[sampled_M], at_drawn, further_M):
            votes_U = np.bincount(chosen, minlength=len(labels_U))
            new = np.flatnonzero((votes_U > 0) & ~in_pool_U)
            room = size - sum(admitted)
            if len(new) > room:
                new = new[np.argsort(-votes_U[new], kind="stable")[:room]]
            in_pool_U[new] = True
            admitted.append(len(new))
        pool_U = np.where(in_pool_U, np.cumsum(in_pool_U) - 1, -1)
        return labels_U[in_pool_U], pool_U[at_M], admitted[1]


def _find(sorted_ids: Ids, ids: Ids) -> tuple[Ids, Mask]:
    """Returns where each id is in `sorted_ids` (ascending) and whether it is there at all."""
    if len(sorted_ids) == 0:
        return np.zeros(ids.shape, np.int64), np.zeros(ids.shape, np.bool_)
    at = np.minimum(np.searchsorted(sorted_ids, ids), len(sorted_ids) - 1)
    return at, sorted_ids[at] == ids
