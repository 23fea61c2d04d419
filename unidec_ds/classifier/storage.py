"""Where the table's arrays live: host memory, memory-mapped files, or the accelerator.

Each array is a column of the table, [rows of this rank, values per label], behind two methods:
`gather` packs some of its rows, `scatter` puts them back. `allocate` makes the columns
(`capacity` says beforehand whether they fit).

- cpu: anonymous memory in huge pages (a step touches thousands of rows at random; with 4 KiB pages
  the address look-ups alone cost a quarter of its time), not inherited by forked workers.
- nvme: one file a column under `nvme_path`, its disk space reserved at once (a full disk then
  fails here and not in the middle of training), mapped shared; the page cache does the tiering.
  The files are working space: a checkpoint copies them, and they go when the table goes.
- device: tensors on the accelerator.

Shape legend: n rows of one call, C values per label in a column.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import torch
from torch import Tensor

from unidec_ds.classifier.row_formats import ColumnType
from unidec_ds.errors import UserError

PlacementKind = Literal["cpu", "nvme", "device"]


@dataclass(frozen=True)
class Placement:
    """Where the classifier table lives, as `zero_optimization.offload_optimizer` says."""

    kind: PlacementKind = "cpu"
    """offload_optimizer.device: "cpu", "nvme", or "device" where it is absent or "none"."""
    nvme_path: Path | None = None
    """offload_optimizer.nvme_path: an existing, writable directory; needed for "nvme"."""
    pin_memory: bool = False
    """offload_optimizer.pin_memory: page-locked staging buffers for copies to and from CUDA."""


class Column:
    """One array of the table.

    Args:
        tensor: [rows of this rank, C], contiguous, zero-filled.
        buffer: the memory it lies in, where that is ours.
    """

    def __init__(self, tensor: Tensor, buffer: mmap.mmap | None = None) -> None:
        self.tensor = tensor
        self._buffer = buffer
        self._wide = _widest_view(tensor)
        self._packed = tensor[:0]

    def gather(self, index: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns rows packed, [n, C].

        Args:
            index: int64 [n] on the column's device.
            out: contiguous [n, C] of the column's dtype to pack into; without it, memory that the
                next gather of this column overwrites.
        """
        if out is None:
            if len(self._packed) < len(index):
                self._packed = self.tensor.new_empty(len(index), self.tensor.shape[1])
            out = self._packed[: len(index)]
        torch.index_select(self._wide, 0, index, out=out.view(self._wide.dtype))
        return out

    def scatter(self, index: Tensor, values: Tensor) -> None:
        """Overwrites the rows with `values`, contiguous [n, C] of the column's dtype."""
        assert values.dtype == self.tensor.dtype
        self._wide.index_copy_(0, index, values.view(self._wide.dtype))

    def flush(self) -> None:
        """Writes dirty pages of a mapped file to disk; waits for it."""
        if self._buffer is not None:
            self._buffer.flush()


def _widest_view(tensor: Tensor) -> Tensor:
    """Returns the rows as the widest elements that divide them.

    torch's index_copy_ moves element by element: 16-byte elements take 0.7 of the time of fp32.
    """
    row_bytes = tensor.shape[1] * tensor.element_size()
    for dtype in (torch.complex128, torch.float64, torch.float32):
        if row_bytes % dtype.itemsize == 0:
            return tensor.view(dtype)
    return tensor


def allocate(
    placement: Placement,
    columns: dict[str, ColumnType],
    num_rows: int,
    *,
    device: torch.device,
    rank: int,
    world_size: int,
) -> dict[str, Column]:
    """Returns the zero-filled columns of this rank's shard.

    Raises:
        UserError: `nvme_path` cannot be used or its disk is full.
    """
    if placement.kind == "device":
        return {
            name: Column(torch.zeros(num_rows, column.width, dtype=column.dtype, device=device))
            for name, column in columns.items()
        }
    if placement.kind == "cpu":
        return {
            name: _in_buffer(_anonymous(num_rows * column.bytes_per_label), num_rows, column)
            for name, column in columns.items()
        }
    folder = nvme_directory(placement) / f"unidec_ds_classifier_rank{rank}_of_{world_size}"
    try:
        lock = _claim(folder)
        try:
            mapped = {
                name: _in_buffer(
                    _mapped_file(folder / f"{name}.bin", num_rows * column.bytes_per_label),
                    num_rows,
                    column,
                )
                for name, column in columns.items()
            }
        except OSError:
            _remove(folder, lock)
            raise
    except OSError as error:
        raise UserError(
            f"offload_optimizer.nvme_path: {folder} cannot hold the classifier table: {error}. "
            "It must be a writable directory with the free space that `unidec-ds plan` predicts."
        ) from error
    weakref.finalize(mapped["rows"], _remove, folder, lock)
    return mapped


def nvme_directory(placement: Placement) -> Path:
    """Returns `nvme_path`.

    Raises:
        UserError: it is not set, or not a directory.
    """
    if placement.nvme_path is None:
        raise UserError(
            "offload_optimizer.device is nvme but offload_optimizer.nvme_path is not set in the "
            "ds_config: name an existing, writable directory on a fast disk."
        )
    if not placement.nvme_path.is_dir():
        raise UserError(
            f"offload_optimizer.nvme_path: {placement.nvme_path} is not a directory. Create it, or "
            "name an existing, writable directory on a fast disk."
        )
    return placement.nvme_path


def _in_buffer(buffer: mmap.mmap, num_rows: int, column: ColumnType) -> Column:
    """Returns a column that lies in the buffer."""
    count = num_rows * column.width
    if not count:
        return Column(torch.zeros(num_rows, column.width, dtype=column.dtype))
    flat = torch.frombuffer(buffer, dtype=column.dtype, count=count)
    return Column(flat.view(num_rows, column.width), buffer)


def _anonymous(num_bytes: int) -> mmap.mmap:
    """Returns zero-filled private memory in huge pages, where the system has them."""
    buffer = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_DONTFORK)  # a fork would double every page the table then changes
    try:
        buffer.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without huge pages
        return buffer
    return buffer


def _mapped_file(path: Path, num_bytes: int) -> mmap.mmap:
    """Returns a new file of zeros, its disk space reserved, mapped for random access."""
    with path.open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, max(num_bytes, 1))
        buffer = mmap.mmap(file.fileno(), max(num_bytes, 1))
    buffer.madvise(mmap.MADV_DONTFORK)
    buffer.madvise(mmap.MADV_RANDOM)  # no read-ahead: neighbours of a touched row are not wanted
    return buffer


def _claim(folder: Path) -> IO[str]:
    """Makes the folder and returns its lock, held for as long as it is open.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise UserError(
            f"offload_optimizer.nvme_path: {folder} is in use by another run. Give each run an "
            "nvme_path of its own."
        ) from error
    return lock


def _remove(folder: Path, lock: IO[str]) -> None:
    """Deletes the folder of a table that is gone, and lets others have it."""
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()
