"""Reads sparse matrices and pair lists as XMC sets publish them, row by row.

Positives (and other programs' predictions) come as sparse text, `rows cols` in the first line and
then a line of `label:value` entries per row, or as a CSR matrix that `scipy.sparse.save_npz`
wrote. Filter pairs come as lines of `row col`. All numbers count from 0. Matrices are streamed:
memory does not grow with the file.
"""

from __future__ import annotations

import array
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unidec_ds.data.files import read_lines, shorten
from unidec_ds.data.pairs import Ids
from unidec_ds.errors import CorpusError

_ROWS_AT_ONCE = 4096
_HOW_TO_SAVE = "Save it with `scipy.sparse.save_npz(path, matrix.tocsr())`."


class MatrixRow(NamedTuple):
    """One row of a sparse matrix file; `line` is its line (of an npz file, its row from 1)."""

    line: int
    columns: list[int]
    values: list[float]


class SparseMatrixFile:
    """A sparse matrix file whose shape is known and whose rows can be iterated over, once or more.

    Args:
        path: sparse text (gzipped or not) or, if named so, an .npz file.

    Raises:
        CorpusError: here, if the shape cannot be read; while iterating, at a malformed row, a
            column out of range, or if the file holds more or fewer rows than it announces.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._npz = path.suffix == ".npz"
        self.num_rows, self.num_columns = self._npz_shape() if self._npz else self._header()

    def __iter__(self) -> Iterator[MatrixRow]:
        """Yields the rows in order."""
        for row in self._npz_rows() if self._npz else self._text_rows():
            check_range(row.columns, self.num_columns, self.path, row.line)
            yield row

    def _header(self) -> tuple[int, int]:
        _, header = next(read_lines(self.path), (1, ""))
        try:
            num_rows, num_columns = (int(field) for field in header.split())
        except ValueError:
            raise CorpusError(
                f"{self.path}:1: found {shorten(header)}, needed the header `rows cols`, two "
                "integers."
            ) from None
        return num_rows, num_columns

    def _text_rows(self) -> Iterator[MatrixRow]:
        count = 0
        for line, text in read_lines(self.path):
            entries = text.split()
            if line == 1 or (count == self.num_rows and not entries):
                continue
            if count == self.num_rows:
                raise CorpusError(
                    f"{self.path}:{line}: a row more than the {self.num_rows} that the header in "
                    "line 1 announces. Correct the header or remove the row."
                )
            count += 1
            columns, values = [], []
            for entry in entries:
                column, _, value = entry.partition(":")
                try:
                    columns.append(int(column))
                    values.append(float(value))
                except ValueError:
                    raise CorpusError(
                        f"{self.path}:{line}: found {shorten(entry)}, needed entries "
                        "`label:value`, an integer and a number."
                    ) from None
            yield MatrixRow(line, columns, values)
        if count < self.num_rows:
            raise CorpusError(
                f"{self.path}:1: the header announces {self.num_rows} rows, the file holds "
                f"{count}. Is the file cut short?"
            )

    def _npz_shape(self) -> tuple[int, int]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                kind = np.load(archive.open("format.npy")).item().decode()
                num_rows, num_columns = (int(n) for n in np.load(archive.open("shape.npy")))
        except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError) as error:
            raise self._not_a_matrix(error) from None
        if kind != "csr":
            raise CorpusError(f"{self.path}: a matrix in {kind} form, needed csr. {_HOW_TO_SAVE}")
        return num_rows, num_columns

    def _npz_rows(self) -> Iterator[MatrixRow]:
        """Streams the three arrays of the archive side by side."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                indptr, indices, data = (
                    _NpyStream(archive, name) for name in ("indptr", "indices", "data")
                )
                end = int(indptr.read(1)[0])
                for first in range(0, self.num_rows, _ROWS_AT_ONCE):
                    ends = indptr.read(min(_ROWS_AT_ONCE, self.num_rows - first)).astype(np.int64)
                    bounds = np.concatenate([[end], ends]) - end
                    if (np.diff(bounds) < 0).any():
                        raise ValueError("indptr descends")
                    columns, values = indices.read(int(bounds[-1])), data.read(int(bounds[-1]))
                    end = int(ends[-1])
                    for row in range(len(ends)):
                        part = slice(bounds[row], bounds[row + 1])
                        yield MatrixRow(
                            first + row + 1, columns[part].tolist(), values[part].tolist()
                        )
        except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError) as error:
            raise self._not_a_matrix(error) from None

    def _not_a_matrix(self, error: Exception) -> CorpusError:
        return CorpusError(f"{self.path}: not a scipy sparse matrix ({error}). {_HOW_TO_SAVE}")


class _NpyStream:
    """Reads a vector inside an npz archive piece by piece."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self._stream = archive.open(f"{name}.npy")
        if np.lib.format.read_magic(self._stream) == (1, 0):
            shape, _, self._dtype = np.lib.format.read_array_header_1_0(self._stream)
        else:
            shape, _, self._dtype = np.lib.format.read_array_header_2_0(self._stream)
        if len(shape) != 1 or self._dtype.hasobject:
            raise ValueError(f"{name} is not a vector of numbers")
        self._left = shape[0]

    def read(self, count: int) -> NDArray[Any]:
        """Returns the next `count` elements."""
        self._left -= count
        if self._left < 0:
            raise ValueError("an array is shorter than the matrix needs")
        return np.frombuffer(self._stream.read(count * self._dtype.itemsize), self._dtype)


def read_pairs(path: Path, num_rows: int, num_columns: int) -> tuple[Ids, Ids]:
    """Returns the pairs of a file of `row col` lines (rows, columns), in file order.

    Memory: 16 bytes a pair (a filter file has about one pair a query).

    Raises:
        CorpusError: a line that is not two integers, or one out of range.
    """
    rows, columns = array.array("q"), array.array("q")
    for line, text in read_lines(path):
        fields = text.split()
        if not fields:
            continue
        try:
            row, column = (int(field) for field in fields)
        except ValueError:
            raise CorpusError(
                f"{path}:{line}: found {shorten(text)}, needed two integers, a query's row and a "
                "label's row, both counted from 0."
            ) from None
        check_range([row], num_rows, path, line, "query row")
        check_range([column], num_columns, path, line)
        rows.append(row)
        columns.append(column)
    return np.array(rows, np.int64), np.array(columns, np.int64)


def check_range(
    ids: Sequence[int], count: int, path: Path, line: int, what: str = "label id"
) -> None:
    """Raises CorpusError unless all of `ids` are in 0..count-1."""
    for value in (min(ids), max(ids)) if ids else ():
        if not 0 <= value < count:
            raise CorpusError(
                f"{path}:{line}: {what} {value} is out of range, 0 to {count - 1} was needed. "
                "Do the files belong to the same corpus and split?"
            )
