"""A checkpoint's manifest: its files, their sizes and digests.

It is written last and read first. Nothing that it says is trusted: it may come from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unidec_ds.durable import sha256
from unidec_ds.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ENCODER_FILE = "encoder.safetensors"


def rows_file(rank: int, world_size: int) -> str:
    """Returns the name of the file that holds one rank's classifier rows."""
    return f"rows-{rank:05d}-of-{world_size:05d}.safetensors"


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest after checking that its files are whole.

    Raises:
        CheckpointError: no manifest, another format, or a file missing or altered.
    """
    path = checkpoint / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint} is not a complete checkpoint: it has no {MANIFEST}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version}; this version reads {FORMAT_VERSION}"
        )
    if faults := list(_manifest_faults(manifest)):
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


def has_all_files(checkpoint: Path) -> bool:
    """Returns whether `read_manifest` finds nothing wrong."""
    try:
        read_manifest(checkpoint)
    except CheckpointError:
        return False
    return True


def _manifest_faults(manifest: dict[str, Any]) -> Iterator[str]:
    """Yields where a manifest is not what `save` writes; `details` may lack, not be of a type."""
    least_values = {"step": 0, "total_steps": 0, "world_size": 1, "num_labels": 1, "width": 1}
    for key, least in least_values.items():
        value = manifest.get(key, 0 if key == "total_steps" else None)
        if type(value) is not int or not least <= value < 1 << 63:
            yield f"{key} is {value!r}, needed an integer of at least {least}"
    if not isinstance(manifest.get("corpus_fingerprint", ""), str):
        yield f"corpus_fingerprint is {manifest['corpus_fingerprint']!r}, needed text"
    files = manifest.get("files")
    if not isinstance(files, dict):
        yield "files is no object"
        return
    for name, entry in files.items():
        if not (
            isinstance(entry, dict)
            and type(entry.get("bytes")) is int
            and isinstance(entry.get("sha256"), str)
        ):
            yield f"the entry of {name!r} is {entry!r}, needed bytes and sha256"
    ranks = manifest.get("world_size")
    if type(ranks) is int:
        # Not one by one before their number is known to be right: it may be 10^18.
        if len(files) <= ranks:
            yield f"it names {len(files)} files, needed {ranks} of rows and {ENCODER_FILE}"
        elif missing := {ENCODER_FILE, *(rows_file(r, ranks) for r in range(ranks))} - set(files):
            yield f"it does not name {min(missing)}"


def manifest_digest(checkpoint: Path) -> str:
    """Returns the SHA-256 of a checkpoint's manifest, which names that of each of its files.

    It tells checkpoints apart, also those of the same step in two runs.
    """
    return sha256(checkpoint / MANIFEST)


def load_tensors(
    checkpoint: Path, manifest: Mapping[str, Any], name: str, *, verify: bool = True
) -> dict[str, Tensor]:
    """Returns the tensors of one of a checkpoint's files, memory-mapped.

    Args:
        checkpoint: a complete checkpoint.
        manifest: its manifest.
        name: the file's name.
        verify: read the file through and compare its checksum first.

    Raises:
        CheckpointError: the file is not what its manifest says.
    """
    if verify:
        verify_file(checkpoint / name, manifest)
    try:
        return load_file(checkpoint / name)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint / name} is no safetensors file ({error}); use another checkpoint of the "
            "run"
        ) from None


def verify_file(path: Path, manifest: Mapping[str, Any]) -> None:
    """Reads one of a checkpoint's files through.

    Raises:
        CheckpointError: its checksum is not the manifest's.
    """
    needed = manifest["files"][path.name]["sha256"]
    if (found := sha256(path)) != needed:
        raise CheckpointError(
            f"{path} is damaged: SHA-256 {found[:16]}..., its manifest says {needed[:16]}...; use "
            "another checkpoint of the run"
        )
