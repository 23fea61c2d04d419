"""Where the table's arrays live: host memory, memory-mapped files, or the accelerator.

Each array is a column of the table, [rows of this rank, values per label], behind two methods:
`gather` packs some of its rows, `scatter` puts them back. `allocate` makes the columns
(`capacity` says beforehand whether they fit).

- cpu: anonymous memory in huge pages (a step touches thousands of rows at random; with 4 KiB pages
  the address look-ups alone cost a quarter of its time), not inherited by forked workers.
- nvme: one file a column under `nvme_path`, its disk space reserved at once (a full disk then
  fails here and not in the middle of training), mapped shared; the page cache does the tiering.
  The files are working space and have no name: checkpoints copy the rows, nothing ever reads the
  files again, so they are never synced, and their space is free once the process has ended, in
  whatever way. `df` shows them, `ls` does not; runs may share an `nvme_path`.
- device: tensors on the accelerator.

Shape legend: n rows of one call, C values per label in a column.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
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
    folder = nvme_directory(placement)
    try:
        return {
            name: _in_buffer(
                _mapped_file(folder, num_rows * column.bytes_per_label), num_rows, column
            )
            for name, column in columns.items()
        }
    except OSError as error:
        num_bytes = num_rows * sum(column.bytes_per_label for column in columns.values())
        raise UserError(
            f"offload_optimizer.nvme_path: {folder} cannot hold the classifier table: {error}. "
            f"This rank needs {num_bytes:,} bytes there: name a writable directory with that much "
            "free space, use a smaller classifier.format, or more ranks on other machines."
        ) from error


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
    return Column(flat.view(num_rows, column.width))  # the tensor keeps the buffer alive


def _anonymous(num_bytes: int) -> mmap.mmap:
    """Returns zero-filled private memory in huge pages, where the system has them."""
    buffer = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_DONTFORK)  # a fork would double every page the table then changes
    try:
        buffer.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without huge pages
        return buffer
    return buffer


def _mapped_file(folder: Path, num_bytes: int) -> mmap.mmap:
    """Returns a nameless file of zeros, its disk space reserved, mapped for random access."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, max(num_bytes, 1))
        buffer = mmap.mmap(file.fileno(), max(num_bytes, 1))
    buffer.madvise(mmap.MADV_DONTFORK)
    buffer.madvise(mmap.MADV_RANDOM)  # no read-ahead: neighbours of a touched row are not wanted
    return buffer
