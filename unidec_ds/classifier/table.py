"""The classifier table: one free weight row per label, fetched and updated row-sparsely.

What ZeRO-Offload does to a whole model, done to a step's touched rows alone: weights and moments
stay in host memory (or in mapped files, or on the accelerator), the pool's rows are copied to the
device as a leaf, its gradient comes back, and those rows are updated on the CPU. A step costs what
the pool costs, whatever L is. Rank r holds the labels with `label_id % W == r`; rows are never
communicated.

Cost of a step, R rows of this rank: R·D·4 bytes to the device and back, and 28·R·D bytes of host
memory traffic in format fp32. The host work goes through blocks small enough for the cache, so
that a row's moments are read from memory once and written once.

Shape legend: R touched rows, D width, L labels, W ranks, n ids of one call.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unidec_ds.classifier import partition
from unidec_ds.classifier.config import ClassifierConfig
from unidec_ds.classifier.native import native_library
from unidec_ds.classifier.row_adam import KernelName, RowAdam
from unidec_ds.classifier.row_copy import RowCopier, TorchCopier, native_copier
from unidec_ds.classifier.row_formats import (
    column_types,
    rounding_row_keys,
    xavier_rows,
)
from unidec_ds.classifier.row_sgd import RowSGD
from unidec_ds.classifier.rowwise_adam import RowwiseAdam
from unidec_ds.classifier.snapshot import Snapshot
from unidec_ds.classifier.staging import StagedRows, Staging
from unidec_ds.classifier.storage import Placement, allocate
from unidec_ds.errors import CheckpointError

Ids = NDArray[np.int64]

_BLOCK_ELEMENTS = 393_216  # of a thread: 512 rows at D = 768; their moments, 3 MiB, stay in cache
_INITIAL_ROWS, _COPY_ROWS = 1024, 65_536


class ClassifierTable:
    """This rank's shard of the L x D classifier, with AdamW or SGD on the rows a step touches.

    Weight decay falls on touched rows only, so a label's row decays in proportion
    to how often it is in a pool.

    Args:
        num_labels: L, over all ranks.
        width: D.
        rank: this rank, 0..W-1.
        world_size: W.
        config: the recipe's section.
        placement: where the shard lives.
        device: where the loss is computed.
        seed: keys the initial rows and the stochastic rounding.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: of AdamW (decoupled) or SGD (added to the gradient).

    Raises:
        UserError: `nvme_path` cannot be used. Whether the shard fits is for `capacity.check_fits`
            to say, before any rank of the machine allocates its own.
    """

    def __init__(
        self,
        *,
        num_labels: int,
        width: int,
        rank: int,
        world_size: int,
        config: ClassifierConfig,
        placement: Placement,
        device: torch.device,
        seed: int,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.num_labels, self.width = num_labels, width
        self.rank, self.world_size = rank, world_size
        self.num_rows = partition.num_local_rows(num_labels, rank, world_size)
        self.step = 0
        self._seed, self._device = seed, device
        self._on_host = placement.kind != "device"
        self._pin_memory = self._on_host and placement.pin_memory and device.type == "cuda"
        self._format = config.format
        self._column_types = column_types(
            config.format, config.bias_correction, width, config.optimizer
        )
        self.bytes_per_label = config.bytes_per_label(width)
        native = self._on_host and config.kernel == "cpu_adam"
        self._optimizer = _row_optimizer(config, native, betas, eps, weight_decay)
        self._copier: RowCopier = (native_copier() if native else None) or TorchCopier()
        self._columns = allocate(placement, self._column_types, self.num_rows, device=device)
        self._block_rows = max(1, _BLOCK_ELEMENTS * torch.get_num_threads() // width)
        self._moments: dict[str, Tensor] = {}
        self._staging = Staging(self._columns, self._copier, device, self._pin_memory)
        self._packs_ahead = self._on_host and config.fetches_ahead(device.type)
        self._fetched: StagedRows | None = None
        self._leaf: Tensor | None = None
        self._snapshot: Snapshot | None = None
        self._initialise()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of this rank's shard, where it lives."""
        return self.bytes_per_label * self.num_rows

    def fetch(self, label_ids: Ids) -> Tensor:
        """Returns the labels' rows as a leaf that wants a gradient, fp32 [R, D] on the device.

        Args:
            label_ids: int64 [R], ascending, all owned by this rank; R may be 0.
        """
        fetched = self._staging.take_ahead(label_ids)
        if fetched is None:
            fetched = self._staging.pack(label_ids, self._step_index(label_ids))
        self._fetched = fetched
        self._leaf = fetched.on_device.detach().requires_grad_()
        return self._leaf

    def fetch_ahead(self, label_ids: Ids) -> None:
        """Starts bringing the next step's rows to the device, where that gains time.

        The next `fetch` of the same labels then returns at once, with the same numbers; it may
        also be of others. See `classifier.staging`.

        Args:
            label_ids: as for `fetch`.
        """
        if self._packs_ahead:
            self._staging.pack_ahead(label_ids, self._step_index(label_ids))

    def apply(self, rows_RD: Tensor, *, lr: float, begins_step: bool = True) -> None:
        """Takes one optimizer step on the rows of the last `fetch`; `step` grows by one.

        Waits for the device, whose gradient is copied to the host. The leaf is used up: its memory
        may be the next fetch's (where the device is the host, it holds the updated rows till then).

        Args:
            rows_RD: the leaf that `fetch` returned, with its gradient (none is needed if R is 0).
            lr: learning rate of this step.
            begins_step: False for further, other rows of the step that the last call began: `step`
                then stays.
        """
        fetched = self._fetched
        assert fetched is not None, "apply follows fetch"
        assert rows_RD is self._leaf, "not the leaf of the last fetch"
        self._fetched = self._leaf = None
        self.step += int(begins_step)
        self._staging.wait()
        num_rows = len(fetched.label_ids)
        if self._snapshot is not None:
            self._snapshot.preserve(fetched.index)
        if num_rows:
            assert rows_RD.grad is not None
            grads_RD, grads_staging = rows_RD.grad.contiguous(), None
            if grads_RD.device != fetched.packed.device:
                grads_staging = self._staging.borrow(grads_RD.numel())
                on_host = grads_staging[: grads_RD.numel()].view_as(grads_RD)
                grads_RD = on_host.copy_(grads_RD)
            row_keys = np.zeros(num_rows, np.uint64)
            if self._format != "fp32":
                row_keys = rounding_row_keys(self._seed, self.step, fetched.label_ids)
            block_rows = self._block_rows if self._on_host else num_rows
            for start in range(0, num_rows, block_rows):
                span = slice(start, min(start + block_rows, num_rows))
                self._update(fetched, grads_RD, row_keys, span, lr)
            if grads_staging is not None:
                self._staging.give_back(grads_staging)
            self._staging.renew(fetched)
        self._staging.give_back(fetched.memory)

    def read(self, label_ids: Ids) -> Tensor:
        """Returns the labels' rows, fp32 [n, D] on the host, in the order asked for."""
        rows_nD = torch.empty(
            len(label_ids), self.width, device=self._columns["rows"].tensor.device
        )
        self._copier.gather(self._columns, self._index(label_ids), {"rows": rows_nD})
        return rows_nD.to("cpu")

    def write(self, label_ids: Ids, rows_nD: Tensor) -> None:
        """Overwrites the labels' rows; their moments stay. bf16 formats round to nearest.

        Args:
            label_ids: int64 [n], owned by this rank, not repeated.
            rows_nD: [n, D] on any device.
        """
        assert rows_nD.shape == (len(label_ids), self.width)
        self._staging.forget_ahead()
        rows = self._columns["rows"]
        values_nD = rows_nD.detach().to(rows.tensor.device, rows.tensor.dtype).contiguous()
        rows.scatter(self._index(label_ids), values_nD)

    def state(self) -> dict[str, Tensor]:
        """Returns what a checkpoint saves: every column [rows of this rank, C] and `step` [1].

        The columns are the table's own memory where it is on the host, copies where it is on the
        accelerator.
        """
        columns = {name: column.tensor.to("cpu") for name, column in self._columns.items()}
        return {**columns, "step": torch.tensor([self.step])}

    def snapshot(self) -> Snapshot:
        """Returns what `state` returns now, to be read in another thread while steps are taken.

        The one before must have been read. Nothing but `apply` may change the table until then.
        Columns on the accelerator are copied to the host here.
        """
        columns = self.state()
        extra = {"step": columns.pop("step")}
        made = Snapshot(columns, extra)
        self._snapshot = made if self._on_host else None
        return made

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over a `state` of the same rank of the same world size.

        Raises:
            CheckpointError: it is of another shape or format.
        """
        self.load_shard(tensors, self.rank, self.world_size)

    def load_shard(self, tensors: Mapping[str, Tensor], old_rank: int, old_world_size: int) -> None:
        """Takes over the rows of this rank from one rank's `state` at another world size.

        Call it with the state of every old rank to take over the whole table.

        Raises:
            CheckpointError: the state is of another number of labels, width or format.
        """
        old_num_rows = partition.num_local_rows(self.num_labels, old_rank, old_world_size)
        found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        needed: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: ((old_num_rows, column.width), column.dtype)
            for name, column in self._column_types.items()
        }
        needed["step"] = ((1,), torch.int64)
        if found != needed:
            raise CheckpointError(
                f"the classifier table of rank {old_rank} of {old_world_size} in this checkpoint "
                f"holds {_describe(found)}; this run's corpus, model.width, classifier.format "
                f"({self._format}), .bias_correction and .optimizer need {_describe(needed)}. "
                "Resume with the recipe it was saved with, or start a new run with --init_from."
            )
        self._staging.forget_ahead()
        for start in range(0, old_num_rows, _COPY_ROWS):
            old_rows = np.arange(start, min(start + _COPY_ROWS, old_num_rows))
            label_ids = partition.label_ids(old_rows, old_rank, old_world_size)
            mine = partition.owner(label_ids, self.world_size) == self.rank
            index, picked = self._index(label_ids[mine]), torch.from_numpy(mine.nonzero()[0])
            for name, column in self._columns.items():
                block = tensors[name][start : start + _COPY_ROWS].index_select(0, picked)
                column.scatter(index, block.to(column.tensor.device))
        self.step = int(tensors["step"])

    def _step_index(self, label_ids: Ids) -> Tensor:
        """Returns `_index` of a step's labels, which ascend."""
        assert (np.diff(label_ids) > 0).all(), "label ids of a step ascend and do not repeat"
        return self._index(label_ids)

    def _index(self, label_ids: Ids) -> Tensor:
        """Returns the labels' rows in this shard, int64 [n] beside the table; checks they exist."""
        if len(label_ids):
            assert 0 <= label_ids.min() <= label_ids.max() < self.num_labels, "no such label"
            mine = partition.owner(label_ids, self.world_size) == self.rank
            assert mine.all(), "a label of another rank"
        local_rows = torch.from_numpy(partition.local_row(label_ids, self.world_size))
        return local_rows.to(self._columns["rows"].tensor.device)

    def _initialise(self) -> None:
        """Draws every row; about 5 ns an element."""
        rows = self._columns["rows"].tensor
        for start in range(0, self.num_rows, _INITIAL_ROWS):
            local_rows = np.arange(start, min(start + _INITIAL_ROWS, self.num_rows))
            label_ids = partition.label_ids(local_rows, self.rank, self.world_size)
            drawn = xavier_rows(label_ids, self.num_labels, self.width, self._seed)
            rows[start : start + len(drawn)] = drawn.to(rows.device)

    def _moments_of(self, num_rows: int) -> dict[str, Tensor]:
        """Returns fp32 memory for the moments of a block, used again by the next block."""
        for name, column in self._column_types.items():
            if name not in ("rows", "steps") and len(self._moments.get(name, ())) < num_rows:
                device = self._columns[name].tensor.device
                self._moments[name] = torch.empty(num_rows, column.width, device=device)
        return {name: moment[:num_rows] for name, moment in self._moments.items()}

    @torch.no_grad()
    def _update(
        self,
        fetched: StagedRows,
        grads_RD: Tensor,
        row_keys: NDArray[np.uint64],
        span: slice,
        lr: float,
    ) -> None:
        """Updates one block of the step's rows: gather its moments, step, pack and scatter.

        Leaves in `fetched.packed` exactly what the table then holds.
        """
        index, rows_RD, grads_RD = fetched.index[span], fetched.packed[span], grads_RD[span]
        step: int | Tensor = self.step
        if "steps" in self._columns:
            step = self._columns["steps"].gather(index) + 1
            self._columns["steps"].scatter(index, step)
        moments = self._moments_of(len(index))
        self._copier.gather(self._columns, index, moments)
        if isinstance(self._optimizer, RowSGD):
            self._optimizer.step(rows_RD, grads_RD, moments["momentum"], lr=lr)
        elif isinstance(self._optimizer, RowwiseAdam):
            self._optimizer.step(rows_RD, grads_RD, moments["exp_avg_sq"], lr=lr, step=step)
        else:
            self._optimizer.step(
                rows_RD, grads_RD, moments["exp_avg"], moments["exp_avg_sq"], lr=lr, step=step
            )
        self._copier.scatter(self._columns, index, {"rows": rows_RD, **moments}, row_keys[span])


def _row_optimizer(
    config: ClassifierConfig,
    native: bool,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> RowAdam | RowwiseAdam | RowSGD:
    """Returns what updates packed rows; `native`: by compiled code, on the host."""
    if config.optimizer == "sgd":
        return RowSGD(momentum=config.momentum, weight_decay=weight_decay)
    if config.format == "rowwise":
        library = native_library() if native else None
        return RowwiseAdam(beta2=betas[1], eps=eps, weight_decay=weight_decay, native=library)
    kernel: KernelName = "cpu_adam" if native else "torch"
    return RowAdam(betas=betas, eps=eps, weight_decay=weight_decay, kernel=kernel)


def _describe(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    """Returns names, shapes and dtypes in words."""
    return ", ".join(
        f"{name} {list(shape)} {str(dtype).removeprefix('torch.')}"
        for name, (shape, dtype) in sorted(tensors.items())
    )
