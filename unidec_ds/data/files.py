"""Reads the files that corpora come in, one record at a time, with `file:line` in every error.

The lowest layer of a corpus: `data.formats` turns what it yields into records. Files whose name
ends in .gz are unpacked as they are read. Memory does not grow with the file.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from unidec_ds.errors import CorpusError

MAX_LINE_BYTES = 1 << 26
"""A longer line is refused: it is most likely a whole file without line ends."""

_ROWS_AT_ONCE = 4096
_GZIP_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Yields (line number from 1, text without its end) of a UTF-8 file.

    Only `\n` ends a line (an `\r` before it is removed), so that a text may hold any other
    character that Unicode calls a line break. A byte order mark is removed.

    Raises:
        CorpusError: bytes that are not UTF-8, a damaged gzip file, a line above MAX_LINE_BYTES.
    """
    number = 0
    try:
        with _opened(path) as stream:
            while raw := stream.readline(MAX_LINE_BYTES):
                number += 1
                if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                    raise CorpusError(
                        f"{path}:{number}: a line of more than {MAX_LINE_BYTES} bytes; one record "
                        "per line is needed. Is the file one large JSON array?"
                    )
                if number == 1:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                yield number, raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path}:{number}: byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is "
            "not UTF-8. Convert the file, for instance with `iconv -f latin1 -t utf-8`."
        ) from None
    except _GZIP_DAMAGE as error:
        raise _damaged(path, number + 1, error) from None


def read_json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of a file of one JSON object a line.

    Blank lines are passed over.

    Raises:
        CorpusError: as `read_lines`, and at a line that is not one JSON object.
    """
    for line, text in read_lines(path):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CorpusError(
                f"{path}:{line}: not valid JSON ({error}): {shorten(text)}. "
                "One complete JSON object per line is needed."
            ) from None
        if not isinstance(row, dict):
            raise CorpusError(
                f"{path}:{line}: found {shorten(row)}, needed a JSON object such as "
                '{"uid": "7", "title": "..."}.'
            )
        yield line, row


def read_columns(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row from 1, values of `columns`) of a Parquet file or a dataset saved to a folder.

    Raises:
        CorpusError: not a readable file of its kind, or a column is missing.
    """
    dataset = _saved_dataset(path) if path.is_dir() else None
    names = _parquet(path).schema_arrow.names if dataset is None else dataset.column_names
    missing = [column for column in columns if column not in names]
    if missing:
        raise CorpusError(
            f"{path}:1: column {', '.join(missing)} missing; found {', '.join(names)}, "
            f"needed {', '.join(columns)}."
        )
    if dataset is None:
        tables = _parquet(path).iter_batches(_ROWS_AT_ONCE, columns=list(columns))
    else:
        arrow = dataset.select_columns(list(columns)).with_format("arrow")
        tables = arrow.iter(batch_size=_ROWS_AT_ONCE)
    rows = itertools.chain.from_iterable(table.to_pylist() for table in tables)
    return enumerate(rows, start=1)


def count_records(path: Path) -> int:
    """Returns how many records a table file holds, at the speed of reading it.

    Blank lines count, so for JSON lines the number may be a little high: for progress bars.
    """
    if path.is_dir():
        return len(_saved_dataset(path))
    if path.suffix == ".parquet":
        return int(_parquet(path).metadata.num_rows)
    lines, last = 0, b"\n"
    try:
        with _opened(path) as stream:
            while block := stream.read(1 << 20):
                lines += block.count(b"\n")
                last = block[-1:]
    except _GZIP_DAMAGE as error:
        raise _damaged(path, lines + 1, error) from None
    return lines + (last != b"\n")


def valid_unicode(value: str, key: str, path: Path, line: int) -> str:
    """Returns `value`; refuses lone surrogates, which JSON escapes can spell but UTF-8 cannot."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{path}:{line}: {key} holds half of a surrogate pair "
            f"(\\u{ord(value[error.start]):04x}), which is no character. Remove it."
        ) from None
    return value


def shorten(value: object) -> str:
    """Returns a value for a message, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for reading bytes, unpacked if its name ends in .gz."""
    with path.open("rb") as raw:
        if path.suffix != ".gz":
            yield raw
        else:
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield io.BufferedReader(unpacked, 1 << 18)


def _damaged(path: Path, line: int, error: Exception) -> CorpusError:
    return CorpusError(
        f"{path}:{line}: the gzip file is damaged or cut short here ({error}). "
        "Download or copy it again."
    )


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path}:1: not a readable Parquet file ({error}).") from None


def _saved_dataset(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise CorpusError(
            f"{path}: not a readable dataset ({error}); a folder written by "
            "`Dataset.save_to_disk` was needed."
        ) from None
