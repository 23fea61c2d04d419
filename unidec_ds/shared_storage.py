"""Patience with storage that several nodes share: a file shows late where another node wrote it.

NFS keeps what it knows of a folder, also that a file is not in it, for half a minute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 30.0
"""How long a file that another node wrote may take to appear."""


def appears(look: Callable[[], bool], *folders: Path) -> bool:
    """Returns whether `look` finds what was written, at once or within `PATIENCE_S`.

    Args:
        look: whether it is there; an OSError means that it is not.
        folders: those that have to be read anew to find it, the outer ones first.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            for folder in folders:
                os.listdir(folder)  # makes an NFS client ask the server again
            if look():
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
