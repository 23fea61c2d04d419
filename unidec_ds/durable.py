"""Files that are whole after a crash: written, synced, and only then given their name."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HASH_BLOCK_BYTES = 1 << 24
_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes a safetensors file and syncs it; returns its size and SHA-256 for a manifest."""
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return stream_tensors(path, shapes, (tensor.contiguous() for tensor in tensors.values()))


def stream_tensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    blocks: Iterable[Tensor],
) -> dict[str, Any]:
    """Writes a safetensors file block by block; returns what `write_tensors` does.

    Args:
        path: where.
        shapes: dtype and shape of each tensor.
        blocks: their rows in that order, contiguous, on the host; one is in memory at a time.
    """
    header, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + dtype.itemsize * int(torch.Size(shape).numel())
        header[name] = {
            "dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (struct.pack("<Q", len(text)), text):
            file.write(part)
            digest.update(part)
        for block in blocks:
            content = block.flatten().view(torch.uint8).numpy().data
            file.write(content)
            digest.update(content)
        file.flush()
        os.fsync(file.fileno())
    assert path.stat().st_size == 8 + len(text) + end, "blocks are not what shapes says"
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def write_text(path: Path, text: str) -> None:
    """Writes text beside and renames it, so that readers see the old file or the new one."""
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    """Returns a file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
