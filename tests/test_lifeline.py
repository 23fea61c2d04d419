"""Ranks that wait for something else than a collective learn of a failure all the same."""

import json
import os
import signal
import subprocess
import sys

import pytest
from ranks import free_port

RANK = """
import json, os, signal, sys, time
from unidec_ds import interruption, lifeline
from unidec_ds.exits import exit_with_message

lifeline.LEAVE_WITHIN_S = 3.0
lifeline._FIRST_WORD_S = 0.2
line = lifeline.Lifeline.of_launch()

def main():
    how = sys.argv[1 + line.rank]
    line.open()
    seen = []
    with line.rank_0_first("turn"):
        if how == "is slow":
            sys.stdin.readline()
        seen.append(line._store.check(["done by 0"]))
        if line.rank == 0:
            line._store.set("done by 0", "")
    everyone = line.exchange("what", {"rank": line.rank})
    print(json.dumps([seen, everyone]), flush=True)
    if how == "fork and die" and os.fork() == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.stdin.readline()
        os._exit(0)
    if how.endswith("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "fail":
        raise ZeroDivisionError("our own fault")
    if how == "wait":
        time.sleep(3600)
    if how == "be told to stop":
        with interruption.StopRequests() as requests:
            requests.has_failed = lambda: line.verdict is not None
            while line.verdict is None:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3600)

sys.exit(exit_with_message(main, line))
"""


def run_ranks_that(*how, until=None):
    """Returns (exit codes, stdout, stderr) of ranks that leave, die, fail or wait, two on a node.

    Whoever reads standard input reads a line once `until(processes)` has returned.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    read_end, write_end = os.pipe()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *how],
            env={**os.environ, **address, "RANK": str(rank), "WORLD_SIZE": str(len(how)),
                 "LOCAL_RANK": str(rank % 2)},
            stdin=read_end, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(len(how))
    ]  # fmt: skip
    os.close(read_end)
    try:
        if until is not None:
            until(processes)
            os.write(write_end, b"\n")
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        os.close(write_end)  # ends the children that a rank has left behind
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


@pytest.mark.parametrize("forking", [0, 1])
def test_a_child_that_outlives_a_killed_rank_does_not_hide_its_death(forking):
    """The child had inherited the connection: `socket.close` leaves it open while it is read."""
    how = ["wait", "wait"]
    how[forking] = "fork and die"
    codes, _, err = run_ranks_that(*how)
    assert codes[forking] == -signal.SIGKILL
    assert codes[1 - forking] == 1
    assert f"stopped: rank {forking} (host " in err[1 - forking]


def test_ranks_that_wait_for_their_turn_say_so_once_on_each_node():
    said = []

    def read(ranks):
        said.extend(ranks[rank].stderr.readline() for rank in (1, 2))

    codes, _, err = run_ranks_that("is slow", "leave", "leave", "leave", until=read)
    assert codes == [0, 0, 0, 0], err
    for rank, line in zip((1, 2), said, strict=True):
        assert line.startswith(f"[rank {rank}] waits for rank 0 to be done with the turn: ")
    assert err == ["", "", "", ""]


def test_a_rank_told_to_stop_after_another_failed_promises_no_save():
    codes, _, err = run_ranks_that("be told to stop", "die")
    assert codes == [1, -signal.SIGKILL]
    assert err[0].startswith("[rank 0] stopped: rank 1 (host ")
    assert err[0].count("\n") == 1


def test_ranks_that_fail_alike_say_it_once():
    codes, _, err = run_ranks_that("wait", "fail", "fail")
    assert codes == [1, 1, 1]
    assert "".join(err).count("ZeroDivisionError: our own fault") == 2  # a traceback, rank 0's line
    assert "".join(err).count("Traceback") == 1
    assert err[0].startswith("[rank 0] stopped: rank ")
