"""The slowest, most obvious readers of the corpus formats, for `fuzz_targets.py` to compare with.

They share no code with the package.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from typing import Any

import scipy.sparse

BAD = "bad"
"""In place of a line that must be refused."""
NUM_LABELS, QUERIES = 4, 3
"""Of the corpus of `fuzz_files.py`."""


def slow_lines(data: bytes) -> list[bytes]:
    """Every line, without its end and without a byte order mark."""
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    return [line.rstrip(b"\r\n") for line in lines]


def slow_json(raw: bytes) -> dict[str, Any] | None:
    """Returns the object of a line, None if it holds none."""
    try:
        row = json.loads(raw.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _is_text(value: object) -> bool:
    if not isinstance(value, str):
        return False
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in value)


def _is_uid(value: object) -> bool:
    return _is_text(value) or (isinstance(value, int) and not isinstance(value, bool))


def _slow_texts(row: dict[str, Any], keys: tuple[str, ...]) -> list[str] | None:
    texts = ["" if row.get(key) is None else row[key] for key in keys]
    return [text.strip() for text in texts] if all(map(_is_text, texts)) else None


def slow_xmc(raw: bytes, is_query: bool) -> Any:
    """Returns what a line of `trn.json` or `lbl.json` says, or BAD."""
    row = slow_json(raw)
    if row is None or "title" not in row or not _is_uid(row.get("uid")):
        return BAD
    texts = _slow_texts(row, ("title", "content"))
    if texts is None:
        return BAD
    if not is_query:
        return (str(row["uid"]), *texts)
    targets, relevances = row.get("target_ind"), row.get("target_rel")
    if texts == ["", ""] or not isinstance(targets, list):
        return BAD
    if relevances is None:
        relevances = [1] * len(targets)
    if not isinstance(relevances, list) or len(relevances) != len(targets):
        return BAD
    kept = []
    for target, relevance in zip(targets, relevances, strict=True):
        if type(relevance) not in (int, float) or relevance != relevance:
            return BAD
        if type(target) is not int:
            return BAD
        if relevance != 0:
            kept.append(target)
    # A label of relevance 0 is left out, whatever its row.
    if not all(0 <= target < NUM_LABELS for target in kept):
        return BAD
    return (str(row["uid"]), *texts, tuple(kept), len(targets) - len(kept))


def slow_row(row: dict[str, Any] | None, is_query: bool) -> Any:
    """Returns what a row of the own layout says, or BAD."""
    if row is None or not _is_uid(row.get("id")):
        return BAD
    if is_query and ("text" not in row or not isinstance(row.get("labels"), list)):
        return BAD
    texts = _slow_texts(row, ("text",))
    if texts is None or (is_query and texts == [""]):
        return BAD
    if not is_query:
        return (str(row["id"]), texts[0], "")
    if not all(map(_is_uid, row["labels"])):
        return BAD
    return (str(row["id"]), texts[0], "", tuple(map(str, row["labels"])), 0)


def slow_text(raw: bytes, row: int, targets: list[list[int]] | None) -> Any:
    """Returns what a line of `trn_X.txt` or `Y.txt` says, or BAD."""
    try:
        text = raw.decode().strip()
    except UnicodeDecodeError:
        return BAD
    if targets is None:
        return (str(row), text, "")
    if not text:
        return BAD
    entries = [{0: 1.0, 3: 2.5}, {}, {2: 1, 1: 0}][row] if row < QUERIES else {}
    kept = tuple(t for t in targets[row] if entries[t]) if row < QUERIES else ()
    return (str(row), text, "", kept, len(targets[row]) - len(kept) if row < QUERIES else 0)


_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(inf|infinity)", re.I)


def slow_integer(text: str) -> int | None:
    """Returns the integer that a text is, None if it is none."""
    return int(text) if _INTEGER.fullmatch(text) and len(text) < 4300 else None


def slow_sparse(data: bytes) -> Any:
    """(rows, columns, [(line, [(label, value)] or BAD)]), or BAD for the file as a whole."""
    lines = slow_lines(data)
    try:
        header = [slow_integer(f) for f in lines[0].decode("ascii").split()] if lines else []
    except UnicodeDecodeError:
        return BAD
    if len(header) != 2 or None in header or min(header) < 0 or header[1] >= 2**31:
        return BAD
    num_rows, num_columns = header
    while len(lines) - 1 > num_rows and not lines[-1].strip():
        lines.pop()
    if len(lines) - 1 != num_rows:
        return BAD
    rows: list[tuple[int, Any]] = []
    for line, raw in enumerate(lines[1:], start=2):
        row: Any = []
        try:
            entries = raw.decode("ascii").split()
        except UnicodeDecodeError:
            entries = [BAD]
        for entry in entries:
            label, colon, value = entry.partition(":")
            column = slow_integer(label)
            if (
                not colon
                or column is None
                or not 0 <= column < num_columns
                or not _NUMBER.fullmatch(value)
            ):
                row = BAD
            if row == BAD:
                break
            row.append((column, float(value)))
        rows.append((line, row))
    return num_rows, num_columns, rows


def slow_npz(data: bytes) -> Any:
    """Returns as `slow_sparse` does, from an npz file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            matrix = scipy.sparse.load_npz(io.BytesIO(data))
        except Exception:  # scipy, zipfile and NumPy each have their own
            return BAD
    if matrix.format != "csr" or matrix.indptr.dtype.kind not in "iu":
        return BAD
    columns, values = matrix.indices.tolist(), matrix.data.tolist()
    bounds = matrix.indptr.tolist()
    rows: list[tuple[int, Any]] = []
    for row in range(matrix.shape[0]):
        part = slice(bounds[row], bounds[row + 1])
        row_entries = list(zip(columns[part], values[part], strict=True))
        bad = any(not 0 <= c < matrix.shape[1] or v != v for c, v in row_entries)
        rows.append((row + 1, BAD if bad else row_entries))
    return (*matrix.shape, rows)
