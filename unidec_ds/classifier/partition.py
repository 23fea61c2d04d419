"""Which rank holds which label: label_id <-> (owner rank, local_row). Pure integers.

Labels are dealt out in turn: `owner = label_id % W`, `local_row = label_id // W`. Every rank holds
the same number of rows, give or take one, and no index has to be stored or communicated.

Shape legend: L labels, W ranks, n ids of one call.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


def owner(label_ids: Ids, world_size: int) -> Ids:
    """Returns the rank that owns each label, int64 [n] in 0..W-1."""
    return label_ids % world_size


def local_row(label_ids: Ids, world_size: int) -> Ids:
    """Returns each label's row in its owner's shard, int64 [n]."""
    return label_ids // world_size


def label_ids(local_rows: Ids, rank: int, world_size: int) -> Ids:
    """Returns the labels that `rank` holds in the given rows, int64 [n]; inverts `local_row`."""
    return local_rows * world_size + rank


def num_local_rows(num_labels: int, rank: int, world_size: int) -> int:
    """Returns how many of the labels 0..L-1 `rank` owns (0 where there are more ranks)."""
    return (num_labels - rank + world_size - 1) // world_size


def owned(label_ids: Ids, rank: int, world_size: int) -> Ids:
    """Returns those of `label_ids` that `rank` owns, in the given order."""
    mine: Ids = label_ids[label_ids % world_size == rank]
    return mine
