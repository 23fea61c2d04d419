"""Reads the files that corpora come in, one record at a time, with `file:line` in every error.

The lowest layer of a corpus: `data.records` turns what it yields into records. Files whose name
ends in .gz are unpacked as they are read. Memory does not grow with the file. What is wrong with
one line only is a `LineError`, behind which reading may go on; anything else ends it.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from unidec_ds.errors import CorpusError

MAX_LINE_BYTES = 1 << 26
"""A longer line is refused: it is most likely a whole file without line ends."""

_ROWS_AT_ONCE = 4096
_GZIP_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)


class LineError(CorpusError):
    """One line or record is wrong; those after it can still be read.

    Args:
        path: the file.
        line: from 1; of npz and Parquet files and saved datasets, the row.
        reason: what was found, what was needed, what to do.
        text: the line, if whoever raises it knows it.
    """

    def __init__(self, path: Path, line: int, reason: str, text: str = "") -> None:
        self.path, self.line, self.reason, self.text = path, line, reason, text
        super().__init__(f"{path}:{line}: {reason}")


OnFault = Callable[[LineError], None]
"""What is done about a bad line. If it returns, reading goes on behind the line."""


def refuse(fault: LineError) -> None:
    """Raises the fault: the first bad line ends the reading."""
    raise fault


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    r"""Yields (line number from 1, bytes without the line's end), a byte order mark removed.

    Only `\n` ends a line (an `\r` before it is removed), so that a text may hold any other
    character that Unicode calls a line break.

    Raises:
        CorpusError: the file cannot be read, it is a damaged gzip file, or a line is longer than
            MAX_LINE_BYTES.
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
                    if not raw:  # a file of nothing but the mark has no line
                        return
                yield number, raw.rstrip(b"\r\n")
    except _GZIP_DAMAGE as error:
        raise _damaged(path, number + 1, error) from None


def decode_line(raw: bytes, path: Path, line: int) -> str:
    """Returns the text of a line; raises LineError where it is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = (
            f"byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not UTF-8. "
            "Convert the file, for instance with `iconv -f latin1 -t utf-8`."
        )
        raise LineError(path, line, reason, raw.decode("utf-8", "backslashreplace")) from None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text without its end) of a UTF-8 file; see `raw_lines`.

    Raises:
        CorpusError: as `raw_lines`, and at bytes that are not UTF-8.
    """
    return ((line, decode_line(raw, path, line)) for line, raw in raw_lines(path))


def parse_json_object(text: str, path: Path, line: int) -> dict[str, Any]:
    """Returns the JSON object that a line holds; raises LineError if it is none."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = (
            f"not valid JSON ({error}): {shorten(text)}. One complete JSON object per line is "
            "needed."
        )
        raise LineError(path, line, reason, text) from None
    if not isinstance(row, dict):
        reason = (
            f'found {shorten(row)}, needed a JSON object such as {{"uid": "7", "title": "..."}}.'
        )
        raise LineError(path, line, reason, text)
    return row


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
        file = _parquet(path)
        num_rows = int(file.metadata.num_rows)
        tables = file.iter_batches(_ROWS_AT_ONCE, columns=list(columns))
    else:
        arrow = dataset.select_columns(list(columns)).with_format("arrow")
        num_rows, tables = len(dataset), arrow.iter(batch_size=_ROWS_AT_ONCE)
    return enumerate(_rows(path, tables, num_rows), start=1)


def _rows(path: Path, tables: Iterator[Any], num_rows: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of Arrow batches; what a damaged page makes of Arrow is a CorpusError."""
    row = 0
    while True:
        try:
            table = next(tables, None)
            rows: list[dict[str, Any]] = [] if table is None else table.to_pylist()
        except Exception as error:  # Arrow, `datasets` and UTF-8 each have their own
            raise CorpusError(
                f"{path}:{row + 1}: damaged from here on, or values of a kind that is none of "
                f"text, number and list ({error}). Write the file again."
            ) from None
        if table is None:
            break
        yield from rows
        row += len(rows)
    if row != num_rows:  # Arrow passes over a column whose description is damaged
        raise CorpusError(
            f"{path}:{row + 1}: the file announces {num_rows} rows, {row} can be read. It is "
            "damaged; write it again."
        )


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
        raise LineError(
            path,
            line,
            f"{key} holds half of a surrogate pair (\\u{ord(value[error.start]):04x}), which is no "
            "character. Remove it.",
        ) from None
    return value


def shorten(value: object) -> str:
    """Returns a value for a message, at most 80 characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested deeply; more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for reading bytes, unpacked if its name ends in .gz."""
    try:
        raw = path.open("rb")
    except OSError as error:
        raise CorpusError(f"{path}:1: cannot be read ({error.strerror}).") from None
    with raw:
        if path.suffix != ".gz":
            yield raw
        elif path.stat().st_size == 0:  # which the module gzip takes for an empty text
            raise EOFError("it has no bytes at all")
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
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorpusError(f"{path}:1: not a readable Parquet file ({error}).") from None


def _saved_dataset(path: Path) -> Any:
    import datasets

    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        names = [part["filename"] for part in [*state["_data_files"], *_indices_file(state)]]
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"state.json names {outside[0]!r}, which is not in the folder")
        dataset = datasets.load_from_disk(str(path))
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError("it holds several datasets")
    except Exception as error:  # `datasets` and Arrow raise most kinds at a damaged file
        raise CorpusError(
            f"{path}:1: not a readable dataset ({error}); a folder written by "
            "`Dataset.save_to_disk` was needed."
        ) from None
    return dataset


def _indices_file(state: dict[str, Any]) -> list[dict[str, str]]:
    """Returns the file of a dataset's indices, which older versions of `datasets` wrote."""
    return state.get("_indices_data_files") or []
