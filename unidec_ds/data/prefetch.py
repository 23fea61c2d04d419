"""Makes a step's inputs ahead of time, in one background thread.

The plan of the next step (and whatever else `make` prepares) is made while the current step
computes; numpy and Arrow release the interpreter's lock in their long passes. Order and content
are those of a plain loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Semaphore, Thread
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T], Iterator[T]):
    """Iterates over `make(start), ..., make(stop - 1)`, up to `depth` items ahead.

    If `make` raises, the same exception is raised to the consumer in place of that item, and the
    iteration ends there. Use it as a context manager, or call `close`: leaving early waits for the
    item being made and makes no other.

    Args:
        make: called with each index, in order, in the background thread only.
        start: first index.
        stop: one past the last index.
        depth: most items made or being made that the consumer has not taken yet; at least 1.
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int, depth: int = 2) -> None:
        assert depth >= 1
        self._make = make
        self._next, self._stop = start, stop
        self._room = Semaphore(depth)
        self._made: SimpleQueue[tuple[T] | BaseException] = SimpleQueue()
        self._peeked: tuple[T] | BaseException | None = None
        self._closed = False
        self._thread = Thread(target=self._run, args=(start,), name="prefetch", daemon=True)
        self._thread.start()

    def _run(self, start: int) -> None:
        for index in range(start, self._stop):
            self._room.acquire()
            if self._closed:
                return
            try:
                self._made.put((self._make(index),))
            except BaseException as error:
                self._made.put(error)
                return

    def __next__(self) -> T:
        """Returns the next item, waiting for it if need be."""
        if self._closed or self._next >= self._stop:
            self.close()
            raise StopIteration
        made, self._peeked = self._peeked or self._made.get(), None
        if isinstance(made, BaseException):
            self.close()
            raise made
        self._next += 1
        self._room.release()
        return made[0]

    def peek(self) -> T | None:
        """Returns the item that `next` will return, None if it is not made yet; never waits."""
        if self._peeked is None and not self._made.empty():
            self._peeked = self._made.get()
        if self._peeked is None or isinstance(self._peeked, BaseException):
            return None
        return self._peeked[0]

    def close(self) -> None:
        """Stops the thread and forgets the items made ahead; harmless when called again."""
        self._closed = True
        self._room.release()
        self._thread.join()
        self._made, self._peeked = SimpleQueue(), None

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
