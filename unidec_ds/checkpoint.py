"""Checkpoints: safetensors and JSON, nothing that executes code when it is loaded.

    RUN/checkpoints/step_00000120/
        encoder.safetensors               encoder and heads in fp32, with both Adam moments
        rows-00000-of-00002.safetensors   one rank's classifier rows and moments
        manifest.json                     step, shapes, size and SHA-256 of every file; last
    RUN/checkpoints/latest                the name of the newest complete one

A checkpoint is written into a folder beside, synced, and renamed when its manifest is in place, so
that a name without `.partial` is always whole. Tensors are stored by parameter name and by rank of
the label partition, independent of ZeRO stage and placement; any world size can read them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unidec_ds import comm
from unidec_ds.classifier.table import ClassifierTable
from unidec_ds.errors import CheckpointError
from unidec_ds.manifest import manifest_faults
from unidec_ds.settings import Settings

FORMAT_VERSION = 1
ENCODER_FILE = "encoder.safetensors"
_MANIFEST = "manifest.json"
_LATEST = "latest"
_STEP_FOLDER = re.compile(r"step_[0-9]{8,18}")


class CheckpointConfig(Settings):
    """When checkpoints are written. One is always written at the end."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """Write one after every n-th step; 0 only at the end."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many to keep; older ones are removed once a new one is complete."""


def save(
    run: Path,
    step: int,
    encoder_tensors: Mapping[str, Tensor],
    table: ClassifierTable,
    *,
    keep: int,
    details: Mapping[str, Any],
) -> Path:
    """Writes the checkpoint of the state after `step` steps; returns its folder.

    Args:
        run: the run directory.
        step: number of steps taken.
        encoder_tensors: what `Engine.state` returned; written by rank 0.
        table: its `state` is written by each rank.
        keep: checkpoints to keep.
        details: further entries of the manifest (plain data).

    Collectives: two barriers and one gather of file names; every rank must call.
    """
    checkpoints = run / "checkpoints"
    final = checkpoints / f"step_{step:08d}"
    partial = final.with_suffix(".partial")
    if comm.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    comm.barrier()
    written = {}
    if comm.is_main():
        written[ENCODER_FILE] = _write(partial / ENCODER_FILE, dict(encoder_tensors))
    shard = rows_file(comm.rank(), comm.world_size())
    written[shard] = _write(partial / shard, table.state())
    files = {name: entry for part in comm.gather_objects(written) for name, entry in part.items()}
    if comm.is_main():
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world_size": comm.world_size(),
            "num_labels": table.num_labels,
            "width": table.width,
            **details,
            "files": files,
        }
        _write_text(partial / _MANIFEST, json.dumps(manifest, indent=2))
        if final.exists():  # the same step again, after a resume
            shutil.rmtree(final)
        partial.rename(final)
        _write_text(checkpoints / _LATEST, final.name)
        _sync(checkpoints)
        for old in sorted(checkpoints.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    comm.barrier()
    return final


def rows_file(rank: int, world_size: int) -> str:
    """Returns the name of the file that holds one rank's classifier rows."""
    return f"rows-{rank:05d}-of-{world_size:05d}.safetensors"


def latest(run: Path) -> Path | None:
    """Returns the newest complete checkpoint of a run directory, None if there is none."""
    pointer = run / "checkpoints" / _LATEST
    if pointer.is_file():
        name = pointer.read_bytes().decode("utf-8", "replace").strip()
        if _STEP_FOLDER.fullmatch(name) and (pointer.parent / name / _MANIFEST).is_file():
            return pointer.parent / name
    steps = kept_steps(run)
    return run / "checkpoints" / f"step_{steps[-1]:08d}" if steps else None


def kept_steps(run: Path) -> list[int]:
    """Returns the steps of a run's complete checkpoints, ascending."""
    found = [path.parent.name for path in (run / "checkpoints").glob("step_*/" + _MANIFEST)]
    return sorted(int(name.removeprefix("step_")) for name in found if _STEP_FOLDER.fullmatch(name))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest after checking that its files are whole.

    Raises:
        CheckpointError: no manifest, another format, or a file missing or altered.
    """
    path = checkpoint / _MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint} is not a complete checkpoint: it has no {_MANIFEST}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version}; this version reads {FORMAT_VERSION}"
        )
    if faults := list(manifest_faults(manifest, ENCODER_FILE, rows_file)):
        raise CheckpointError(
            f"{path} is damaged: {'; '.join(faults)}; use another checkpoint of the run"
        )
    for name, entry in manifest["files"].items():
        file = checkpoint / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{file} is missing; use another checkpoint of the run")
        if file.resolve().parent != checkpoint.resolve():
            raise CheckpointError(
                f"{file} is a link to {file.resolve()}, outside the checkpoint; put the file "
                "itself there"
            )
        if (size := file.stat().st_size) != entry["bytes"]:
            raise CheckpointError(
                f"{file} has {size:,} bytes, its manifest says {entry['bytes']:,}; "
                "use another checkpoint of the run"
            )
    return manifest


def manifest_digest(checkpoint: Path) -> str:
    """Returns the SHA-256 of a checkpoint's manifest, which names that of each of its files.

    It tells checkpoints apart, also those of the same step in two runs.
    """
    return _sha256(checkpoint / _MANIFEST)


def load_tensors(checkpoint: Path, manifest: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Returns the tensors of one of a checkpoint's files, memory-mapped, checksum verified.

    Raises:
        CheckpointError: the file is not what its manifest says.
    """
    path = checkpoint / name
    if (found := _sha256(path)) != manifest["files"][name]["sha256"]:
        raise CheckpointError(
            f"{path} is damaged: SHA-256 {found[:16]}..., its manifest says "
            f"{manifest['files'][name]['sha256'][:16]}...; use another checkpoint of the run"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file ({error}); use another checkpoint of the run"
        ) from None


def load_rows(checkpoint: Path, manifest: Mapping[str, Any], table: ClassifierTable) -> None:
    """Fills this rank's table from the shards of a checkpoint made at any world size.

    Raises:
        CheckpointError: the checkpoint has other labels or another width.
    """
    found = (manifest["num_labels"], manifest["width"])
    if found != (table.num_labels, table.width):
        raise CheckpointError(
            f"{checkpoint} holds {found[0]:,} labels of width {found[1]}; this run has "
            f"{table.num_labels:,} of width {table.width}"
        )
    saved_ranks = manifest["world_size"]
    if saved_ranks == comm.world_size():
        name = rows_file(comm.rank(), saved_ranks)
        table.load_state(load_tensors(checkpoint, manifest, name))
        return
    for rank in range(saved_ranks):
        shard = load_tensors(checkpoint, manifest, rows_file(rank, saved_ranks))
        table.load_shard(shard, rank, saved_ranks)


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _write_text(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
