"""Sets of (query, label) pairs in compressed sparse rows.

Positives and filter pairs of every split are `Pairs`. The arrays may be memory-mapped; `take`
reads only the rows it is asked for, so a step never touches the whole set.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ids = NDArray[np.int64]

_BLOCK_PAIRS = 1 << 20


def distinct(ids: Ids) -> Ids:
    """Returns the different values of `ids`, ascending.

    By sorting: `np.unique` hashes since NumPy 2.3, which takes 80 times as long for 360,000 keys.
    """
    ordered: Ids = np.sort(ids)
    first = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return ordered[first]


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
        keys = distinct(rows_M * num_columns + columns_M) if num_columns else rows_M[:0]
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
        counts = np.zeros(self.num_columns, np.int64)
        for start in range(0, self.num_pairs, _BLOCK_PAIRS):  # bincount makes int64 of its input
            block = self.indices[start : start + _BLOCK_PAIRS]
            counts += np.bincount(block, minlength=self.num_columns)
        return counts

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

    def row_blocks(self) -> Iterator[Ids]:
        """Yields the rows, ascending, in blocks of about a million pairs.

        A pass over them holds some 10 MB an array, and no copy of a mapped set.
        """
        num_blocks = 1 + self.num_pairs // _BLOCK_PAIRS
        starts = np.arange(1, num_blocks) * _BLOCK_PAIRS
        bounds = [0, *distinct(np.searchsorted(self.indptr, starts)).tolist(), self.num_rows]
        for first, end in itertools.pairwise(bounds):
            if end > first:
                yield np.arange(first, end)

    def row_counts_without(self, other: Pairs) -> Ids:
        """Returns how many pairs of every row are not in `other` (same shape), int64 [num_rows].

        Cost: a search of the rows that have a pair in `other`, block by block.
        """
        assert (self.num_rows, self.num_columns) == (other.num_rows, other.num_columns)
        counts = self.row_counts()
        for block in self.row_blocks() if other.num_pairs else ():
            rows = block[other.row_counts(block) > 0]
            mine_row, mine = self.take(rows)
            their_row, theirs = other.take(rows)
            shared = _contains(
                mine_row * self.num_columns + mine, their_row * self.num_columns + theirs
            )
            counts[rows] -= np.bincount(their_row[shared], minlength=len(rows))
        return counts

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


def _contains(ascending: Ids, wanted: Ids) -> NDArray[np.bool_]:
    """Returns which of `wanted` are in `ascending`."""
    if len(ascending) == 0:
        return np.zeros(len(wanted), np.bool_)
    at = np.minimum(np.searchsorted(ascending, wanted), len(ascending) - 1)
    found: NDArray[np.bool_] = ascending[at] == wanted
    return found
