"""Uids of many records as digests: looked up without a dictionary of a million strings.

16 bytes a uid, however long it is; look-ups are a binary search over all of them at once. Corpora
resolve targets given by uid with it, and warm starts match the labels of two runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unidec_ds.data.pairs import Ids


class UidDigests:
    """The uids of one table, in row order, as digests: 16 bytes each, however long they are.

    Two different uids have the same digest with a chance below 1e-20 at a billion uids.
    """

    def __init__(self) -> None:
        self._parts: list[NDArray[np.bytes_]] = []
        self._sorted: tuple[NDArray[np.bytes_], Ids] | None = None

    def add(self, uids: Iterable[str]) -> None:
        """Appends rows."""
        self._parts.append(_digests(uids))

    def num_repeated(self) -> int:
        """Returns how many rows hold a uid that an earlier row holds."""
        digests, _ = self._in_order()
        return int((digests[1:] == digests[:-1]).sum())

    def rows(self, uids: Iterable[str]) -> Ids:
        """Returns the first row of each uid, -1 where there is none."""
        digests, rows = self._in_order()
        wanted = _digests(uids)
        at = np.minimum(np.searchsorted(digests, wanted), len(digests) - 1)
        return np.where(digests[at] == wanted, rows[at], -1)

    def rows_in(self, other: UidDigests) -> Ids:
        """Returns for each row the row of `other` with the same uid, -1 where there is none.

        A uid that repeats is matched in row order: its second row with its second row there.
        """
        (mine, rows), (theirs, their_rows) = self._in_order(), other._in_order()
        occurrence = np.arange(len(mine)) - np.searchsorted(mine, mine)
        at = np.searchsorted(theirs, mine) + occurrence
        same = np.flatnonzero(at < len(theirs))
        same = same[theirs[at[same]] == mine[same]]
        found = np.full(len(mine), -1)
        found[rows[same]] = their_rows[at[same]]
        return found

    def save(self, path: Path) -> None:
        """Writes the digests in row order, S16 [rows], for `open`."""
        digests, rows = self._in_order()
        in_row_order = np.empty_like(digests)
        in_row_order[rows] = digests
        np.save(path, in_row_order)

    @classmethod
    def open(cls, path: Path) -> UidDigests:
        """Reads what `save` wrote."""
        digests = cls()
        digests._parts.append(np.load(path))
        return digests

    def __len__(self) -> int:
        return len(self._in_order()[0])

    def _in_order(self) -> tuple[NDArray[np.bytes_], Ids]:
        """Returns the digests in ascending order and their rows, the first of equals first."""
        if self._sorted is None:
            digests = np.concatenate([_digests(()), *self._parts])
            rows = np.argsort(digests, kind="stable")
            self._sorted = digests[rows], rows
            self._parts = []
        return self._sorted


def _digests(uids: Iterable[str]) -> NDArray[np.bytes_]:
    joined = b"".join(blake2b(uid.encode(), digest_size=16).digest() for uid in uids)
    return np.frombuffer(joined, "S16")
