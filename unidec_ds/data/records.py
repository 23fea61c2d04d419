"""Turns the lines of corpus files into records: texts with uids and, for queries, targets.

`data.files` yields lines, this module parses them one by one, `data.formats` knows which files
make a corpus. A fault of one line is a `LineError`; a caller's `OnFault` may take it, and reading
goes on.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from unidec_ds.data.files import (
    LineError,
    OnFault,
    decode_line,
    parse_json_object,
    raw_lines,
    read_columns,
    shorten,
    valid_unicode,
)
from unidec_ds.data.matrices import check_range


class Record(NamedTuple):
    """One query or label.

    Args:
        line: where it stands in its file, from 1.
        uid: the source's identifier; the row number, from 0, where a layout has none.
        title: stripped; the whole text where a layout has one text only. May be empty.
        content: stripped; may be empty.
        targets: the labels relevant to a query, by row, or by uid if
            `RawCorpus.targets_are_uids`. May repeat.
        num_irrelevant: labels left out of `targets` because the source gives them relevance 0.
        row: in its table, from 0; records that were left out count.
    """

    line: int
    uid: str
    title: str
    content: str = ""
    targets: tuple[int, ...] | tuple[str, ...] = ()
    num_irrelevant: int = 0
    row: int = 0


_Line = bytes | dict[str, Any]
"""What a record is made of: a line, or a row of a table."""


def read_label_records(path: Path, on_fault: OnFault) -> Iterator[Record]:
    """Yields the labels of a table file; a bad line is a label without text."""
    parse = _parser_of(path)
    for row, (line, source) in enumerate(_read_lines(path, ("id", "text"))):
        try:
            record = parse(source, path, line, row, None)
        except LineError as fault:
            _report(fault, source, on_fault)
            record = Record(line, _uid_if_any(parse, source, path, line, row), "", row=row)
        yield record


def read_query_records(path: Path, num_labels: int, on_fault: OnFault) -> Iterator[Record | None]:
    """Yields the queries of a table file; None in place of a bad line."""
    parse = _parser_of(path)
    for row, (line, source) in enumerate(_read_lines(path, ("id", "text", "labels"))):
        record = None
        try:
            record = parse(source, path, line, row, num_labels)
            if not record.title and not record.content:
                reason = (
                    "a query without text; every query needs one. Give it a text, or remove it "
                    "(from the positives and filter files too)."
                )
                raise LineError(path, line, reason)
        except LineError as fault:
            _report(fault, source, on_fault)
            record = None
        yield record


def _report(fault: LineError, source: _Line, on_fault: OnFault) -> None:
    """Tells of a fault, with the text of its line."""
    if isinstance(source, bytes):
        fault.text = source.decode("utf-8", "backslashreplace")
    else:
        fault.text = json.dumps(source, ensure_ascii=False, default=str)
    on_fault(fault)


def _read_lines(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, _Line]]:
    """Yields (line, what its record is made of) of a table file of any kind."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".txt"):
        yield from raw_lines(path)
    elif name.endswith((".json", ".jsonl")):
        yield from ((line, raw) for line, raw in raw_lines(path) if raw.strip())
    else:
        yield from read_columns(path, columns)


_Parser = Callable[[Any, Path, int, int, int | None], Record]
"""(line, path, line number, row, number of labels or None for a label) -> its record."""


def _parser_of(path: Path) -> _Parser:
    name = path.name.removesuffix(".gz")
    if name.endswith(".txt"):
        return _parse_text
    return _parse_xmc if name.endswith(".json") else _parse_row


def _parse_text(raw: bytes, path: Path, line: int, row: int, num_labels: int | None) -> Record:
    return Record(line, str(row), decode_line(raw, path, line).strip(), row=row)


