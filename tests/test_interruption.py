"""Signals are noted, a second one ends the process at once, ignored ones stay ignored."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from ranks import run_ranks

from unidec_ds import interruption
from unidec_ds.interruption import StopRequests

CPU = torch.device("cpu")
STUCK = """
import ctypes, sys
from unidec_ds import interruption

interruption.REPEAT_S = 0.0
with interruption.StopRequests():
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second waits for ever, in C
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.fixture
def heeded():
    """Signals with their usual effect, also under `nohup` or in the background."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in interruption.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", interruption.SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_noted_and_its_handler_is_put_back(number, heeded, capfd):
    before = signal.getsignal(number)
    with StopRequests() as requests:
        assert requests.exchange([False], CPU) == [False]
        assert requests.agreed == ()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a launcher passes on what its ranks have got already
        assert requests.exchange([True, False], CPU) == [True, False]
        assert requests.agreed == (number.name,)
    assert signal.getsignal(number) == before


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            requests.exchange([], CPU)
            assert requests.agreed == ()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_launchers_ignore_for_us_is_noted():
    """launch.sh ignores SLURM's warning for itself and the launcher; the ranks inherit that."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGUSR1)
            requests.exchange([], CPU)
            assert requests.agreed == ("SIGUSR1",)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL  # nothing is left to save
    finally:
        signal.signal(signal.SIGUSR1, before)


def leave_with_an_error_and_get_sigterm():
    try:
        with StopRequests():
            raise ZeroDivisionError
    except ZeroDivisionError:
        os.kill(os.getpid(), signal.SIGTERM)
        return "still here to say so"


def test_a_rank_that_fails_is_not_ended_by_its_launcher_before_it_says_so():
    """torchrun sends SIGTERM 0.1 s after another rank is gone."""
    assert run_ranks(2, leave_with_an_error_and_get_sigterm) == ["still here to say so"] * 2


def test_another_thread_than_the_main_one_listens_to_nothing():
    before, requests = signal.getsignal(signal.SIGTERM), StopRequests()
    thread = threading.Thread(target=requests.__enter__)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_ends_a_process_that_is_stuck_outside_python():
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "\n"
    assert "send it again to stop at once" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    process.stdout.close()
    process.stderr.close()
