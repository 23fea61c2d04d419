"""Packing rows out of the table's columns and back: in torch, or fused in a little C.

A block of a step's rows is unpacked to fp32, updated and packed again. `TorchCopier` does it with
a few torch operations a column, on any device. `NativeCopier` does one pass over all columns each
way, with the conversion to and from bf16 and its random bits on the fly, in C (`rows.c`); results
are the same bit for bit.

Shape legend: R rows of the call, D width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unidec_ds.classifier.native import Move, address, native_library
from unidec_ds.classifier.row_formats import Rounding, column_keys, rounding_bits, rounding_of
from unidec_ds.classifier.storage import Column

Columns = Mapping[str, Column]


class RowCopier(Protocol):
    """Moves rows between columns of the table and packed fp32 tensors of the same names."""

    def gather(self, columns: Columns, index: Tensor, out: Mapping[str, Tensor]) -> None:
        """Fills every `out[name]`, contiguous fp32 [R, C], with the rows of that column."""

    def scatter(
        self,
        columns: Columns,
        index: Tensor,
        values: Mapping[str, Tensor],
        row_keys: NDArray[np.uint64],
    ) -> None:
        """Stores every `values[name]`, contiguous fp32 [R, C]; leaves in it what is now stored.

        `row_keys` (uint64 [R]) key the stochastic rounding of bf16 columns.
        """


class TorchCopier:
    """Moves rows with torch, on the device of the columns."""

    def gather(self, columns: Columns, index: Tensor, out: Mapping[str, Tensor]) -> None:
        """Fills every `out[name]`, contiguous fp32 [R, C], with the rows of that column."""
        for name, packed in out.items():
            column = columns[name]
            if column.tensor.dtype == torch.float32:
                column.gather(index, packed)
            else:
                packed.copy_(column.gather(index))

    def scatter(
        self,
        columns: Columns,
        index: Tensor,
        values: Mapping[str, Tensor],
        row_keys: NDArray[np.uint64],
    ) -> None:
        """Stores every `values[name]`, contiguous fp32 [R, C]; leaves in it what is now stored."""
        for name, packed in values.items():
            column, rounding = columns[name], rounding_of(name, columns[name].tensor.dtype)
            if rounding in (Rounding.STOCHASTIC_FIRST, Rounding.STOCHASTIC_SECOND):
                bits_RD = rounding_bits(row_keys, rounding, packed.shape[1], packed.device)
                packed.view(torch.int32).add_(bits_RD).bitwise_and_(-0x10000)
            if rounding is Rounding.NONE:
                column.scatter(index, packed)
            else:
                stored = packed.to(torch.bfloat16)
                column.scatter(index, stored)
                if rounding is Rounding.NEAREST:
                    packed.copy_(stored)


class NativeCopier:
    """Moves rows of columns in host memory with `rows.c`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def gather(self, columns: Columns, index: Tensor, out: Mapping[str, Tensor]) -> None:
        """Fills every `out[name]`, contiguous fp32 [R, C], with the rows of that column."""
        described = _describe(columns, index, out)
        self._library.gather(described, len(out), address(index), len(index))

    def scatter(
        self,
        columns: Columns,
        index: Tensor,
        values: Mapping[str, Tensor],
        row_keys: NDArray[np.uint64],
    ) -> None:
        """Stores every `values[name]`, contiguous fp32 [R, C]; leaves in it what is now stored."""
        assert row_keys.flags.c_contiguous
        described = _describe(columns, index, values)
        keys_D = column_keys(max(packed.shape[1] for packed in values.values()))
        self._library.scatter(
            described,
            len(values),
            address(index),
            len(index),
            ctypes.c_void_p(row_keys.ctypes.data),
            ctypes.c_void_p(keys_D.ctypes.data),
        )


def _describe(columns: Columns, index: Tensor, packed: Mapping[str, Tensor]) -> ctypes.Array[Move]:
    """Returns the C description of the columns to move, having checked what C cannot."""
    moves = (Move * len(packed))()
    for move, (name, values) in zip(moves, packed.items(), strict=True):
        tensor = columns[name].tensor
        assert values.dtype == torch.float32
        assert values.shape == (len(index), tensor.shape[1])
        move.column, move.packed = address(tensor), address(values)
        move.width, move.rounding = tensor.shape[1], rounding_of(name, tensor.dtype)
    return moves


def native_copier() -> NativeCopier | None:
    """Returns the copier in C, or None (after one warning) where it cannot be built."""
    library = native_library()
    return None if library is None else NativeCopier(library)
