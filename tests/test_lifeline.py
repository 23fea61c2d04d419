"""Ranks that wait for something else than a collective learn of a failure all the same."""

import json
import os
import signal
import subprocess
import sys

from ranks import free_port

RANK = """
import json, os, signal, sys, time
from unidec_ds import lifeline
from unidec_ds.exits import exit_with_message

lifeline.LEAVE_WITHIN_S = 3.0
line = lifeline.Lifeline.of_launch()

def main():
    line.open()
    seen = []
    with line.rank_0_first("turn"):
        seen.append(line._store.check(["done by 0"]))
        if line.rank == 0:
            line._store.set("done by 0", "")
    everyone = line.exchange("what", {"rank": line.rank})
    print(json.dumps([seen, everyone]), flush=True)
    how = sys.argv[1 + line.rank]
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "fail":
        raise ZeroDivisionError("our own fault")
    if how == "wait":
        time.sleep(3600)

sys.exit(exit_with_message(main, line))
"""


def run_ranks_that(*how):
    """Returns (exit codes, stdout, stderr) of ranks that leave, die, fail or wait."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *how],
            env={**os.environ, **address, "RANK": str(rank), "WORLD_SIZE": str(len(how))},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(len(how))
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    return codes, [out for out, _ in said], [err for _, err in said]


def test_ranks_that_leave_in_order_compare_and_take_turns():
    codes, out, err = run_ranks_that("leave", "leave", "leave")
    assert codes == [0, 0, 0], err
    assert err == ["", "", ""]
    everyone = [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert [json.loads(text) for text in out] == [
        [[rank > 0], everyone] for rank in range(3)
    ]  # fmt: skip


def test_a_killed_rank_ends_those_that_wait():
    codes, _, err = run_ranks_that("wait", "wait", "die")
    assert codes == [1, 1, -signal.SIGKILL]
    for rank in (0, 1):
        assert err[rank].startswith(f"[rank {rank}] stopped: rank 2 (host ")
        assert "is gone" in err[rank]
        assert err[rank].count("\n") == 1


def test_a_killed_rank_0_ends_those_that_wait():
    codes, _, err = run_ranks_that("die", "wait")
    assert codes == [-signal.SIGKILL, 1]
    assert err[1].startswith("[rank 1] stopped: rank 0 (host ")


def test_ranks_that_fail_alike_say_it_once():
    codes, _, err = run_ranks_that("wait", "fail", "fail")
    assert codes == [1, 1, 1]
    assert "".join(err).count("ZeroDivisionError: our own fault") == 2  # a traceback, rank 0's line
    assert "".join(err).count("Traceback") == 1
    assert err[0].startswith("[rank 0] stopped: rank ")
