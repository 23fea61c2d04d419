"""Packing rows out of the table's columns and back: in torch, or fused in a little C.

A block of a step's rows is unpacked to fp32, updated and packed again. `TorchCopier` does it with
a few torch operations a column, on any device. `NativeCopier` does one pass over all columns each
way, with the conversion to and from bf16 and its random bits on the fly; results are the same bit
for bit. It is plain C built with the system's compiler in about a second, and serves host memory
where DeepSpeed's kernel, which needs a compiler too, is the chosen one.

Shape legend: R rows of the call, D width.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
    """Moves rows of columns in host memory with the C code below."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def gather(self, columns: Columns, index: Tensor, out: Mapping[str, Tensor]) -> None:
        """Fills every `out[name]`, contiguous fp32 [R, C], with the rows of that column."""
        described = _describe(columns, index, out)
        self._library.gather(described, len(out), _address(index), len(index))

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
            _address(index),
            len(index),
            ctypes.c_void_p(row_keys.ctypes.data),
            ctypes.c_void_p(keys_D.ctypes.data),
        )


class _Move(ctypes.Structure):
    """One column of a call; `struct move` of the C code."""

    _fields_ = (
        ("column", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("width", ctypes.c_long),
        ("rounding", ctypes.c_long),
    )


def _address(tensor: Tensor) -> ctypes.c_void_p:
    """Returns where the tensor's elements lie."""
    assert tensor.device.type == "cpu"
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def _describe(columns: Columns, index: Tensor, packed: Mapping[str, Tensor]) -> ctypes.Array[_Move]:
    """Returns the C description of the columns to move, having checked what C cannot."""
    moves = (_Move * len(packed))()
    for move, (name, values) in zip(moves, packed.items(), strict=True):
        tensor = columns[name].tensor
        assert values.dtype == torch.float32
        assert values.shape == (len(index), tensor.shape[1])
        move.column, move.packed = _address(tensor), _address(values)
        move.width, move.rounding = tensor.shape[1], rounding_of(name, tensor.dtype)
    return moves


@lru_cache(maxsize=1)
def native_copier() -> NativeCopier | None:
    """Returns the copier in C, built if this machine never has, or None where it cannot be built.

    A failed build warns once: rows then move by torch, with the same results but more slowly.
    """
    from torch.utils.cpp_extension import _get_build_directory

    name = f"row_copy_{sha256(_SOURCE.encode()).hexdigest()[:16]}.so"
    folder = Path(_get_build_directory("unidec_ds_row_copy", verbose=False))
    try:
        if not (folder / name).exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / name
                command = [os.environ.get("CC", "cc"), *_FLAGS, "-o", str(built), "-xc", "-"]
                subprocess.run(command, input=_SOURCE, text=True, capture_output=True, check=True)
                built.replace(folder / name)  # atomic: ranks may build it at once
        library = ctypes.CDLL(str(folder / name))
    except (OSError, subprocess.CalledProcessError) as error:
        details = getattr(error, "stderr", "") or ""
        warnings.warn(
            f"the classifier's row copies could not be compiled, so torch does them, more slowly "
            f"and with the same results: {error} {details}",
            stacklevel=2,
        )
        return None
    size = ctypes.c_long
    library.gather.argtypes = (ctypes.POINTER(_Move), size, ctypes.c_void_p, size)
    library.scatter.argtypes = (*library.gather.argtypes, ctypes.c_void_p, ctypes.c_void_p)
    library.gather.restype = library.scatter.restype = None
    return NativeCopier(library)


_FLAGS = ("-O3", "-std=gnu11", "-fopenmp", "-shared", "-fPIC")

# The rounding and its bits are those of `row_formats`; a test compares the two bit for bit.
_SOURCE = r"""
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define VECTORISED
#endif

enum { NONE, NEAREST, STOCHASTIC_FIRST, STOCHASTIC_SECOND };
struct move { char *column; float *packed; long width; long rounding; };

VECTORISED void unpack(const uint16_t *row, uint32_t *packed, long width) {
  for (long d = 0; d < width; d++) packed[d] = (uint32_t)row[d] << 16;
}

VECTORISED void pack_nearest(uint32_t *packed, uint16_t *row, long width) {
  for (long d = 0; d < width; d++) {
    uint32_t bits = packed[d] + 0x7FFF + ((packed[d] >> 16) & 1);
    packed[d] = bits & 0xFFFF0000;
    row[d] = bits >> 16;
  }
}

VECTORISED void pack_stochastic(uint32_t *packed, uint16_t *row, long width, uint64_t row_key,
                                const uint32_t *column_keys, int shift) {
  uint32_t low = (uint32_t)row_key, high = (uint32_t)(row_key >> 32);
  for (long d = 0; d < width; d++) {
    uint32_t noise = (low ^ column_keys[d]) * 0x85EBCA6Bu;
    noise ^= noise >> 13;
    noise = (noise ^ high) * 0xC2B2AE35u;
    noise ^= noise >> 16;
    uint32_t bits = packed[d] + ((noise >> shift) & 0xFFFF);
    packed[d] = bits & 0xFFFF0000;
    row[d] = bits >> 16;
  }
}

static long row_bytes(const struct move *move) {
  return move->width * (move->rounding == NONE ? 4 : 2);
}

/* Copies a row out of the table and asks for the next one, line by line: rows lie at random, and
   the processor's own prefetcher only finds the stream once it is half over. */
static void copy_in(float *packed, const char *row, const char *next, long bytes) {
  long b = 0;
  for (; b + 64 <= bytes; b += 64) {
    __builtin_prefetch(next + b);
    memcpy((char *)packed + b, row + b, 64);
  }
  memcpy((char *)packed + b, row + b, bytes - b);
}

/* Copies a row into the table past the caches: its old lines are not read, and nobody wants the new
   ones before a later step. */
static void copy_out(char *row, const float *packed, long bytes) {
#ifdef __SSE2__
  if (((uintptr_t)row | bytes) % 16 == 0) {
    for (long b = 0; b < bytes; b += 16)
      _mm_stream_ps((float *)(row + b), _mm_loadu_ps(packed + b / 4));
    return;
  }
#endif
  memcpy(row, packed, bytes);
}

static void prefetch(const char *row, long bytes) {
  for (long b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, 1);
}

void gather(const struct move *moves, long num_moves, const int64_t *index, long num_rows) {
#pragma omp parallel for schedule(static)
  for (long r = 0; r < num_rows; r++) {
    for (const struct move *m = moves; m < moves + num_moves; m++) {
      long bytes = row_bytes(m);
      const char *row = m->column + index[r] * bytes;
      float *packed = m->packed + r * m->width;
      const char *next = m->column + index[r + 1 < num_rows ? r + 1 : r] * bytes;
      if (m->rounding == NONE) copy_in(packed, row, next, bytes);
      else {
        prefetch(next, bytes);
        unpack((const uint16_t *)row, (uint32_t *)packed, m->width);
      }
    }
  }
}

void scatter(const struct move *moves, long num_moves, const int64_t *index, long num_rows,
             const uint64_t *row_keys, const uint32_t *column_keys) {
#pragma omp parallel for schedule(static)
  for (long r = 0; r < num_rows; r++) {
    for (const struct move *m = moves; m < moves + num_moves; m++) {
      long bytes = row_bytes(m);
      char *row = m->column + index[r] * bytes;
      uint32_t *packed = (uint32_t *)(m->packed + r * m->width);
      if (m->rounding == NONE) {
        copy_out(row, m->packed + r * m->width, bytes);
        continue;
      }
      if (r + 1 < num_rows) prefetch(m->column + index[r + 1] * bytes, bytes);
      if (m->rounding == NEAREST) pack_nearest(packed, (uint16_t *)row, m->width);
      else pack_stochastic(packed, (uint16_t *)row, m->width, row_keys[r], column_keys,
                           m->rounding == STOCHASTIC_FIRST ? 16 : 0);
    }
  }
}
"""
