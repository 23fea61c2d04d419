"""Checkpoints: safetensors and JSON, nothing that executes code when it is loaded.

    RUN/checkpoints/step_00000120/
        encoder.safetensors               encoder and heads in fp32, with both Adam moments
        rows-00000-of-00002.safetensors   one rank's classifier rows and moments
        manifest.json                     step, shapes, size and SHA-256 of every file; last
    RUN/checkpoints/latest                the name of the newest complete one
    RUN/checkpoints/best.json             which one scored best on validation, with `keep_best`

A checkpoint is written into a folder beside, synced, and renamed when its manifest is in place; one
that is removed loses its manifest first. A folder with a manifest is therefore always whole, at
every moment at which a process may be killed. Where the same step is written again after a resume,
the old one stands aside as `step_00000120.replaced` until the new one is in place, and is as good.

Tensors are stored by parameter name and by rank of the label partition, independent of ZeRO stage
and placement; any world size can read them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field
from torch import Tensor

from unidec_ds import comm
from unidec_ds.classifier.table import ClassifierTable
from unidec_ds.durable import stream_tensors, sync_folder, write_tensors, write_text
from unidec_ds.errors import CheckpointError, SaveError
from unidec_ds.manifest import (
    ENCODER_FILE,
    FORMAT_VERSION,
    MANIFEST,
    load_tensors,
    read_manifest,
    rows_file,
    verify_file,
)
from unidec_ds.settings import Settings

T = TypeVar("T")

_LATEST, _BEST = "latest", "best.json"
_NAME = re.compile(r"step_([0-9]{8,18})(\.replaced)?")


class CheckpointConfig(Settings):
    """When checkpoints are written. One is always written at the end."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """Write one after every n-th step; 0 only at the end."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many to keep; older ones are removed once a new one is complete."""
    in_background: bool = True
    """Write files while training goes on, those of `every_steps`. What is on disk is the state at
    the step of the save; host memory grows by the rows that steps touch meanwhile."""
    keep_best: bool = False
    """Keep the one that scores best on the validation queries too, written right after their
    evaluation (`evaluation.every_epochs`)."""
    best_metric: Literal["P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@5", "R@10", "R@100"] = "P@1"
    """What the best is best in: a metric of the last view trained, larger is better."""


@dataclass(frozen=True)
class Best:
    """The checkpoint that scored best on the validation queries."""

    name: str
    """Its folder's name."""
    step: int
    """Number of steps taken."""
    metric: str
    """View and metric, such as "unified P@1"."""
    value: float
    """What it scored, in percent."""


