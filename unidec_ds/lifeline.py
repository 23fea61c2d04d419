"""Tells every rank of a job when one of them has failed, which one, and ends those that would wait.

A rank that dies leaves the others waiting in a collective: gloo notices a closed connection, NCCL
often only its timeout, and neither says who is gone. So each rank keeps one TCP connection to
rank 0 beside the process group, from before the first check of the input to the end. The kernel
closes it however a process ends; a machine that is lost is noticed after three minutes of silence
(TCP keep-alive).

    a rank fails, or its connection ends  ->  rank 0 decides which failure was the first
        ->  every rank learns the verdict  ->  one rank prints, all leave with the same exit code

A rank that has not left `LEAVE_WITHIN_S` after the verdict (it computes, or NCCL still waits) is
ended. `exchange` and `rank_0_first` let the ranks compare what they found and take turns before
there is a process group; they use its key-value store.

Cost: a thread a rank (a thread for each of the others on rank 0); nothing is sent while all is
well.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from threading import Event, RLock, Thread, Timer
from typing import IO, Any

DEFAULT_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another, in a collective or before the first one."""

LEAVE_WITHIN_S = 10.0
"""A rank that is still there so long after the verdict is ended."""

_PREFER_CAUSE_S = 2.0  # so long a report of "my peer is gone" waits for the peer's own report
_CONNECT_S = 10.0
_FIRST_WORD_S, _NEXT_WORD_S = 30.0, 180.0  # when a rank says what it waits for, and says it again
_GONE = (
    "is gone: its process was killed (by the system for want of memory? `dmesg` on its host says "
    "so) or its machine was lost"
)


@dataclass(frozen=True)
class Verdict:
    """Which rank failed first."""

    rank: int
    host: str
    summary: str
    """Its error message; nothing where it could not say anything itself."""
    exit_code: int

    def describe(self) -> str:
        """Returns it in one line."""
        what = f"failed: {self.summary.splitlines()[0]}" if self.summary else _GONE
        return f"rank {self.rank} (host {self.host or 'unknown'}) {what}"


class PeerFailedError(RuntimeError):
    """Another rank failed; what happened there is in the lifeline's verdict."""


