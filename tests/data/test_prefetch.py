"""The background worker: order, how far ahead, failures, early exit."""

from __future__ import annotations

import threading
from threading import Event

import pytest

from unidec_ds.data.prefetch import Prefetcher


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_items_come_in_order_and_the_thread_ends(depth: int) -> None:
    with Prefetcher(lambda i: i * i, 3, 50, depth) as items:
        assert list(items) == [i * i for i in range(3, 50)]
        assert not workers()
        assert list(items) == []


def test_an_empty_range_has_no_item() -> None:
    with Prefetcher(str, 5, 5) as items:
        assert list(items) == []


def test_none_is_an_item() -> None:
    with Prefetcher(lambda i: None, 0, 3) as items:
        assert list(items) == [None, None, None]


def test_peek_shows_the_next_item_and_never_waits() -> None:
    may_make, made = Event(), [Event() for _ in range(3)]

    def make(i: int) -> int:
        may_make.wait()
        if i == 2:
            made[1].wait()
            raise ValueError("no item 2")
        made[i].set()
        return i

    with Prefetcher(make, 0, 3, depth=2) as items:
        assert items.peek() is None
        may_make.set()
        made[1].wait()  # item 0 is then in the queue
        assert items.peek() == items.peek() == 0
        assert [next(items), next(items)] == [0, 1]
        assert items.peek() is None  # not made, or its failure: `next` tells
        with pytest.raises(ValueError, match="no item 2"):
            next(items)
        assert items.peek() is None


def test_it_makes_at_most_depth_items_ahead() -> None:
    made: list[int] = []
    arrived = [Event() for _ in range(10)]

    def make(i: int) -> int:
        made.append(i)
        arrived[i].set()
        return i

    with Prefetcher(make, 0, 10, depth=3) as items:
        assert arrived[2].wait(5)
        assert not arrived[3].wait(0.05)
        assert next(items) == 0
        assert arrived[3].wait(5)
        assert not arrived[4].wait(0.05)
    assert made == [0, 1, 2, 3]


def test_an_exception_is_raised_at_its_item() -> None:
    def make(i: int) -> int:
        if i == 4:
            raise KeyError("row 4")
        return i

    with Prefetcher(make, 0, 10, depth=3) as items:
        assert [next(items) for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(KeyError, match="row 4"):
            next(items)
        assert list(items) == []
    assert not workers()


def test_closing_early_makes_nothing_more() -> None:
    made: list[int] = []
    items = Prefetcher(lambda i: made.append(i), 0, 10**9)
    next(items)
    items.close()
    assert not workers()
    assert len(made) <= 4
    items.close()
    assert list(items) == []


def test_the_consumers_exception_closes_it() -> None:
    def consume() -> None:
        with Prefetcher(str, 0, 10**9) as items:
            for item in items:
                if item == "3":
                    raise RuntimeError("the step failed")

    with pytest.raises(RuntimeError, match="the step failed"):
        consume()
    assert not workers()
