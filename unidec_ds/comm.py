"""Every collective of the package; the only module that imports torch.distributed.

Each function is the identity (and costs nothing) at world size 1, so the callers never ask how
many ranks there are. The process group itself is made by `engine`, through Accelerate.

Collectives must be called by every rank, in the same order. A training step uses
`all_gather_rows` once, `combine_logsumexp` once per head, `all_reduce_sum` for the logged loss
and `any_true` for the finite check and requests to stop: O(B·D) bytes, independent of the pool and
of L.

Shape legend: B queries of the global batch, D width, W ranks, n rows of one rank.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

# Their names since torch 2.13, and before.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def is_distributed() -> bool:
    """Returns whether a process group of more than one rank exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Returns this process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_world_size() -> int:
    """Returns the number of ranks on this machine, as the launcher says (1 without one)."""
    # The second is what the `deepspeed` launcher calls it.
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def rendezvous_store(timeout: timedelta) -> Any:
    """Returns the key-value store through which the launcher's ranks find each other.

    It needs no process group; one that is made later uses the same store. Waits for all ranks.

    Raises:
        torch.distributed.DistStoreError: they did not come within `timeout`.
    """
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    return PrefixStore("unidec_ds", store)


def is_peer_failure(error: BaseException | None) -> bool:
    """Returns whether a collective raised `error`: a rank is gone, or did not come in time.

    gloo's errors have no class of their own.
    """
    while error is not None:
        if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
            return True
        if isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_main() -> bool:
    """Returns whether this is rank 0, the one that prints and writes."""
    return rank() == 0


def barrier() -> None:
    """Waits for every rank."""
    if is_distributed():
        dist.barrier()


def broadcast_object(value: T) -> T:
    """Returns rank 0's `value` on every rank. For small Python objects."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Returns the `value` of every rank, in rank order, on every rank. For small objects."""
    if not is_distributed():
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def all_reduce_sum(value: Tensor) -> Tensor:
    """Returns the sum over ranks, detached. Collectives: one all-reduce of `value`."""
    total = value.detach().clone()
    if is_distributed():
        dist.all_reduce(total)
    return total


def any_true(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Returns, for each flag, whether it holds on any rank. Collectives: one all-reduce."""
    if not is_distributed():
        return list(flags)
    counts = all_reduce_sum(torch.tensor(flags, dtype=torch.float32, device=device))
    return [count > 0 for count in counts.tolist()]


def all_gather_rows(local_nD: Tensor, sizes: Sequence[int]) -> Tensor:
    """Concatenates every rank's rows, in rank order; differentiable.

    The backward pass sums the ranks' gradients of each row and gives each rank its own rows
    (a reduce-scatter), so every rank may use all rows in its own share of the loss.

    Args:
        local_nD: this rank's rows, [sizes[rank], D].
        sizes: number of rows of each rank. Rows are padded to the largest on the wire only.

    Returns:
        [sum(sizes), D], the same on every rank.

    Collectives: forward one all-gather, backward one reduce-scatter, of max(sizes)·W·D values.
    """
    assert local_nD.shape[0] == sizes[rank()]
    if not is_distributed():
        return local_nD
    return _AllGatherRows.apply(local_nD, tuple(sizes))  # type: ignore[no-any-return, no-untyped-call]


def gather_tensors(value: Tensor) -> list[Tensor]:
    """Returns every rank's `value` (same shape everywhere) on rank 0; only its own elsewhere."""
    if not is_distributed():
        return [value]
    boxes = gather_rows_to(0, value, [len(value)] * world_size())
    return boxes if boxes is not None else [value]


def gather_rows_to(rank_to: int, local_nD: Tensor, sizes: Sequence[int]) -> list[Tensor] | None:
    """Returns every rank's rows on rank `rank_to`, None on the others; not differentiable.

    Args:
        rank_to: the rank that receives.
        local_nD: this rank's rows, [sizes[rank], ...].
        sizes: number of rows of each rank.

    Collectives: one gather of max(sizes)·W rows.
    """
    if not is_distributed():
        return [local_nD]
    padded = local_nD.new_zeros(max(sizes), *local_nD.shape[1:])
    padded[: len(local_nD)] = local_nD
    boxes = [torch.empty_like(padded) for _ in sizes] if rank() == rank_to else None
    dist.gather(padded, boxes, dst=rank_to)
    if boxes is None:
        return None
    return [box[:size] for box, size in zip(boxes, sizes, strict=True)]


def combine_logsumexp(local_B: Tensor) -> Tensor:
    """Returns the log of the sum over ranks of exp(local_B); differentiable.

    The backward pass first sums the incoming gradient over the ranks, because each rank's share
    of the loss uses the combined value, then multiplies by exp(local - combined).

    Args:
        local_B: each rank's own log-sum-exp, [B]; -inf where a rank has no term.

    Collectives: forward two all-reduces and backward one, of B values each.
    """
    if not is_distributed():
        return local_B
    return _CombineLogsumexp.apply(local_B)  # type: ignore[no-any-return, no-untyped-call]


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_nD: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        longest = max(sizes)
        padded = local_nD.new_zeros(longest, *local_nD.shape[1:])
        padded[: len(local_nD)] = local_nD
        gathered = padded.new_empty(len(sizes) * longest, *local_nD.shape[1:])
        _all_gather_single(gathered, padded)
        return _drop_padding(gathered, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        sizes, (grad_BD,) = ctx.sizes, grads
        longest = max(sizes)
        padded = grad_BD.new_zeros(len(sizes), longest, *grad_BD.shape[1:])
        for r, part in enumerate(grad_BD.split(list(sizes))):
            padded[r, : len(part)] = part
        mine = padded.new_empty(longest, *grad_BD.shape[1:])
        _reduce_scatter_single(mine, padded.flatten(0, 1))
        return mine[: sizes[dist.get_rank()]], None


def _drop_padding(gathered: Tensor, sizes: Sequence[int]) -> Tensor:
    longest = max(sizes)
    if min(sizes) == longest:
        return gathered
    parts = gathered.split(longest)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _CombineLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_B: Tensor) -> Tensor:
        largest = local_B.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        offset = torch.where(largest.isfinite(), largest, torch.zeros_like(largest))
        total = (local_B - offset).exp()
        dist.all_reduce(total)
        combined = offset + total.log()
        ctx.save_for_backward(local_B, combined)
        return combined

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        local_B, combined = ctx.saved_tensors
        total = grads[0].clone()
        dist.all_reduce(total)
        share = (local_B - combined).exp()
        return total * torch.where(combined.isfinite(), share, torch.zeros_like(share))