class Save:
    """The checkpoint of the state after `step` steps, written while further steps are taken.

    Making one begins to write in a thread of its own; `finish` waits and makes it a checkpoint.
    Checkpoints of later steps, which a resume from an earlier one has left behind, are removed.

    Args:
        run: the run directory.
        step: number of steps taken.
        encoder_tensors: what `Engine.state` returned; written by rank 0.
        table: its rows are written by each rank.
        keep: checkpoints to keep, beside the best one.
        details: further entries of the manifest (plain data).

    Raises:
        SaveError: by `finish` or here, on every rank, if one of them could not write, such as to a
            full disk. What was written is removed, and older checkpoints are as they were.

    Collectives: three gathers of file names, here and in `finish`; every rank must make one and
    `finish` it before the next.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        encoder_tensors: Mapping[str, Tensor],
        table: ClassifierTable,
        *,
        keep: int,
        details: Mapping[str, Any],
    ) -> None:
        self._run, self.step, self._keep = run, step, keep
        self._encoder_tensors = encoder_tensors if comm.is_main() else {}
        self._snapshot = table.snapshot()
        self._manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world_size": comm.world_size(),
            "num_labels": table.num_labels,
            "width": table.width,
            **details,
        }
        self._final = place(run, step)
        self._partial = self._final.with_name(f"{self._final.name}.partial")
        self._on_rank_0(self._make_folder)
        worker = ThreadPoolExecutor(1, "checkpoint")
        self._written = worker.submit(self._write_files)
        worker.shutdown(wait=False)

    def is_written(self) -> bool:
        """Returns whether this rank's files are written, or failed to be."""
        return self._written.done()

    def finish(self) -> Path:
        """Waits for the files of all ranks and makes them a checkpoint; returns its folder."""
        files: dict[str, Any] = {}
        for written in self._on_every_rank(self._written.result):
            files.update(written)
        manifest = {**self._manifest, "files": files}
        self._on_rank_0(lambda: _publish(self._partial, self._final, manifest, self._keep))
        return self._final

    def _make_folder(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)

    def _write_files(self) -> dict[str, dict[str, Any]]:
        written = {}
        if comm.is_main():
            path = self._partial / ENCODER_FILE
            written[ENCODER_FILE] = write_tensors(path, self._encoder_tensors)
        shard = rows_file(comm.rank(), comm.world_size())
        snapshot = self._snapshot
        written[shard] = stream_tensors(self._partial / shard, snapshot.shapes(), snapshot.read())
        return written

    def _on_rank_0(self, work: Callable[[], None]) -> None:
        self._on_every_rank(work if comm.is_main() else lambda: None)

    def _on_every_rank(self, work: Callable[[], T]) -> list[T]:
        """Returns what `work` returned on each rank; raises SaveError on all if one failed."""
        done, fault = [], ""
        try:
            done.append(work())
        except OSError as error:
            fault = f"rank {comm.rank()}: {error}"
        outcomes = comm.gather_objects((done, fault))
        faults = [fault for _, fault in outcomes if fault]
        if faults:
            if comm.is_main():
                shutil.rmtree(self._partial, ignore_errors=True)
            raise SaveError(
                f"the checkpoint of step {self.step} could not be written to "
                f"{self._partial.parent}: {'; '.join(faults)}. Last good checkpoint: "
                f"{latest(self._run) or 'none'}. Free disk space, then go on with --resume auto."
            )
        return [result for done, _ in outcomes for result in done]


def write_best(run: Path, step: int, metric: str, value: float, *, keep: int) -> None:
    """Notes that the checkpoint of `step`, the newest, is the best so far; removes the one before.

    For one rank to call.
    """
    best = Best(place(run, step).name, step, metric, value)
    write_text(run / "checkpoints" / _BEST, json.dumps(asdict(best)) + "\n")
    _prune(run / "checkpoints", step, keep)


def best(run: Path) -> Best | None:
    """Returns what `write_best` noted, None if there is nothing or its checkpoint is gone."""
    try:
        noted = Best(**json.loads((run / "checkpoints" / _BEST).read_text(encoding="utf-8")))
        is_there = (run / "checkpoints" / noted.name / MANIFEST).is_file()
        return noted if is_there and _NAME.fullmatch(noted.name) else None
    except (OSError, ValueError, TypeError):
        return None


