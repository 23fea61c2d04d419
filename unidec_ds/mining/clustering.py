"""Exactly balanced clusters of similar queries: one cluster is one batch.

Called by `mining`; `data.pool` shuffles the clusters anew each epoch. The queries are split in two
again and again until a part is one cluster. A split is 2-means under the constraint that the left
side gets exactly its share: given two centroids, the best such assignment takes the rows with the
largest inner product with their difference (ties by position), and the centroids follow. As the
shares are proportional to the clusters to be made of them, any number of clusters comes out, with
sizes that differ by at most one.

All arithmetic on vectors is exact: they are rounded to multiples of 1/2048 and a split's direction
likewise, so that every product, sum and partial sum is an integer below 2^24 in units of their
product, which fp32 (and TF32 inputs) hold without rounding. Clusters therefore do not depend on
the number of threads, the matrix library or the device, and are the same at any world size.

Source: balanced 2-means trees are common in XMC (Parabel, Prabhu et al., WWW 2018), clusters as
batches are from NGAME (Dahiya et al., WSDM 2023); the exact arithmetic is ours.
Cost: O(N·D·log k) time: 217 s for 2.2M x 384 into 2,196 clusters on two busy cores
(`scripts/bench/clustering.py`); beside the vectors about 40 bytes a row and 4·(SAMPLE + 4096)·D
bytes (60 MiB at D = 768). No communication.

Letters: N rows to cluster, n rows of a part, S rows of its sample, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unidec_ds.data.keyed import hash64
from unidec_ds.data.pairs import Ids
from unidec_ds.search import fixed_blocks

SAMPLE = 16384
"""Rows of a part on which the direction of its split is found; all of its rows are then split."""

_SCALE = 2048
_BLOCK = 4096  # rows rounded at once when all rows of a part are split
_EXACT_ROWS = 2**24 // _SCALE  # so many rows sum up exactly in fp32
_MAX_ITERATIONS = 20
_CONVERGED = 1 / 512  # share of the rows that still change sides

Mask = NDArray[np.bool_]


@torch.no_grad()
def balanced_clusters(vectors_ND: Tensor, num_clusters: int, seed: int) -> NDArray[np.int32]:
    """Returns the cluster of each row, int32 [N]; sizes differ by at most one.

    Neighbouring cluster numbers share more of the tree, so they are similar too.

    Args:
        vectors_ND: float [N, D], L2-normalised, on any device; read in place.
        num_clusters: k, from 1 to N.
        seed: of the first guesses. The result is a pure function of the three arguments.

    Raises:
        FloatingPointError: a vector is not finite.
    """
    num_rows = len(vectors_ND)
    assert 1 <= num_clusters <= num_rows
    clusters_N = np.empty(num_rows, np.int32)
    parts = [(np.arange(num_rows), 0, num_clusters)]
    while parts:
        rows_n, first, count = parts.pop()
        if count == 1:
            clusters_N[rows_n] = first
            continue
        left_count = count // 2
        left_size = len(rows_n) * left_count // count
        # Where a part starts and how many clusters it holds names it.
        hash_n = hash64(seed, "clusters", first, count, rows_n)
        left_n = _split(vectors_ND, rows_n, hash_n, left_size)
        parts.append((rows_n[left_n], first, left_count))
        parts.append((rows_n[~left_n], first + left_count, count - left_count))
    return clusters_N


def _split(vectors_ND: Tensor, rows_n: Ids, hash_n: NDArray[np.uint64], left_size: int) -> Mask:
    """Returns which rows go left, bool [n], `left_size` of them true."""
    num_rows, sample_size = len(rows_n), min(len(rows_n), SAMPLE)
    sample = np.sort(np.argpartition(hash_n, sample_size - 1)[:sample_size])
    rows_SD = _rounded(vectors_ND, rows_n[sample])
    sample_left_size = left_size * sample_size // num_rows
    total_D = _sum(rows_SD, np.ones(sample_size, np.bool_))

    # First guess: a random row against the one least like it.
    seed_row = int(np.argmin(hash_n[sample]))
    least = int(np.argmin(_products(rows_SD, rows_SD[seed_row])))
    direction_D = _direction((rows_SD[seed_row] - rows_SD[least]).double().cpu().numpy())
    left_S = np.zeros(sample_size, np.bool_)
    for _ in range(_MAX_ITERATIONS):
        before_S = left_S
        left_S = _largest(_products(rows_SD, direction_D.to(rows_SD)), sample_left_size)
        if np.count_nonzero(left_S != before_S) <= _CONVERGED * sample_size:
            break
        left_D = _sum(rows_SD, left_S)
        right_D = (total_D - left_D) / (sample_size - sample_left_size)
        direction_D = _direction(left_D / sample_left_size - right_D)
    if sample_size == num_rows:
        return left_S
    products_n = np.empty(num_rows, np.float32)
    for start, stop in fixed_blocks(num_rows, _BLOCK):
        rows_nD = _rounded(vectors_ND, rows_n[start:stop])
        products_n[start:stop] = _products(rows_nD, direction_D.to(rows_nD))
    return _largest(products_n, left_size)


def _rounded(vectors_ND: Tensor, rows_n: Ids) -> Tensor:
    """Returns a copy of some rows, fp32 integers: multiples of 1/2048."""
    rows = torch.from_numpy(rows_n).to(vectors_ND.device)
    return vectors_ND.index_select(0, rows).float().mul_(_SCALE).round_()


def _direction(difference_D: NDArray[np.float64]) -> Tensor:
    """Returns a direction at length 2048, rounded to integers; zero for no direction."""
    norm = np.sqrt(np.square(difference_D).sum())  # summed by numpy itself: one thread, one order
    return torch.from_numpy(np.rint(difference_D * (_SCALE / norm if norm else 0.0)))


def _products(rows_nD: Tensor, direction_D: Tensor) -> NDArray[np.float32]:
    """Returns the inner product of each row with the direction, exact, on the host."""
    products: NDArray[np.float32] = torch.mv(rows_nD, direction_D).cpu().numpy()
    if not np.isfinite(products).all():
        raise FloatingPointError("a query's vector is not finite; nor are the weights it is from")
    return products


def _sum(rows_SD: Tensor, chosen_S: Mask) -> NDArray[np.float64]:
    """Returns the sum of the chosen rows, exact, float64 [D]."""
    weights_S = torch.from_numpy(chosen_S).to(rows_SD)
    sums = [
        torch.mv(rows_nD.T, weights_n)
        for rows_nD, weights_n in zip(
            rows_SD.split(_EXACT_ROWS), weights_S.split(_EXACT_ROWS), strict=True
        )
    ]
    total_D: NDArray[np.float64] = torch.stack(sums).double().sum(0).cpu().numpy()
    return total_D


def _largest(products_n: NDArray[np.float32], size: int) -> Mask:
    """Returns a mask of the `size` largest products, ties to the first."""
    bar = np.partition(products_n, -size)[-size]
    chosen_n: Mask = products_n > bar
    ties = np.flatnonzero(products_n == bar)
    chosen_n[ties[: size - np.count_nonzero(chosen_n)]] = True
    return chosen_n
