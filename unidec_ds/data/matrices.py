"""Reads sparse matrices and pair lists as XMC sets publish them, row by row.

Positives (and other programs' predictions) come as sparse text, `rows cols` in the first line and
then a line of `label:value` entries per row, or as a CSR matrix that `scipy.sparse.save_npz`
wrote. Filter pairs come as lines of `row col`. All numbers count from 0. Matrices are streamed:
memory does not grow with the file.
"""

from __future__ import annotations

import array
import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unidec_ds.data.files import LineError, OnFault, decode_line, raw_lines, refuse, shorten
from unidec_ds.data.pairs import Ids
from unidec_ds.errors import CorpusError, UserError

MAX_COLUMNS = (1 << 31) - 1
"""Label ids are stored in 32 bits."""

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
        """Yields the rows in order; the first bad one raises."""
        return (row for row in self.rows(refuse) if row is not None)

    @property
    def has_header(self) -> bool:
        """Whether the rows begin in line 2 of the file."""
        return not self._npz

    def rows(self, on_fault: OnFault) -> Iterator[MatrixRow | None]:
        """Yields the rows in order, None in place of one that `on_fault` was told of."""
        for row in self._npz_rows() if self._npz else self._text_rows(on_fault):
            if row is None:
                yield None
                continue
            try:
                check_range(row.columns, self.num_columns, self.path, row.line)
                _refuse_nan(row, self.path)
            except LineError as fault:
                entries = zip(row.columns, row.values, strict=True)
                fault.text = " ".join(f"{column}:{value}" for column, value in entries)
                on_fault(fault)
                yield None
            else:
                yield row

    def _header(self) -> tuple[int, int]:
        _, raw = next(raw_lines(self.path), (1, b""))
        header = raw.decode("utf-8", "backslashreplace")  # what is not ASCII is refused below
        try:
            num_rows, num_columns = _integers(header)
            if num_rows < 0 or not 0 <= num_columns <= MAX_COLUMNS:
                raise ValueError
        except ValueError:
            raise CorpusError(
                f"{self.path}:1: found {shorten(header)}, needed the header `rows cols`, two "
                f"integers, neither below 0, columns not above {MAX_COLUMNS}."
            ) from None
        return num_rows, num_columns

    def _text_rows(self, on_fault: OnFault) -> Iterator[MatrixRow | None]:
        count = 0
        for line, raw in raw_lines(self.path):
            if line == 1 or (count == self.num_rows and not raw.strip()):
                continue
            if count == self.num_rows:
                raise CorpusError(
                    f"{self.path}:{line}: a row more than the {self.num_rows} that the header in "
                    "line 1 announces. Correct the header or remove the row."
                )
            count += 1
            try:
                row = self._parse(raw, line)
            except LineError as fault:
                on_fault(fault)
                yield None
            else:
                yield row
        if count < self.num_rows:
            raise CorpusError(
                f"{self.path}:1: the header announces {self.num_rows} rows, the file holds "
                f"{count}. Is the file cut short?"
            )

    def _parse(self, raw: bytes, line: int) -> MatrixRow:
        """Returns the row of a line of sparse text."""
        text = decode_line(raw, self.path, line)
        columns, values = [], []
        for entry in text.split():
            column, _, value = entry.partition(":")
            try:
                columns.append(int(column))
                values.append(float(value))
            except ValueError:
                raise self._not_an_entry(entry, line, text) from None
        if _is_written_oddly(text):
            odd = next((entry for entry in text.split() if _is_written_oddly(entry)), text)
            raise self._not_an_entry(odd, line, text)
        return MatrixRow(line, columns, values)

    def _not_an_entry(self, entry: str, line: int, text: str) -> LineError:
        reason = f"found {shorten(entry)}, needed entries `label:value`, an integer and a number."
        return LineError(self.path, line, reason, text)

    def _npz_shape(self) -> tuple[int, int]:
        with self._reading_npz(), self.path.open("rb") as file, zipfile.ZipFile(file) as archive:
            file.seek(0)
            if file.read(2) != b"PK":  # zipfile passes over anything in front, scipy does not
                raise ValueError("it does not begin as a zip file")
            kind = _NpyStream(archive, "format").string().decode()
            if kind == "csr":
                numbers = _NpyStream(archive, "shape", of="iu")
                if numbers.length != 2:
                    raise ValueError(f"its shape has {numbers.length} numbers")
                num_rows, num_columns = (int(n) for n in numbers.read(2))
        if kind != "csr":
            raise CorpusError(f"{self.path}:1: a matrix in {kind} form, needed csr. {_HOW_TO_SAVE}")
        if num_rows < 0 or not 0 <= num_columns <= MAX_COLUMNS:
            raise CorpusError(
                f"{self.path}:1: a matrix of {num_rows} rows and {num_columns} columns; neither "
                f"may be below 0, nor may there be more than {MAX_COLUMNS} columns."
            )
        return num_rows, num_columns

    def _npz_rows(self) -> Iterator[MatrixRow]:
        """Streams the three arrays of the archive side by side."""
        with self._reading_npz(), zipfile.ZipFile(self.path) as archive:
            indptr, indices = (_NpyStream(archive, name, of="iu") for name in ("indptr", "indices"))
            data = _NpyStream(archive, "data", of="biuf")
            if indptr.length != self.num_rows + 1 or indices.length != data.length:
                raise ValueError(
                    f"{self.num_rows} rows with {indptr.length} bounds, {indices.length} indices "
                    f"and {data.length} values"
                )
            end = int(indptr.read(1)[0])
            if end != 0:
                raise ValueError(f"indptr begins at {end}")
            for first in range(0, self.num_rows, _ROWS_AT_ONCE):
                ends = indptr.read(min(_ROWS_AT_ONCE, self.num_rows - first)).astype(np.int64)
                bounds = np.concatenate([[end], ends])
                if (bounds[1:] < bounds[:-1]).any():
                    raise ValueError("indptr descends")
                bounds -= end
                columns, values = indices.read(int(bounds[-1])), data.read(int(bounds[-1]))
                end = int(ends[-1])
                for row in range(len(ends)):
                    part = slice(bounds[row], bounds[row + 1])
                    yield MatrixRow(first + row + 1, columns[part].tolist(), values[part].tolist())

    @contextmanager
    def _reading_npz(self) -> Iterator[None]:
        """Turns what a damaged archive makes of zipfile and NumPy into a CorpusError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # each of the two has a dozen kinds
            raise CorpusError(
                f"{self.path}:1: not a scipy sparse matrix ({error}). {_HOW_TO_SAVE}"
            ) from None


class _NpyStream:
    """Reads a vector inside an npz archive piece by piece.

    Args:
        archive: the archive.
        name: the array's.
        of: the NumPy kinds of numbers that it may hold; "" for a single string of bytes.
    """

    def __init__(self, archive: zipfile.ZipFile, name: str, of: str = "") -> None:
        self._name = name
        self._stream = archive.open(f"{name}.npy")
        if np.lib.format.read_magic(self._stream) == (1, 0):
            shape, _, self._dtype = np.lib.format.read_array_header_1_0(self._stream)
        else:
            shape, _, self._dtype = np.lib.format.read_array_header_2_0(self._stream)
        if self._dtype.kind not in (of or "S") or len(shape) != bool(of):
            raise ValueError(f"{name} is of shape {shape} and type {self._dtype}")
        self.length: int = shape[0] if of else 1
        """Number of elements, as the array's header says."""
        self._left = self.length

    def read(self, count: int) -> NDArray[Any]:
        """Returns the next `count` elements."""
        self._left -= count
        if self._left < 0:
            raise ValueError(f"{self._name} is shorter than the matrix needs")
        content = self._stream.read(count * self._dtype.itemsize)
        if len(content) != count * self._dtype.itemsize:
            raise ValueError(f"{self._name} is cut short")
        return np.frombuffer(content, self._dtype)

    def string(self) -> bytes:
        """Returns the single string."""
        return bytes(self.read(1)[0])


