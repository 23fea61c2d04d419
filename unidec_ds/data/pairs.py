"""Sets of (query, label) pairs in compressed sparse rows.

Positives and filter pairs of every split are `Pairs`. The arrays may be memory-mapped; `take`
reads only the rows it is asked for, so a step never touches the whole set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Pairs:
    """A set of (row, column) pairs; columns ascend within a row and do not repeat.

    Args:
        indptr: int64 [num_rows + 1], `indices[indptr[i]:indptr[i + 1]]` are row i's columns.
        indices: int32 [num_pairs].
        num_columns: number of columns, one more than the largest that may occur.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    num_columns: int

    @classmethod
    def from_pairs(
        cls, rows: ArrayLike, columns: ArrayLike, num_rows: int, num_columns: int
    ) -> Pairs:
        """Builds the set from pair lists in any order; repeated pairs are kept once."""
        rows_M, columns_M = np.asarray(rows, np.int64), np.asarray(columns, np.int64)
        assert rows_M.shape == columns_M.shape
        keys = np.unique(rows_M * num_columns + columns_M) if num_columns else rows_M[:0]
        indptr = np.zeros(num_rows + 1, np.int64)
        np.cumsum(np.bincount(keys // max(num_columns, 1), minlength=num_rows), out=indptr[1:])
        return cls(indptr, (keys % max(num_columns, 1)).astype(np.int32), num_columns)

    @classmethod
    def empty(cls, num_rows: int, num_columns: int) -> Pairs:
        """Returns the set without a pair."""
        return cls(np.zeros(num_rows + 1, np.int64), np.zeros(0, np.int32), num_columns)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    @property
    def num_pairs(self) -> int:
        """Number of pairs."""
        return int(self.indptr[-1])

    def row(self, i: int) -> NDArray[np.int32]:
        """Returns row i's columns, ascending."""
        return self.indices[self.indptr[i] : self.indptr[i + 1]]

    def row_counts(self, rows: Ids | None = None) -> Ids:
        """Returns the number of pairs of each of `rows` (default: of every row)."""
        if rows is None:
            return np.diff(self.indptr)
        return self.indptr[rows + 1] - self.indptr[rows]

    def column_counts(self) -> Ids:
        """Returns the number of pairs of every column, int64 [num_columns]."""
        return np.bincount(self.indices, minlength=self.num_columns)

    def take(self, rows: Ids) -> tuple[Ids, Ids]:
        """Returns the pairs of `rows` as (position in `rows`, column), both int64, in row order."""
        counts = self.row_counts(rows)
        position = np.repeat(np.arange(len(rows)), counts)
        ends = np.cumsum(counts)
        flat = np.arange(len(position)) + np.repeat(self.indptr[rows] - ends + counts, counts)
        return position, self.indices[flat].astype(np.int64)

    def rows_of_pairs(self) -> Ids:
        """Returns the row of every pair, int64 [num_pairs]."""
        return np.repeat(np.arange(self.num_rows), self.row_counts())

    def without(self, other: Pairs) -> Pairs:
        """Returns the pairs of this set that are not in `other` (same shape)."""
        assert (self.num_rows, self.num_columns) == (other.num_rows, other.num_columns)
        if other.num_pairs == 0:
            return self
        rows = self.rows_of_pairs()
        mine = rows * self.num_columns + self.indices
        theirs = other.rows_of_pairs() * self.num_columns + other.indices
        keep = ~np.isin(mine, theirs, assume_unique=True)
        return Pairs.from_pairs(rows[keep], self.indices[keep], self.num_rows, self.num_columns)

    def save(self, folder: Path, name: str) -> None:
        """Writes `<name>.indptr.npy` and `<name>.indices.npy` into `folder`."""
        np.save(folder / f"{name}.indptr.npy", self.indptr)
        np.save(folder / f"{name}.indices.npy", self.indices)

    @classmethod
    def open(cls, folder: Path, name: str, num_columns: int) -> Pairs:
        """Opens memory-mapped what `save` wrote."""
        return cls(
            np.load(folder / f"{name}.indptr.npy", mmap_mode="r"),
            np.load(folder / f"{name}.indices.npy", mmap_mode="r"),
            num_columns,
        )
