"""Signals that ask a run to stop: it finishes what it is at, saves, and leaves.

SIGTERM (launchers, schedulers), SIGINT (Ctrl-C), SIGUSR1 (SLURM's `--signal=USR1@...` before it
preempts) and SIGHUP (a closed terminal) are only noted when they come. Once a step the ranks tell
each other what they noted, together with the flag that they exchange anyway, so all of them stop
after the same step whichever of them were asked.

A launcher often passes on a signal that its ranks have got already (Ctrl-C reaches a whole process
group, and `deepspeed` and `torchrun` then send SIGTERM), so what comes within `REPEAT_S` of the
first one is the same request. A signal after that ends the process at once, also in the middle of a
collective that waits for a rank that is gone: a thread of its own reads the signals' numbers, which
the interpreter's C handler writes to a socket.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

import torch

from unidec_ds import comm

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
)
REPEAT_S = 5.0


class StopRequests:
    """The requests to stop that came to any rank. Listens while it is entered.

    Signals that are ignored at that time (SIGHUP under `nohup`) stay ignored, save for SIGUSR1,
    which `launch.sh` ignores for the launchers between it and the ranks. In another thread than the
    main one nothing can listen, and the signals keep their effect.

    A rank that leaves with an error ignores SIGTERM from then on: launchers send it as soon as
    another rank is gone, and it would not get to say why it stopped.

    Attributes:
        agreed: names of the signals that any rank had noted at the last `exchange`, the same on
            every rank.
        has_failed: returns whether a rank has failed. A launcher then asks the others to stop;
            nothing will be saved, and that is not promised.
    """

    def __init__(self) -> None:
        self.agreed: tuple[str, ...] = ()
        self.has_failed: Callable[[], bool] = lambda: False
        self._noted: set[int] = set()
        self._first_s: float | None = None
        self._before: dict[int, Any] = {}
        self._terminals: list[int] = []
        self._wakeup: tuple[int, socket.socket] | None = None

    def exchange(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """Returns, for each flag, whether it holds on any rank, and renews `agreed`.

        Collectives: one all-reduce of a few bytes.
        """
        requests = [number in self._noted for number in SIGNALS]
        found = comm.any_true([*flags, *requests], device)
        asked = found[len(flags) :]
        self.agreed = tuple(s.name for s, is_set in zip(SIGNALS, asked, strict=True) if is_set)
        return found[: len(flags)]

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False), writer
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        for number in SIGNALS:
            is_ignored = signal.getsignal(number) is signal.SIG_IGN
            if not is_ignored or number == getattr(signal, "SIGUSR1", None):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            if handler is signal.SIG_IGN:  # SIGUSR1: all is saved, the warning ends what is left
                handler = signal.SIG_DFL
            if number == signal.SIGTERM and error is not None and comm.world_size() > 1:
                handler = signal.SIG_IGN
            signal.signal(number, handler)
        self._before = {}
        if self._wakeup is not None:
            before, writer = self._wakeup
            signal.set_wakeup_fd(before)
            writer.close()  # ends the thread
            self._wakeup = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.add(number)
        # A terminal that is gone cannot be written to.
        if number == getattr(signal, "SIGHUP", None):
            for terminal in self._terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
            self._terminals = []

    def _watch(self, reader: socket.socket) -> None:
        with reader:
            while received := reader.recv(1):
                number = received[0]
                if number not in self._before:  # a signal that others handle
                    continue
                if self._first_s is None:
                    self._first_s = time.monotonic()
                    if not self.has_failed():
                        self._say(
                            f"{signal.Signals(number).name}: stopping as soon as the step under "
                            "way is done and saved; send it again to stop at once"
                        )
                elif time.monotonic() - self._first_s > REPEAT_S:
                    self._say(f"{signal.Signals(number).name}: stopping at once, nothing is saved")
                    os._exit(128 + number)

    def _say(self, message: str) -> None:
        if comm.is_main():
            with suppress(OSError):  # the terminal may be gone
                print(f"\n{message}", file=sys.stderr, flush=True)
