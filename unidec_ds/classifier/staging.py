"""Getting a step's rows to the device, at once or ahead of time.

`pack` gathers a step's rows into packed fp32 memory beside the table and copies them to the device.
`pack_ahead` does the same for the step after it, in one background thread, while the device
computes; a CUDA device's copy runs on a stream of its own. Rows that both steps touch change in
between: `renew` overwrites them with their new values, so `take_ahead` returns what a plain `pack`
would, bit for bit.

On a CPU there is no device to hide behind, only cores to take from the encoder: a step of matrix
products, fetch and update (R = 4096, D = 768, half of each pool in the next) took 1.02 of the plain
order's time on one thread and 0.99 on two, on two busy cores. So the recipe's default is to pack
ahead on accelerators alone.

Cost: R·D·4 bytes beside the table, and as much on the device, a second time.

Shape legend: R rows of a step, S of them in the next step too, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unidec_ds.classifier.row_copy import RowCopier
from unidec_ds.classifier.storage import Column

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class StagedRows:
    """The rows of one step."""

    label_ids: Ids
    index: Tensor  # int64 [R], the rows of this shard, beside the table
    packed: Tensor  # fp32 [R, D] beside the table: the rows as stored
    on_device: Tensor  # fp32 [R, D]; the same memory as `packed` where that is the device's
    memory: Tensor  # the flat memory that `packed` is part of


class Staging:
    """Packs the rows of this rank's steps.

    Args:
        columns: the table's; only "rows" is read.
        copier: how rows move.
        device: where the loss is computed.
        pin_memory: page-lock the packed memory.
    """

    def __init__(
        self, columns: Mapping[str, Column], copier: RowCopier, device: torch.device,
        pin_memory: bool,
    ) -> None:  # fmt: skip
        self._columns, self._copier = columns, copier
        self._device, self._pin_memory = device, pin_memory
        self._beside = columns["rows"].tensor.device
        self._width = columns["rows"].tensor.shape[1]
        self._spare: list[Tensor] = []
        self._worker: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._ahead: Future[StagedRows] | None = None

    def pack(self, label_ids: Ids, index: Tensor) -> StagedRows:
        """Returns the rows as they are now, their copy to the device under way."""
        return self._pack(label_ids, index, self.borrow(len(label_ids) * self._width))

    def pack_ahead(self, label_ids: Ids, index: Tensor) -> None:
        """Starts packing a later step's rows; forgets those of an earlier call."""
        self.forget_ahead()
        memory = self.borrow(len(label_ids) * self._width)
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "classifier-rows")
        if self._device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        self._ahead = self._worker.submit(self._pack_on_own_stream, label_ids, index, memory)

    def take_ahead(self, label_ids: Ids) -> StagedRows | None:
        """Returns the rows packed ahead if they are these, else None; waits for them."""
        if self._ahead is None:
            return None
        staged = self._ahead.result()
        if not np.array_equal(staged.label_ids, label_ids):
            self.forget_ahead()
            return None
        self._ahead = None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            staged.on_device.record_stream(current)  # its memory is the copy stream's
        return staged

    def wait(self) -> None:
        """Waits until nobody reads the table in the background."""
        if self._ahead is not None:
            self._ahead.result()

    def renew(self, updated: StagedRows) -> None:
        """Puts what `updated.packed` now holds into the rows packed ahead, where they share labels.

        Cost: 8·S·D bytes of traffic, and the copy of S rows to a CUDA device.
        """
        if self._ahead is None:
            return
        staged = self._ahead.result()
        old, new = _shared(updated.label_ids, staged.label_ids)
        if not len(old):
            return
        rows_SD = updated.packed.index_select(0, torch.from_numpy(old).to(self._beside))
        positions = torch.from_numpy(new)
        with torch.no_grad(), torch.cuda.stream(self._stream):  # no stream: no effect
            staged.packed.index_copy_(0, positions.to(self._beside), rows_SD)
            if staged.on_device.data_ptr() != staged.packed.data_ptr():
                # From pageable memory, so the host waits: nothing reads `rows_SD` after this.
                staged.on_device.index_copy_(
                    0, positions.to(self._device), rows_SD.to(self._device)
                )

    def forget_ahead(self) -> None:
        """Drops the rows packed ahead: the table was written to, or other rows are wanted."""
        if self._ahead is None:
            return
        staged, self._ahead = self._ahead.result(), None
        if self._stream is not None:
            self._stream.synchronize()  # the copy still reads the memory given back
        self.give_back(staged.memory)

    def borrow(self, num_elements: int) -> Tensor:
        """Returns flat fp32 memory beside the table, used before if that is large enough.

        Fresh memory of a step's size would cost its page faults (or its page-locking) every step.
        """
        if self._spare:
            memory = self._spare.pop()
            if len(memory) >= num_elements:
                return memory
        return torch.empty(num_elements * 5 // 4, device=self._beside, pin_memory=self._pin_memory)

    def give_back(self, memory: Tensor) -> None:
        """Lets the next `borrow` have the memory."""
        self._spare.append(memory)

    def _pack(self, label_ids: Ids, index: Tensor, memory: Tensor) -> StagedRows:
        packed = memory[: len(label_ids) * self._width].view(-1, self._width)
        self._copier.gather(self._columns, index, {"rows": packed})
        on_device = packed.to(self._device, non_blocking=True)
        return StagedRows(label_ids, index, packed, on_device, memory)

    def _pack_on_own_stream(self, label_ids: Ids, index: Tensor, memory: Tensor) -> StagedRows:
        with torch.cuda.stream(self._stream):  # no stream: no effect
            return self._pack(label_ids, index, memory)


def _shared(one: Ids, other: Ids) -> tuple[Ids, Ids]:
    """Returns where the ids that both ascending arrays hold stand in the one and in the other."""
    at = np.searchsorted(other, one)
    found = at < len(other)
    found[found] = other[at[found]] == one[found]
    positions: Ids = at[found]
    return found.nonzero()[0], positions