def read_pairs(
    path: Path, num_rows: int, num_columns: int, on_fault: OnFault = refuse
) -> tuple[Ids, Ids]:
    """Returns the pairs of a file of `row col` lines (rows, columns), in file order.

    Memory: 16 bytes a pair (a filter file has about one pair a query).

    Args:
        path: the file.
        num_rows: rows are below it.
        num_columns: columns are below it.
        on_fault: is told of a line that is not two integers, or one out of range.

    Raises:
        CorpusError: the file cannot be read, or what `on_fault` raises.
    """
    rows, columns = array.array("q"), array.array("q")
    for line, raw in raw_lines(path):
        if not raw.strip():
            continue
        try:
            row, column = _parse_pair(raw, path, line, num_rows, num_columns)
        except LineError as fault:
            on_fault(fault)
            continue
        rows.append(row)
        columns.append(column)
    return np.array(rows, np.int64), np.array(columns, np.int64)


def _parse_pair(
    raw: bytes, path: Path, line: int, num_rows: int, num_columns: int
) -> tuple[int, int]:
    text = decode_line(raw, path, line)
    try:
        row, column = _integers(text)
    except ValueError:
        reason = (
            f"found {shorten(text)}, needed two integers, a query's row and a label's row, both "
            "counted from 0."
        )
        raise LineError(path, line, reason, text) from None
    check_range([row], num_rows, path, line, "query row", text)
    check_range([column], num_columns, path, line, text=text)
    return row, column


def _integers(text: str) -> list[int]:
    if _is_written_oddly(text):
        raise ValueError
    return [int(field) for field in text.split()]


def _is_written_oddly(text: str) -> bool:
    """Returns whether Python would read numbers in it that no other program does: 1_0, １０."""
    return "_" in text or not text.isascii()


def _refuse_nan(row: MatrixRow, path: Path) -> None:
    if math.isnan(sum(row.values)):  # inf - inf is NaN too: look again
        for column, value in zip(row.columns, row.values, strict=True):
            if math.isnan(value):
                raise LineError(
                    path,
                    row.line,
                    f"label {column} has the value NaN; a number was needed. Did the model that "
                    "wrote it diverge?",
                )


def check_range(
    ids: Sequence[int],
    count: int,
    path: Path,
    line: int,
    what: str = "label id",
    text: str = "",
) -> None:
    """Raises LineError unless all of `ids` are in 0..count-1."""
    for value in (min(ids), max(ids)) if ids else ():
        if not 0 <= value < count:
            raise LineError(
                path,
                line,
                f"{what} {value} is out of range, 0 to {count - 1} was needed. "
                "Do the files belong to the same corpus and split?",
                text,
            )
