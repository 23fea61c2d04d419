"""Puts bad lines of raw files aside, so that preparation goes on without them.

One JSON object a line: `file`, `line` (from 1), `reason`, `text`. A quarantine is an `OnFault` of
`data.files`; which records are affected, and how, is said in `data.formats`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

from unidec_ds.data.files import LineError
from unidec_ds.errors import UserError

_KEYS = ["file", "line", "reason", "text"]


class Quarantine:
    """Writes every fault it is called with to a file, over that of an earlier preparation.

    A context manager. The file is there, maybe empty, from the beginning, so that what was put
    aside can be read also if the preparation fails.

    Args:
        path: the file.

    Raises:
        UserError: the file holds something else, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.exists() and not _is_quarantine(path):
            raise UserError(
                f"{path}: holds something else than lines put aside; it is not overwritten. Name "
                "another file for the quarantine."
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path}: the quarantine cannot be written ({error.strerror}). Name a file in a "
                "folder that you can write to."
            ) from None
        self.num_lines = 0
        """Lines put aside so far."""

    def __call__(self, fault: LineError) -> None:
        """Puts one line aside."""
        values = [str(fault.path), fault.line, fault.reason, fault.text]
        # Escaped to ASCII: half a surrogate pair, which may be the fault, is no UTF-8.
        self._stream.write(json.dumps(dict(zip(_KEYS, values, strict=True))) + "\n")
        self.num_lines += 1

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()


def _is_quarantine(path: Path) -> bool:
    """Returns whether a file is empty or begins with a line put aside."""
    if not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8") as stream:
            first = stream.readline(1 << 26)
        return not first or list(json.loads(first)) == _KEYS
    except (OSError, ValueError, TypeError, RecursionError):
        return False
