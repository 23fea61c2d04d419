"""What a label's row is stored as, and the keyed randomness of rows.

Formats are storage only: a step unpacks its rows to fp32, updates them in fp32, and packs them
again. Bytes per label at width D:

| format       | row                     | first moment  | second moment           | bytes    |
|--------------|-------------------------|---------------|-------------------------|----------|
| fp32         | fp32                    | fp32          | fp32                    | 12·D     |
| bf16_moments | fp32                    | bf16, nearest | bf16, stochastic        | 8·D      |
| bf16         | bf16, stochastic        | bf16, nearest | bf16, stochastic        | 6·D      |
| rowwise      | bf16, stochastic        | none          | one fp32 for the row    | 2·D + 4  |

That is for AdamW. SGD has one column beside the rows, the momentum, stored as the first moment is:
8·D, 6·D and 4·D bytes; rowwise is a format of AdamW alone.

`bias_correction: per_row` adds 4 bytes, the int32 count of the row's own updates.

bf16 keeps 8 significant bits. Rounded to nearest, a second moment could never decay (a step takes
0.1% off it, less than half a unit in the last place) and small row updates would vanish; both are
therefore rounded up or down at random, with the probability that keeps the mean. The first moment
changes by 10% a step and is rounded to nearest. The random bits are a hash of (seed, step, label
id, column), the initial rows one of (seed, label id, column), so neither depends on the number of
ranks, on the placement or on a resume.

Shape legend: R rows, D width, L labels.
"""

from __future__ import annotations

import math
from enum import IntEnum
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unidec_ds.data.keyed import hash64

FormatName = Literal["fp32", "bf16_moments", "bf16", "rowwise"]
BiasCorrection = Literal["global", "per_row"]
RowOptimizer = Literal["adamw", "sgd"]
FORMATS: tuple[FormatName, ...] = ("fp32", "bf16_moments", "bf16", "rowwise")


class ColumnType(NamedTuple):
    """What one array of the table holds for a label: `width` values of `dtype`."""

    dtype: torch.dtype
    width: int

    @property
    def bytes_per_label(self) -> int:
        """Bytes a label takes in this array."""
        return self.dtype.itemsize * self.width


def column_types(
    row_format: FormatName,
    bias_correction: BiasCorrection,
    width: int,
    optimizer: RowOptimizer = "adamw",
) -> dict[str, ColumnType]:
    """Returns the table's arrays by name.

    They are rows, exp_avg, exp_avg_sq and steps, as far as present; with SGD, rows and momentum.
    """
    rows = torch.bfloat16 if row_format in ("bf16", "rowwise") else torch.float32
    moments = torch.float32 if row_format == "fp32" else torch.bfloat16
    columns = {"rows": ColumnType(rows, width)}
    if optimizer == "sgd":
        assert row_format != "rowwise"
        assert bias_correction == "global"
        columns["momentum"] = ColumnType(moments, width)
        return columns
    if row_format == "rowwise":
        columns["exp_avg_sq"] = ColumnType(torch.float32, 1)
    else:
        columns["exp_avg"] = ColumnType(moments, width)
        columns["exp_avg_sq"] = ColumnType(moments, width)
    if bias_correction == "per_row":
        columns["steps"] = ColumnType(torch.int32, 1)
    return columns


def bytes_per_label(
    row_format: FormatName,
    bias_correction: BiasCorrection,
    width: int,
    optimizer: RowOptimizer = "adamw",
) -> int:
    """Returns the bytes one label takes in the table, all arrays together."""
    columns = column_types(row_format, bias_correction, width, optimizer).values()
    return sum(column.bytes_per_label for column in columns)


def formats_of(optimizer: RowOptimizer) -> tuple[FormatName, ...]:
    """Returns the formats that an optimizer can work with."""
    return FORMATS if optimizer == "adamw" else tuple(n for n in FORMATS if n != "rowwise")


@lru_cache(maxsize=8)
def column_keys(width: int) -> NDArray[np.uint32]:
    """Returns uint32 [D], a fixed random key for every column of a row."""
    return hash64(0, "classifier column", np.arange(width)).astype(np.uint32)


def xavier_rows(label_ids: NDArray[np.int64], num_labels: int, width: int, seed: int) -> Tensor:
    """Returns the labels' initial rows, fp32 [R, D] on the host.

    Uniform in +-sqrt(6 / (L + D)), as Xavier initialisation of the whole [L, D] matrix, on a grid
    of 2^24 values. About 4 ns an element on one core.
    """
    keys_R = hash64(seed, "classifier row", label_ids)
    bits_RD = (keys_R >> np.uint64(32)).astype(np.uint32)[:, None] ^ column_keys(width)
    scratch_RD = np.empty_like(bits_RD)
    bits_RD *= np.uint32(0x85EBCA6B)
    np.right_shift(bits_RD, np.uint32(13), out=scratch_RD)
    bits_RD ^= scratch_RD
    bits_RD ^= keys_R.astype(np.uint32)[:, None]
    bits_RD *= np.uint32(0xC2B2AE35)
    np.right_shift(bits_RD, np.uint32(16), out=scratch_RD)
    bits_RD ^= scratch_RD
    bits_RD >>= np.uint32(8)
    bound = math.sqrt(6.0 / (num_labels + width))
    rows_RD = bits_RD.astype(np.float32)
    rows_RD *= np.float32(2.0 * bound / (1 << 24))
    rows_RD -= np.float32(bound)
    return torch.from_numpy(rows_RD)


class Rounding(IntEnum):
    """How an fp32 value is stored in a column."""

    NONE = 0
    NEAREST = 1
    STOCHASTIC_FIRST = 2
    STOCHASTIC_SECOND = 3


def rounding_of(column: str, dtype: torch.dtype) -> Rounding:
    """Returns how fp32 values of the named column are rounded to `dtype`."""
    if dtype != torch.bfloat16:
        return Rounding.NONE
    return {
        "rows": Rounding.STOCHASTIC_FIRST,
        "exp_avg": Rounding.NEAREST,
        "momentum": Rounding.NEAREST,
        "exp_avg_sq": Rounding.STOCHASTIC_SECOND,
    }[column]


def rounding_row_keys(seed: int, step: int, label_ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Returns uint64 [R], the keys of one step's stochastic rounding."""
    return hash64(seed, "classifier rounding", step, label_ids)


def rounding_bits(
    row_keys: NDArray[np.uint64], rounding: Rounding, width: int, device: torch.device
) -> Tensor:
    """Returns the 16 random bits to add below bf16's last place, int32 [R, D], then cut off.

    The two stochastic roundings take the two halves of one 32-bit hash of (row key, column).
    """
    keys_R2 = torch.from_numpy(row_keys.view(np.int32).reshape(-1, 2)).to(device)
    keys_D = torch.from_numpy(column_keys(width).view(np.int32)).to(device)
    bits_RD = keys_R2[:, :1] ^ keys_D
    bits_RD.mul_(-0x7A143595)  # 0x85EBCA6B as int32
    bits_RD.bitwise_xor_((bits_RD >> 13).bitwise_and_(0x7FFFF)).bitwise_xor_(keys_R2[:, 1:])
    bits_RD.mul_(-0x3D4D51CB)  # 0xC2B2AE35 as int32
    bits_RD.bitwise_xor_((bits_RD >> 16).bitwise_and_(0xFFFF))
    if rounding is Rounding.STOCHASTIC_FIRST:
        bits_RD.bitwise_right_shift_(16)
    return bits_RD.bitwise_and_(0xFFFF)
