"""Counts the bytes that a rank hands to torch.distributed, for benchmarks and tests.

    with CollectiveCounter() as counter:
        ...
        before = counter.snapshot()
        ...
        counter.since(before)  # {"unidec_ds": bytes, "engine": bytes}

Nothing is counted unless somebody asks: the functions of torch.distributed are replaced while the
context lasts. A call counts with its largest buffer (an all-gather's output, a reduce-scatter's
input), on this rank. What `unidec_ds.comm` calls is ours, all else is the engine's: DeepSpeed's
gradients and updated weights of encoder and heads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unidec_ds import comm

_NAMES = (
    "all_reduce", "reduce", "broadcast", "gather", "all_gather", "all_gather_into_tensor",
    "all_gather_single", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single",
    "all_to_all_single", "_all_gather_base", "_reduce_scatter_base",
)  # fmt: skip
_BOUND_IN_COMM = ("_all_gather_single", "_reduce_scatter_single")


class CollectiveCounter:
    """Counts while its context lasts; make it before the engine, which keeps some functions."""

    def __init__(self) -> None:
        self._bytes = {"unidec_ds": 0, "engine": 0}
        self._replaced: list[tuple[Any, str, Callable[..., Any]]] = []
        self._depth = 0

    def __enter__(self) -> CollectiveCounter:
        for name in _NAMES:
            if hasattr(dist, name):
                self._replace(dist, name)
        for name in _BOUND_IN_COMM:
            self._replace(comm, name)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in self._replaced:
            setattr(owner, name, original)

    def snapshot(self) -> dict[str, int]:
        """Returns the bytes so far, by who called."""
        return dict(self._bytes)

    def since(self, before: dict[str, int]) -> dict[str, int]:
        """Returns the bytes since a snapshot."""
        return {who: count - before[who] for who, count in self._bytes.items()}

    def _replace(self, owner: Any, name: str) -> None:
        call = getattr(owner, name)
        self._replaced.append((owner, name, call))

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._depth == 0:  # one collective may be made of others
                caller = sys._getframe(1).f_globals.get("__name__", "")
                who = "unidec_ds" if caller == comm.__name__ else "engine"
                self._bytes[who] += max(map(_bytes_of, (*args, *kwargs.values())), default=0)
            self._depth += 1
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1

        setattr(owner, name, counted)


def _bytes_of(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    if isinstance(argument, list | tuple) and argument and torch.is_tensor(argument[0]):
        return sum(map(_bytes_of, argument))
    return 0
