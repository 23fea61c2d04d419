"""Runs a function on real gloo ranks, one process each."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

TIMEOUT_S = 300


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    join: bool = True,
    preload: Sequence[str] = (),
) -> list[Any]:
    """Calls `fn(*args)` in `world_size` processes joined by gloo; returns each rank's result.

    `fn` must be importable (a module-level function) and its result picklable. With `join` False
    the processes only get a launcher's environment and `fn` makes the group, as training does;
    otherwise world size 1 runs here, without a process group. With `preload` the processes are
    forked from one that has imported these modules, once for the whole session.
    """
    if world_size == 1 and join:
        return [fn(*args)]
    context: Any = multiprocessing.get_context("forkserver" if preload else "spawn")
    if preload:
        context.set_forkserver_preload(list(preload))
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        processes = [
            context.Process(
                target=_run, args=(rank, world_size, port, folder, fn, args, join), daemon=True
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
    rank: int, world_size: int, port: int, folder: Path, fn: Any, args: Any, join: bool
) -> None:
    os.environ.update(
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
