"""The labels that an export holds: the run's own and, after them, new ones.

A new label's score is an inner product plus an offset (`serving.new_labels`), which no index knows.
Where new labels have one, every vector gets a last column with what to add, 0 for the run's own
labels, and a query has a 1 there: the inner product is then the score.

Shape legend: n labels of a block, L labels in all, V width of a vector, the last column included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unidec_ds.data.corpus import Corpus
from unidec_ds.search import fixed_blocks
from unidec_ds.serving.label_vectors import LabelVectors
from unidec_ds.serving.new_labels import NewLabels

_BLOCK = 16384  # labels read and written at once


@dataclass(frozen=True)
class ExportLabels:
    """What an export says of labels; row = label id."""

    corpus: Corpus
    own: LabelVectors
    new: NewLabels | None = None

    @property
    def num_new(self) -> int:
        """Number of labels that the run does not have."""
        return len(self.new.uids) if self.new is not None else 0

    @property
    def has_offset(self) -> bool:
        """Whether vectors end in what to add to the score, so that queries need a 1 there."""
        return self.new is not None and self.num_new > 0 and self.new.offset != 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """(L, V)."""
        num_own, width = self.own.vectors_LV.shape
        return num_own + self.num_new, width + self.has_offset

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yields all vectors in order, fp32 [n, V]."""
        parts = [(self.own.vectors_LV, 0.0)]
        if self.new is not None and self.num_new:
            parts.append((self.new.vectors_nV.cpu().numpy(), self.new.offset))
        for vectors, offset in parts:
            for start, end in fixed_blocks(len(vectors), _BLOCK):
                block_nV = np.asarray(vectors[start:end])
                if self.has_offset:
                    block_nV = np.pad(block_nV, ((0, 0), (0, 1)), constant_values=offset)
                yield block_nV

    def array(self, scratch: Path) -> NDArray[np.float32]:
        """Returns all vectors, mapped: the run's own file, or one written to `scratch`."""
        if not self.num_new:
            return self.own.vectors_LV
        vectors_LV = np.lib.format.open_memmap(scratch, "w+", np.float32, self.shape)
        start = 0
        for block_nV in self.blocks():
            vectors_LV[start : start + len(block_nV)] = block_nV
            start += len(block_nV)
        return vectors_LV

    def names(self) -> Iterator[tuple[NDArray[np.int64], list[str], list[str]]]:
        """Yields ids, uids and texts of all labels in order."""
        for start, end in fixed_blocks(self.corpus.num_labels, _BLOCK):
            ids = np.arange(start, end)
            yield ids, self.corpus.labels.uids(ids), self.corpus.labels.texts(ids)
        if self.new is not None and self.num_new:
            ids = self.new.first_id + np.arange(self.num_new)
            yield ids, self.new.uids, self.new.texts
