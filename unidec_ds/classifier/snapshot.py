"""The table as it was at one moment, read in blocks while steps go on changing it: copy on write.

Before a step overwrites rows, `preserve` copies those of them that are not read yet; a block that
is read has the preserved rows laid over it. Only the two copies exclude each other: a row that
changes while its block is being copied was preserved before, so whatever the copy caught of it is
replaced. A step waits for one block's copy at most.

Memory: one block, and each row that steps touched before it was read, once (2·D to 12·D bytes).

Letters: n rows of one step, C values per label in a column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK_BYTES = 8 << 20


class Snapshot:
    """The columns of a table as they are when it is made; to be read once, by one other thread.

    Args:
        columns: [rows of this rank, C] each, on the host; they go on changing.
        extra: small tensors that belong to the state; copied.
    """

    def __init__(self, columns: Mapping[str, Tensor], extra: Mapping[str, Tensor]) -> None:
        self._columns = dict(columns)
        self._extra = {name: tensor.clone() for name, tensor in extra.items()}
        self._lock = Lock()
        self._unread = list(columns)  # names; the first is being read
        num_rows = len(next(iter(columns.values())))
        self._is_preserved = np.zeros(num_rows, np.bool_)
        self._preserved: list[tuple[NDArray[np.int64], dict[str, Tensor]]] = []

    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Returns dtype and shape of every tensor, in the order in which `read` gives them."""
        tensors = {**self._columns, **self._extra}
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def preserve(self, index: Tensor) -> None:
        """Keeps rows that are about to change. For the thread that changes them.

        Args:
            index: int64 [n], which rows, ascending, without repetition.
        """
        with self._lock:
            if not self._unread:
                return
            rows = index.numpy()
            rows = rows[~self._is_preserved[rows]]
            if not len(rows):
                return
            self._is_preserved[rows] = True
            places = torch.from_numpy(rows)
            kept = {name: self._columns[name].index_select(0, places) for name in self._unread}
            self._preserved.append((rows, kept))

    def read(self) -> Iterator[Tensor]:
        """Yields every tensor's rows in blocks, as they were when the snapshot was made."""
        for name, column in self._columns.items():
            row_bytes = max(1, column.shape[1] * column.element_size())
            step = max(1, _BLOCK_BYTES // row_bytes)
            for start in range(0, len(column), step):
                yield self._read_block(name, start, min(start + step, len(column)))
            with self._lock:
                self._unread.remove(name)
                for _, kept in self._preserved:
                    kept.pop(name, None)
        with self._lock:
            self._preserved.clear()
        yield from self._extra.values()

    def _read_block(self, name: str, start: int, end: int) -> Tensor:
        with self._lock:
            block = self._columns[name][start:end].clone()
            for rows, kept in self._preserved:
                inside = slice(*np.searchsorted(rows, (start, end)).tolist())
                places = torch.from_numpy(rows[inside] - start)
                block.index_copy_(0, places, kept[name][inside])
            return block
