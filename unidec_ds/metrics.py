"""Ranking metrics of extreme classification, in percent, on predicted label ids.

Pure numpy; the last step of an evaluation, and all of `unidec-ds score`. Predictions are
`predicted_ids_NK`: int64, best first, -1 where a query has fewer than K; a query's truth is its
row of a `Pairs`. T_i is the number of query i's true labels, q_l the inverse propensity of label l.

| name | value at k |
|---|---|
| P | correct predictions among the first k, divided by k always; mean over all queries |
| nDCG | Σ_correct 1/log2(rank + 1), divided by the ideal of min(k, T_i); mean over all queries |
| PSP | Σ q of the correct predictions over Σ q of the best k true labels, a ratio of means |
| PSnDCG | as PSP with each q times its discount and divided by the query's ideal |
| R | share of the query's true labels found; mean over the queries that have truth (macro) |
| coverage | share of the labels that occur in truth which are correctly predicted at least once |

A query without truth counts 0 in P and nDCG and is no part of R. A missing prediction is a miss.
A label that is predicted twice for a query counts at its first place only.

Sources: P, nDCG, PSP and PSnDCG as in the XMC repository's pyxclib (Bhatia et al., 2016);
propensities: Jain et al., "Extreme Multi-label Loss Functions", KDD 2016, section 4.
Cost: M·K comparisons for M true pairs; working memory below 0.3 GB beyond 50 bytes per true pair.

Letters: N queries, K predictions per query, L labels, M true pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidec_ds.data.pairs import Ids, Pairs

KS = (1, 3, 5, 10, 100)
"""Cut-offs that are reported unless told otherwise."""

_NOT_FOUND = np.iinfo(np.int32).max
_BLOCK_ENTRIES = 1 << 24  # entries of one block of comparisons: bounds the working memory


def inverse_propensity(train: Pairs, a: float, b: float) -> NDArray[np.float64]:
    """Returns q_l = 1 + C (N_l + b)^-a with C = (ln N - 1)(b + 1)^a, float64 [L].

    N is the number of train queries and N_l the number of train positives of label l, so a label
    with one positive has q_l = ln N.

    Args:
        train: all train positives, before any validation split.
        a: exponent; 0.6 for Amazon sets, 0.5 for Wikipedia-500K, 0.55 otherwise.
        b: offset > 0; 2.6, 0.4 and 1.5 for the same.
    """
    assert train.num_rows > 0
    assert b > 0
    c = (math.log(train.num_rows) - 1) * (b + 1) ** a
    return np.asarray(1 + c * (train.column_counts() + b) ** -a, np.float64)


def ranks_of_truth(truth: Pairs, predicted_ids_NK: Ids) -> Ids:
    """Returns for every true pair the 0-based place of its label among the query's predictions.

    Returns:
        int64 [M] in the order of `truth`; the largest int32 where the label is not predicted.
    """
    assert predicted_ids_NK.shape[0] == truth.num_rows
    num_predicted = predicted_ids_NK.shape[1]
    rows_M, ranks_M = truth.rows_of_pairs(), np.full(truth.num_pairs, _NOT_FOUND, np.int64)
    step = max(1, _BLOCK_ENTRIES // max(1, num_predicted))
    for start in range(0, truth.num_pairs if num_predicted else 0, step):
        block = slice(start, start + step)
        is_hit = predicted_ids_NK[rows_M[block]] == truth.indices[block, None]
        place = is_hit.argmax(axis=1)
        found = is_hit[np.arange(len(place)), place]
        ranks_M[block][found] = place[found]
    return ranks_M


def score_predictions(
    truth: Pairs,
    predicted_ids_NK: Ids,
    *,
    inverse_propensity: NDArray[np.float64],
    ks: Sequence[int] = KS,
) -> dict[str, float]:
    """Returns every metric at every k, in percent: "P@1", "nDCG@5", "PSP@5", "R@100", ...

    Args:
        truth: true labels of the N queries.
        predicted_ids_NK: int64 [N, K], best first, -1 for none; filter pairs already removed.
        inverse_propensity: float64 [L] of `inverse_propensity`.
        ks: cut-offs; one above K counts the predictions that are missing as misses.
    """
    assert len(inverse_propensity) == truth.num_columns
    counts_N, rows_M, labels_M = truth.row_counts(), truth.rows_of_pairs(), truth.indices
    ranks_M, weights_M = ranks_of_truth(truth, predicted_ids_NK), inverse_propensity[labels_M]
    # The best ranking a system could give: each query's true labels by falling weight.
    best_order_M = np.lexsort((-weights_M, rows_M))
    best_ranks_M = np.arange(truth.num_pairs) - truth.indptr[rows_M]  # aligned with best_order_M
    best_weights_M = weights_M[best_order_M]
    gains_M, best_gains_M = 1 / np.log2(ranks_M + 2.0), 1 / np.log2(best_ranks_M + 2.0)
    ideal = np.concatenate(([0.0], np.cumsum(1 / np.log2(np.arange(max(ks)) + 2.0))))
    num_occurring = len(np.unique(labels_M))
    names = ("P", "nDCG", "PSP", "PSnDCG", "R", "coverage")
    scores: dict[str, dict[int, float]] = {name: {} for name in names}
    for k in ks:
        hit_M, best_M = ranks_M < k, best_ranks_M < k
        # Each pair's gain over its query's ideal; a query's pairs are contiguous in both orders.
        ideal_M = ideal[np.minimum(counts_N, k)][rows_M]
        share_M, best_share_M = hit_M * gains_M / ideal_M, best_M * best_gains_M / ideal_M
        scores["P"][k] = _percent(hit_M.sum(), truth.num_rows * k)
        scores["nDCG"][k] = _percent(share_M.sum(), truth.num_rows)
        scores["PSP"][k] = _percent(weights_M @ hit_M, best_weights_M @ best_M)
        scores["PSnDCG"][k] = _percent(weights_M @ share_M, best_weights_M @ best_share_M)
        scores["R"][k] = _percent((hit_M / counts_N[rows_M]).sum(), np.count_nonzero(counts_N))
        scores["coverage"][k] = _percent(len(np.unique(labels_M[hit_M])), num_occurring)
    return {f"{name}@{k}": value for name, at_k in scores.items() for k, value in at_k.items()}


@dataclass(frozen=True)
class FrequencyBin:
    """The part of the scores that is due to the labels of one range of train frequency."""

    name: str
    """"head", "torso" or "tail"."""
    min_count: int
    """Fewest train positives of a label in this bin (0 for an empty bin)."""
    max_count: int
    """Most train positives of a label in this bin (0 for an empty bin)."""
    num_labels: int
    """Labels in this bin."""
    num_truth_pairs: int
    """True pairs whose label is in this bin."""
    scores: dict[str, float]
    """"P@k": this bin's part of P@k, the three parts sum to P@k; "R@k": percent of this bin's true
    pairs found among the first k (micro average)."""


def frequency_breakdown(
    truth: Pairs, predicted_ids_NK: Ids, *, train_counts: Ids, ks: Sequence[int] = KS
) -> list[FrequencyBin]:
    """Returns what frequent, middling and rare labels contribute: [head, torso, tail].

    The bins are thirds of the *train positives*, not of the labels: with labels sorted by falling
    train count, head holds the few labels that carry the first third of the positives. Labels of
    equal count share a bin (the one that the middle of their positives falls in), so the bins are
    as equal as the counts allow. Labels without a train positive are tail.

    Args:
        truth: true labels of the N queries.
        predicted_ids_NK: int64 [N, K], best first, -1 for none.
        train_counts: int64 [L], train positives per label (`Pairs.column_counts`).
        ks: cut-offs.
    """
    assert len(train_counts) == truth.num_columns
    values, labels_per_value = np.unique(train_counts, return_counts=True)
    positives = (values * labels_per_value)[::-1]  # per distinct count, most frequent first
    middle = (np.cumsum(positives) - positives / 2) / max(1, positives.sum())
    bin_of_value = np.where(values == 0, 2, np.minimum(2, (3 * middle).astype(int))[::-1])
    bin_of_label = bin_of_value[np.searchsorted(values, train_counts)]

    ranks_M = ranks_of_truth(truth, predicted_ids_NK)
    bin_of_pair = bin_of_label[truth.indices]
    bins = []
    for index, name in enumerate(("head", "torso", "tail")):
        counts, ranks = train_counts[bin_of_label == index], ranks_M[bin_of_pair == index]
        hits = {k: np.count_nonzero(ranks < k) for k in ks}
        scores = {f"P@{k}": _percent(hits[k], truth.num_rows * k) for k in ks}
        scores |= {f"R@{k}": _percent(hits[k], len(ranks)) for k in ks}
        bounds = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
        bins.append(FrequencyBin(name, *bounds, len(counts), len(ranks), scores))
    return bins


def _percent(part: Any, whole: Any) -> float:
    return 100 * float(part) / float(whole) if whole else 0.0
