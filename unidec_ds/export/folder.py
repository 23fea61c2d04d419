"""The folder that an export goes to: whole or not there, and never over anything else.

An export is written into a hidden folder beside its place and renamed when whole: a killed process
leaves nothing under the name, or what was there. `export.json` in it tells an export from
everything else, and only an export is ever replaced.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unidec_ds import stamp
from unidec_ds.errors import UserError

RECORD = "export.json"
"""Its maker writes it: an object with an entry "made_from"."""


@contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a hidden folder beside `out` that becomes `out` if the body ends well.

    Raises:
        UserError: `out` is something else than an empty folder or, if `overwrite`, an export.
    """
    out = out.expanduser().resolve()
    _check_place(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    with stamp.locked(out):
        _check_place(out, overwrite)
        partial, old = (out.with_name(f".{out.name}.{end}") for end in ("partial", "old"))
        for leftover in (partial, old):  # of a killed process: we hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            _share(partial)
            if out.exists():
                out.rename(old)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _check_place(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out: {out} is a file; a new folder is needed")
    if not any(out.iterdir()):
        return
    if not _is_export(out):
        raise UserError(
            f"--out: {out} holds files that are no export; a new or empty folder is needed"
        )
    if not overwrite:
        raise UserError(
            f"--out: {out} already holds an export; name another folder, or give --overwrite"
        )


def _is_export(folder: Path) -> bool:
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "made_from" in content


def _share(folder: Path) -> None:
    """Gives every file the mode of an ordinary new one; safetensors makes them private."""
    mode = (folder / RECORD).stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
