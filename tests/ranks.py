"""Runs a function on real gloo ranks, one process each.

A fresh process spends most of a small test on imports, and DeepSpeed some seconds more on asking
for the CPU's flags. So the ranks are forked from one server process that has done both and nothing
else (`preloaded`): no thread of Python's, no process group, no engine, no random number drawn.
Beyond what processes share that have imported the same modules, these share the seed of Python's
string hash; `test_launchers` and `test_failures` start ranks of their own interpreters.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

TIMEOUT_S = 300


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, join: bool = True) -> list[Any]:
    """Calls `fn(*args)` in `world_size` processes joined by gloo; returns each rank's result.

    `fn` must be importable (a module-level function) and its result picklable. With `join` False
    the processes only get a launcher's environment and `fn` makes the group, as training does;
    otherwise world size 1 runs here, without a process group.
    """
    if world_size == 1 and join:
        return [fn(*args)]
    context = _start_server()
    environment = dict(os.environ)  # the server's is that of its start
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        processes = [
            context.Process(
                target=_run,
                args=(rank, world_size, port, folder, environment, fn, args, join),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, folder)
        finally:
            for process in processes:
                process.kill()
        return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(world_size)]


@cache
def _start_server() -> Any:
    """Starts the process that ranks are forked from, once a session; returns its context."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    # Its sys.path is not ours, whatever the documentation says.
    with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):
        forkserver.ensure_running()
    return context


def _wait(processes: list[Any], folder: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while any(process.is_alive() for process in processes):
        failed = [p for p in processes if p.exitcode not in (0, None)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not errors, "\n".join(errors)
    codes = [process.exitcode for process in processes]
    assert codes == [0] * len(codes), f"exit codes {codes} after at most {TIMEOUT_S} s"


def _run(
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    environment: dict[str, str],
    fn: Any,
    args: Any,
    join: bool,
) -> None:
    os.environ.clear()
    os.environ.update(
        environment,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    torch.set_num_threads(1)
    try:
        if join:
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
        (folder / str(rank)).write_bytes(pickle.dumps(fn(*args)))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None


def free_port() -> int:
    """Returns a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