def _parse_xmc(raw: bytes, path: Path, line: int, row: int, num_labels: int | None) -> Record:
    """Returns the record of a line of the XMC repository."""
    values = parse_json_object(decode_line(raw, path, line), path, line)
    _require(values, ("uid", "title", "target_ind")[: 2 if num_labels is None else 3], path, line)
    uid = _uid(values["uid"], "uid", path, line)
    title, content = (_text(values, key, path, line) for key in ("title", "content"))
    record = Record(line, uid, title, content, row=row)
    if num_labels is None:
        return record
    record = _with_targets(record, values, path)
    check_range(record.targets, num_labels, path, line)  # type: ignore[arg-type]
    return record


def _with_targets(record: Record, values: dict[str, Any], path: Path) -> Record:
    """Adds the labels of `target_ind` whose `target_rel`, if given, is not zero."""
    targets, relevances = values["target_ind"], values.get("target_rel")
    if not isinstance(targets, list) or any(type(label) is not int for label in targets):
        reason = (
            f"target_ind is {shorten(targets)}, needed a list of integers (label rows counted "
            "from 0)."
        )
        raise LineError(path, record.line, reason)
    if relevances is None:
        return record._replace(targets=tuple(targets))
    if (
        not isinstance(relevances, list)
        or len(relevances) != len(targets)
        or not all(map(_is_number, relevances))
    ):
        reason = (
            f"target_rel is {shorten(relevances)}, needed a list of {len(targets)} numbers, one "
            "for each entry of target_ind."
        )
        raise LineError(path, record.line, reason)
    return with_relevant(record, targets, relevances)


def _is_number(value: object) -> bool:
    """Returns whether a JSON value is a number; NaN, which JSON does not know, is none."""
    return type(value) is int or (type(value) is float and not math.isnan(value))


def with_relevant(record: Record, targets: list[int], relevances: list[float]) -> Record:
    """Adds the targets whose relevance is not zero and counts the others."""
    relevant = tuple(itertools.compress(targets, relevances))
    return record._replace(targets=relevant, num_irrelevant=len(targets) - len(relevant))


def _parse_row(source: _Line, path: Path, line: int, row: int, num_labels: int | None) -> Record:
    """Returns the record of a line of JSONL, or of a row of Parquet or of a saved dataset."""
    if isinstance(source, bytes):
        source = parse_json_object(decode_line(source, path, line), path, line)
    _require(source, ("id",) if num_labels is None else ("id", "text", "labels"), path, line)
    record = Record(
        line, _uid(source["id"], "id", path, line), _text(source, "text", path, line), row=row
    )
    if num_labels is None:
        return record
    labels = source["labels"]
    if not isinstance(labels, list):
        reason = f"labels is {shorten(labels)}, needed a list of label ids (empty for none)."
        raise LineError(path, line, reason)
    targets = tuple(_uid(label, "an entry of labels", path, line) for label in labels)
    return record._replace(targets=targets)


def _uid_if_any(parse: _Parser, source: _Line, path: Path, line: int, row: int) -> str:
    """Returns the uid of a bad label: its own if that can be read, else one that says where."""
    if parse is _parse_text:
        return str(row)
    try:
        if isinstance(source, bytes):
            source = parse_json_object(decode_line(source, path, line), path, line)
        key = "uid" if parse is _parse_xmc else "id"
        return _uid(source.get(key), key, path, line)
    except LineError:
        return f"{path.name}:{line}"


def _require(row: dict[str, Any], keys: tuple[str, ...], path: Path, line: int) -> None:
    missing = [key for key in keys if key not in row]
    if missing:
        found = shorten(", ".join(row)) if row else "nothing"
        reason = f"{', '.join(missing)} missing; found {found}, needed {', '.join(keys)}."
        raise LineError(path, line, reason)


def _uid(value: object, key: str, path: Path, line: int) -> str:
    if type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise LineError(path, line, f"{key} is {shorten(value)}, needed text or an integer.")
    return valid_unicode(value, key, path, line)


def _text(row: dict[str, Any], key: str, path: Path, line: int) -> str:
    """Returns a text field, stripped; a missing or null one is empty."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise LineError(path, line, f"{key} is {shorten(value)}, needed text.")
    return valid_unicode(value, key, path, line).strip()
