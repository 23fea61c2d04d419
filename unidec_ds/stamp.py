"""Derived files that say what they were made from: a record beside each, checked before use.

    vectors-unified.npy    the file
    vectors-unified.json   its record: plain data that its maker chose, and the file's size

The file is made beside its place and renamed; its record is written last and removed first. What a
killed process leaves is therefore never taken for a whole file, nor one file for another.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from unidec_ds.errors import UserError

logger = logging.getLogger(__name__)


def record_path(path: Path) -> Path:
    """Returns where the record of a derived file lies."""
    return path.with_suffix(".json")


def read_record(path: Path) -> dict[str, Any]:
    """Returns what the record of a derived file says.

    Raises:
        UserError: the file is not there, or its record is not or is damaged.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    record = record_path(path)
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the record {record} of what it holds cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"the record {record} of what it holds is not a JSON object")
    return found


def mismatch(path: Path, record: Mapping[str, Any]) -> str | None:
    """Returns how the file differs from the one `record` describes; None if it is that one."""
    try:
        found = read_record(path)
    except UserError as error:
        return str(error)
    size = path.stat().st_size
    faults = [
        f"{key} is {_short(found.get(key))}, needed {_short(value)}"
        for key, value in record.items()
        if found.get(key) != value
    ]
    if not faults and found.get("bytes") != size:
        faults = [f"it has {size:,} bytes, its record says {found.get('bytes')}"]
    return "; ".join(faults) or None


def put(made: Path, path: Path, record: Mapping[str, Any]) -> None:
    """Moves a whole file to its place, over an older one, and writes its record.

    Args:
        made: the file, on the same file system; gone afterwards.
        path: its place.
        record: what it was made from; the file's size is added.
    """
    record_path(path).unlink(missing_ok=True)
    content = {**record, "bytes": made.stat().st_size}
    made.replace(path)
    beside = record_path(path).with_suffix(".json.new")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(record_path(path))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a derived file or folder; says so if another process is making it.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("waiting for another process that is making %s", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _short(value: object) -> object:
    return value[:24] if isinstance(value, str) else value
