"""What a stage of a long benchmark runs in: a process, a clock, a memory limit of its own."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, TypeVar

Figures = dict[str, float]
T = TypeVar("T")


def memory_bytes(field: str) -> int:
    """Returns a field of this process's status: RssAnon now, or VmHWM, the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def memory_gib(field: str) -> float:
    """Returns `memory_bytes` in GiB."""
    return memory_bytes(field) / 2**30


class Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self._start = perf_counter(), process_time()

    def seconds(self, name: str) -> Figures:
        """Returns both, as `name_s` and `name_cpu_s`."""
        wall, cpu = self._start
        return {f"{name}_s": perf_counter() - wall, f"{name}_cpu_s": process_time() - cpu}


def apart(stage: Callable[..., T], *args: Any) -> T:
    """Returns what a stage returns that runs in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(stage, *args).result()


def folder_gib(folder: Path) -> float:
    """Returns the size of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30


class Cgroup:
    """Limits this process's new memory, page cache included, while it is entered.

    Needs a version 1 or 2 memory controller and the right to make a group; without them there is
    no limit, and `limit_gib` is infinite.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        old = Path("/sys/fs/cgroup/memory")
        self._root = old if old.is_dir() else Path("/sys/fs/cgroup")
        self._names = (
            ("memory.limit_in_bytes", "memory.max_usage_in_bytes")
            if old.is_dir()
            else ("memory.max", "memory.peak")
        )
        self._group = self._root / f"unidec_ds_scale_{os.getpid()}"
        self._home = self._root / "cgroup.procs"
        self.limit_gib = float("inf")

    def __enter__(self) -> Cgroup:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        for _, controllers, path in (line.split(":", 2) for line in lines):
            if "memory" in controllers.split(",") or (not controllers and "memory" not in str(
                self._root.name
            )):  # fmt: skip
                self._home = self._root / path.lstrip("/") / "cgroup.procs"
        try:
            self._group.mkdir()
            (self._group / self._names[0]).write_text(str(self._limit_bytes))
            (self._group / "cgroup.procs").write_text(str(os.getpid()))
            self.limit_gib = self._limit_bytes / 2**30
        except OSError as error:
            print(f"no memory limit could be set ({error})", file=sys.stderr)
        return self

    def most_charged_gib(self) -> float:
        """Returns the most memory that the group has held."""
        if self.limit_gib == float("inf"):
            return float("nan")
        return int((self._group / self._names[1]).read_text()) / 2**30

    def __exit__(self, *_: object) -> None:
        if self.limit_gib < float("inf"):
            self._home.write_text(str(os.getpid()))
        if self._group.is_dir():
            self._group.rmdir()
