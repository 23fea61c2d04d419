"""Whether a checkpoint's manifest says what one must say; pure.

`checkpoint.read_manifest` reads the file and looks at what it names; this looks at the JSON alone,
so that what uses a manifest may trust its keys and types, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

_LEAST = {"step": 0, "total_steps": 0, "world_size": 1, "num_labels": 1, "width": 1}


def manifest_faults(
    manifest: dict[str, Any], encoder_file: str, rows_file: Callable[[int, int], str]
) -> Iterator[str]:
    """Yields what is wrong with a manifest.

    Args:
        manifest: a JSON object. What `checkpoint.save` takes as details may lack.
        encoder_file: the file of the encoder, which it must name.
        rows_file: (rank, world size) -> the file of that rank's rows, which it must name.
    """
    for key, least in _LEAST.items():
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
        # Counted before they are named: the number of ranks may be 10^18.
        if len(files) <= ranks:
            yield f"it names {len(files)} files, needed {ranks} of rows and {encoder_file}"
        elif missing := {encoder_file, *(rows_file(r, ranks) for r in range(ranks))} - set(files):
            yield f"it does not name {min(missing)}"