def _publish(partial: Path, final: Path, manifest: Mapping[str, Any], keep: int) -> None:
    """Gives a checkpoint whose files are written its manifest and its name; removes old ones."""
    checkpoints = final.parent
    write_text(partial / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    sync_folder(partial)
    replaced = final.with_name(f"{final.name}.replaced")
    if (final / MANIFEST).is_file():  # the same step again, after a resume
        _remove(replaced)
        final.rename(replaced)
    else:
        shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    write_text(checkpoints / _LATEST, final.name + "\n")
    sync_folder(checkpoints)
    _prune(checkpoints, manifest["step"], keep)


def _prune(checkpoints: Path, step: int, keep: int) -> None:
    """Removes all but the best checkpoint and the newest of those up to `step`."""
    saved = _complete(checkpoints)
    newest = sorted(other for other in saved if other <= step)[-keep:]
    spared = {saved[other] for other in newest}
    noted = best(checkpoints.parent)
    if noted is not None and noted.step <= step:
        spared.add(checkpoints / noted.name)
    for folder in checkpoints.glob("step_*"):
        if folder not in spared:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Removes a checkpoint; what a kill leaves of it has no manifest, so it is none."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def place(run: Path, step: int) -> Path:
    """Returns where the checkpoint of a step goes."""
    return run / "checkpoints" / f"step_{step:08d}"


def latest(run: Path) -> Path | None:
    """Returns the newest complete checkpoint of a run directory, None if there is none."""
    pointer = run / "checkpoints" / _LATEST
    if pointer.is_file():
        name = pointer.read_bytes().decode("utf-8", "replace").strip()
        if _NAME.fullmatch(name) and (pointer.parent / name / MANIFEST).is_file():
            return pointer.parent / name
    saved = _complete(run / "checkpoints")
    return saved[max(saved)] if saved else None


def kept_steps(run: Path) -> list[int]:
    """Returns the steps of a run's complete checkpoints, ascending."""
    return sorted(_complete(run / "checkpoints"))


def newest_first(run: Path) -> list[Path]:
    """Returns a run's complete checkpoints: `latest`, then the older ones."""
    newest, saved = latest(run), _complete(run / "checkpoints")
    older = [saved[step] for step in sorted(saved, reverse=True) if saved[step] != newest]
    if newest is None:
        return []
    return [newest, *(folder for folder in older if _step_of(folder) <= _step_of(newest))]


def choose(run: Path, which: str) -> Path:
    """Returns a complete checkpoint of a run.

    Args:
        run: the run directory.
        which: "latest", "best" or the checkpoint's folder.

    Raises:
        CheckpointError: there is none.
    """
    if which == "latest":
        newest = latest(run)
        if newest is None:
            raise CheckpointError(f"{run} has no complete checkpoint yet")
        return newest
    if which == "best":
        noted = best(run)
        if noted is None:
            raise CheckpointError(
                f"{run} kept no best checkpoint; train with checkpoint.keep_best true, "
                "evaluation.every_epochs above 0 and validation queries"
            )
        return run / "checkpoints" / noted.name
    if not (Path(which) / MANIFEST).is_file():
        raise CheckpointError(f"{which} is no complete checkpoint; needs latest, best or a folder")
    return Path(which)


def find_damage(checkpoint: Path) -> str | None:
    """Reads all of a checkpoint; returns what is wrong with it, the same on every rank.

    Collectives: one gather of small objects; the ranks share the files among them.
    """
    try:
        manifest, fault = read_manifest(checkpoint), None
        for name in sorted(manifest["files"])[comm.rank() :: comm.world_size()]:
            verify_file(checkpoint / name, manifest)
    except (CheckpointError, OSError) as error:
        fault = str(error)
    return next((found for found in comm.gather_objects(fault) if found), None)


def _complete(checkpoints: Path) -> dict[int, Path]:
    """Returns the folders of complete checkpoints by step."""
    found: dict[int, Path] = {}
    for manifest in sorted(checkpoints.glob(f"step_*/{MANIFEST}"), reverse=True):
        if _NAME.fullmatch(manifest.parent.name):  # "step_X" comes after "step_X.replaced"
            found[_step_of(manifest.parent)] = manifest.parent
    return found


def _step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def load_rows(checkpoint: Path, manifest: Mapping[str, Any], table: ClassifierTable) -> None:
    """Fills this rank's table from the shards of a checkpoint made at any world size.

    Their checksums are not compared again: `find_damage` is for that.

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
        table.load_state(load_tensors(checkpoint, manifest, name, verify=False))
        return
    for rank in range(saved_ranks):
        name = rows_file(rank, saved_ranks)
        shard = load_tensors(checkpoint, manifest, name, verify=False)
        table.load_shard(shard, rank, saved_ranks)