class Lifeline:
    """This rank's connection to the others; without effect in a job of one rank.

    Args:
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size
        self.timeout = DEFAULT_TIMEOUT
        self.verdict: Verdict | None = None
        self._store: Any = None
        self._decided, self._lock = Event(), RLock()
        self._hosts = {rank: socket.gethostname()}
        self._connections: dict[int, socket.socket] = {}  # on other ranks only that to rank 0
        self._threads: list[Thread] = []
        self._listener: socket.socket | None = None
        self._is_closing = False

    @classmethod
    def of_launch(cls) -> Lifeline:
        """Returns that of the rank which the launcher started."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    # ------------------------------------------------------------------ before the process group

    def open(self, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        """Meets the other ranks.

        Args:
            timeout: how long to wait for them, here and later.

        Raises:
            torch.distributed.DistStoreError: they did not come.
        """
        if self.world_size == 1 or self._store is not None:
            return
        from unidec_ds import comm  # imports torch: seconds

        self.timeout = timeout
        self._store = comm.rendezvous_store(timeout)
        if self.rank == 0:
            self._listen()
        else:
            self._connect()
        os.register_at_fork(after_in_child=self._forget)

    def exchange(self, key: str, value: Any) -> list[Any]:
        """Returns the `value` (plain data) of every rank, in rank order, on every rank.

        Args:
            key: names this exchange; each may be used once.
            value: this rank's.

        Raises:
            PeerFailedError: a rank failed before it gave its own.
            TimeoutError: a rank did not come.
        """
        if self._store is None:
            return [value]
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        keys = [f"{key}/{rank}" for rank in range(self.world_size)]
        self._wait_for(keys, self.timeout.total_seconds())
        return [json.loads(self._store.get(name)) for name in keys]

    @contextmanager
    def rank_0_first(self, key: str) -> Iterator[None]:
        """Runs the body on rank 0 and then on the others, which wait as long as it takes.

        One of them on each node says now and then that it waits.

        Args:
            key: names this turn in what is said; each may be used once.

        Raises:
            PeerFailedError: rank 0 failed.
        """
        if self._store is not None and self.rank > 0:
            # Whoever has no connection would not learn that rank 0 has failed.
            timeout_s = None if self._connections else self.timeout.total_seconds()
            self._wait_for([key], timeout_s, f"rank 0 to be done with the {key}")
        yield
        if self._store is not None and self.rank == 0:
            self._store.set(key, "done")

    # ------------------------------------------------------------------ the end

    def fail(self, summary: str, exit_code: int, *, is_consequence: bool) -> Verdict:
        """Reports this rank's failure; returns the one that the job ends with.

        Args:
            summary: the message.
            exit_code: what the job should leave with.
            is_consequence: whether it looks as if another rank's failure had caused this one.
        """
        own = Verdict(self.rank, self._hosts[self.rank], summary, exit_code)
        if self._store is None or (self.rank > 0 and not self._connections):
            return own
        if self.rank == 0:
            self._on_failure(own, is_consequence)
        else:
            report = {**asdict(own), "is_consequence": is_consequence}
            _send(self._connections[0], {"failed": report})
        self._decided.wait(LEAVE_WITHIN_S)
        return self.verdict or own

    def leave(self, exit_code: int) -> None:
        """Ends this process after a failure; returns only from a job of one rank.

        At once, because the destructors of NCCL wait for ranks that may be gone.
        """
        if self._store is None:
            return
        self._drain()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)

    def close(self) -> None:
        """Leaves; the others do not take it for a failure."""
        if self._is_closing:
            return
        self._is_closing = True
        for connection in list(self._connections.values()):
            _send(connection, {"bye": self.rank})
        self._drain()

    # ------------------------------------------------------------------ rank 0

    def _listen(self) -> None:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._listener = socket.create_server(
            ("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6
        )
        token = secrets.token_hex(16)
        address = {
            "port": self._listener.getsockname()[1],
            "token": token,
            "hosts": [os.environ["MASTER_ADDR"], socket.getfqdn(), socket.gethostname()],
        }
        self._store.set("lifeline", json.dumps(address))
        _start(self._accept, self._listener, token)

    def _accept(self, listener: socket.socket, token: str) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            thread = _start(self._serve, connection, token)
            self._threads.append(thread)

    def _serve(self, connection: socket.socket, token: str) -> None:
        """Reads what one rank says until its connection ends."""
        _notice_lost_machines(connection)
        lines = _messages(connection)
        hello = next(lines, {})
        if hello.get("token") != token:  # a stranger
            connection.close()
            return
        rank, has_left = int(hello["rank"]), False
        with self._lock:
            self._hosts[rank], self._connections[rank] = str(hello["host"]), connection
            _send(connection, {"welcome": token})
            if self.verdict is not None:
                _send(connection, {"verdict": asdict(self.verdict)})
        for message in lines:
            has_left = True
            if "failed" in message:
                report = dict(message["failed"])
                is_consequence = bool(report.pop("is_consequence"))
                self._on_failure(Verdict(**report), is_consequence)
        if not has_left and not self._is_closing:
            self._decide(Verdict(rank, self._hosts[rank], "", 1))
        connection.close()

    def _on_failure(self, failure: Verdict, is_consequence: bool) -> None:
        if is_consequence:  # most likely its cause is about to be known
            timer = Timer(_PREFER_CAUSE_S, self._decide, [failure])
            timer.daemon = True
            timer.start()
        else:
            self._decide(failure)

    # ------------------------------------------------------------------ the other ranks

    def _connect(self) -> None:
        self._wait_for(["lifeline"], self.timeout.total_seconds())
        address = json.loads(self._store.get("lifeline"))
        hello = {"token": address["token"], "rank": self.rank, "host": self._hosts[self.rank]}
        faults = []
        for host in dict.fromkeys(address["hosts"]):
            try:
                connection = socket.create_connection((host, address["port"]), _CONNECT_S)
                _notice_lost_machines(connection)
                _send(connection, hello)
                lines = _messages(connection)
                if next(lines, {}).get("welcome") != address["token"]:
                    raise ConnectionError("another program answers there")
            except OSError as error:
                faults.append(f"{host}:{address['port']}: {error}")
                continue
            connection.settimeout(None)
            self._connections[0] = connection
            self._hosts[0] = address["hosts"][-1]
            self._threads.append(_start(self._listen_to_rank_0, lines))
            return
        print(
            f"[rank {self.rank}] no connection to rank 0 beside the process group "
            f"({'; '.join(faults)}); if a rank dies, this one may wait until the timeout of "
            f"{self.timeout}",
            file=sys.stderr,
        )

    def _listen_to_rank_0(self, lines: Iterator[dict[str, Any]]) -> None:
        message = next(lines, None)
        if self._is_closing or (message is not None and "bye" in message):  # this rank or 0 is done
            return
        gone = Verdict(0, self._hosts[0], "", 1)
        self._decide(gone if message is None else Verdict(**message["verdict"]))
        self._connections[0].close()

    # ------------------------------------------------------------------ all ranks

    def _decide(self, verdict: Verdict) -> None:
        """Makes the first failure the verdict and tells everyone; later ones change nothing."""
        with self._lock:
            if self.verdict is not None:
                return
            self.verdict = verdict
            if self.rank == 0:
                for connection in self._connections.values():
                    _send(connection, {"verdict": asdict(verdict)})
        timer = Timer(LEAVE_WITHIN_S, self._end)
        timer.daemon = True
        timer.start()
        self._decided.set()

    def _end(self) -> None:
        assert self.verdict is not None
        print(f"[rank {self.rank}] stopped: {self.verdict.describe()}", file=sys.stderr, flush=True)
        os._exit(self.verdict.exit_code)

    def _wait_for(self, keys: list[str], timeout_s: float | None, what: str = "") -> None:
        """Waits for keys of the store; with `what`, says so on one rank of each node."""
        start = time.monotonic()
        deadline = None if timeout_s is None else start + timeout_s
        # Rank 1 speaks for the node of rank 0, which may hang, and for its own.
        speaks = what and (self.rank == 1 or os.environ.get("LOCAL_RANK") == "0")
        say_at = start + _FIRST_WORD_S if speaks else float("inf")
        pause_s = 0.01
        while not self._store.check(keys):
            if time.monotonic() > say_at:
                waited_s = time.monotonic() - start
                print(
                    f"[rank {self.rank}] waits for {what}: {waited_s:.0f} s so far",
                    file=sys.stderr,
                    flush=True,
                )
                say_at += _NEXT_WORD_S
            if self._decided.wait(pause_s) and not self._store.check(keys):
                assert self.verdict is not None
                raise PeerFailedError(self.verdict.describe())
            if deadline is not None and time.monotonic() > deadline:
                missing = [key for key in keys if not self._store.check([key])]
                raise TimeoutError(
                    f"waited {timeout_s:.0f} s for other ranks (missing: {', '.join(missing)})"
                )
            pause_s = min(2 * pause_s, 0.5)

    def _drain(self) -> None:
        """Waits a moment for the other ends to close, so that nothing sent to them is lost."""
        deadline = time.monotonic() + _PREFER_CAUSE_S
        while self.rank == 0 and len(self._connections) < self.world_size - 1:
            if time.monotonic() > deadline:  # some never came
                break
            time.sleep(0.01)
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections.values()):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _forget(self) -> None:
        """Closes a forked child's copies, which would outlive this process."""
        for connection in (*self._connections.values(), self._listener):
            if connection is not None:
                with suppress(OSError):  # closed already
                    os.close(connection.detach())  # `close` waits for the stream that reads it


ALONE = Lifeline()
"""That of a job of one rank."""


def _start(target: Callable[..., None], *args: Any) -> Thread:
    thread = Thread(target=target, args=args, name="lifeline", daemon=True)
    thread.start()
    return thread


def _notice_lost_machines(connection: socket.socket) -> None:
    """Makes the kernel ask every 20 s after a minute of silence; six times no answer is the end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 20), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, option):  # Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):  # whoever has gone is noticed by the thread that reads
        connection.sendall(json.dumps(message).encode() + b"\n")


def _messages(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """Yields what the other end sends, until its end."""
    stream: IO[bytes] = connection.makefile("rb")
    with stream, suppress(OSError, ValueError):
        for line in stream:
            message = json.loads(line)
            if isinstance(message, dict):
                yield message
