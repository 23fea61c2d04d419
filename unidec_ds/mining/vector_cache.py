"""The dual-encoder vectors that training steps make anyway, kept for mining.

A step encodes its queries and its pool labels. With `mining.source: cached` their vectors are kept
(the newest of each text, with the step it is from), and mining encodes only the texts that no step
has encoded since the mining before. What is kept are vectors of slightly older weights, made
without head dropout.

Each rank keeps the texts whose id it owns (`id % W`) in memory-mapped files under the run, which
every rank can read when mining:

    RUN/mining/vectors/
        queries-00000-of-00002.npy         fp16 [queries of that rank, D], by id // W
        queries-00000-of-00002.steps.npy   int32, the step each is from; -1 = none
        labels-...                         likewise
        record.json                        what the files are of; the last step they were synced at

**Resume is exact** without a copy of the files in the checkpoint. A run that crashed at step c
and goes on from a checkpoint of step s <= c finds the vectors of steps up to c. The steps from s on
run again and write the same vectors again, bit for bit, so before the next mining the files hold
what they held at that point in the undisturbed run; unless the crashed run had come past that
mining, whose vectors may be overwritten by now. But then what was mined is still there
(`remove_mined` spares what a checkpoint may come to) and is used again. Vectors that cannot serve
(another corpus or width, files missing or never synced at s) are dropped with a loud note, and the
next mining encodes more texts. At another world size the files are dealt out anew.

Cost: 2·D bytes per text on disk and in the page cache (LF-AmazonTitles-131K at D = 768: 0.65 GB;
2.2M queries and 1.3M labels: 5.4 GB), written at (B + P)·D·2 bytes a step.

Letters: n texts of one call, D width, W ranks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unidec_ds import comm
from unidec_ds.classifier import partition
from unidec_ds.data.pairs import Ids
from unidec_ds.errors import UserError
from unidec_ds.search import fixed_blocks

Kind = Literal["queries", "labels"]
KINDS: tuple[Kind, ...] = ("queries", "labels")

_RECORD = "record.json"
_COPY_BLOCK = 1 << 16  # rows dealt out at once at another world size


class VectorCache:
    """This rank's part of the kept vectors.

    Args:
        folder: where the files go, on a disk that every rank sees.
        sizes: number of train queries and of labels.
        width: D.
        details: what else must agree for vectors on disk to be used again (plain data).
        first_step: the step the run starts at (0: nothing on disk is used) or resumes at.

    Attributes:
        note: what went wrong with the vectors on disk; None if nothing did.

    Raises:
        UserError: the disk is full.

    Collectives: a broadcast and barriers; every rank must make it.
    """

    def __init__(
        self,
        folder: Path,
        sizes: Mapping[Kind, int],
        width: int,
        details: Mapping[str, Any],
        first_step: int,
    ) -> None:
        self._folder, self._sizes, self._width = folder, dict(sizes), width
        self._about = _about(sizes, width, details)
        found, fault = comm.broadcast_object(
            _find(folder, self._about, first_step) if comm.is_main() else (0, "")
        )
        self.note = None
        if first_step and fault:
            self.note = (
                f"mining: the vectors kept in {folder} cannot be used: {fault}. The next mining "
                "encodes the texts of earlier steps again, so from then on the curve may differ "
                "from that of an undisturbed run."
            )
        world_size = comm.world_size()
        if not found and comm.is_main():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        comm.barrier()
        if found != world_size:
            self._make(_Shards(folder, found, self._sizes) if found else None)
            comm.barrier()
        if comm.is_main() and found not in (0, world_size):
            for path in folder.glob(f"*-of-{found:05d}.*"):
                path.unlink()
        self._own = _Shard(folder, comm.rank(), world_size, "r+")
        if found not in (0, world_size):
            self.sync(first_step)
        comm.barrier()

    def keep(self, kind: Kind, ids: Ids, vectors_nD: Tensor, step: int) -> None:
        """Keeps those of the vectors whose ids this rank owns. No communication.

        Args:
            kind: what the ids are of.
            ids: int64 [n], without repetition.
            vectors_nD: float [n, D], L2-normalised.
            step: the step that made them.
        """
        own_n = partition.owner(ids, comm.world_size()) == comm.rank()
        rows = partition.local_row(ids[own_n], comm.world_size())
        chosen = vectors_nD.detach()[torch.from_numpy(own_n).to(vectors_nD.device)]
        self._own.vectors[kind][rows] = chosen.half().cpu().numpy()  # waits for the device
        self._own.steps[kind][rows] = step

    def sync(self, step: int) -> None:
        """Writes what was kept before `step` to disk; before a checkpoint of that step.

        Collectives: a barrier.
        """
        self._own.flush()
        comm.barrier()
        if comm.is_main():
            record = {**self._about, "world_size": comm.world_size(), "step": step}
            beside = self._folder / (_RECORD + ".new")
            beside.write_text(json.dumps(record) + "\n", encoding="utf-8")
            beside.replace(self._folder / _RECORD)

    def fresh(self, step: int, max_age_steps: int) -> FreshVectors:
        """Returns the vectors made in the `max_age_steps` steps before `step`, for reading.

        No rank may `keep` before every rank has read; mining ends with a barrier.

        Collectives: a barrier.
        """
        self._own.flush()
        comm.barrier()
        return FreshVectors(
            _Shards(self._folder, comm.world_size(), self._sizes), step - max_age_steps, step
        )

    def _make(self, before: _Shards | None) -> None:
        """Makes this rank's files, empty or with its part of another world size's."""
        rank, world_size = comm.rank(), comm.world_size()
        for kind, size in self._sizes.items():
            ids = partition.label_ids(
                np.arange(partition.num_local_rows(size, rank, world_size)), rank, world_size
            )
            vectors = _new_file(
                _path(self._folder, kind, rank, world_size), np.float16, (len(ids), self._width)
            )
            steps = _new_file(
                _steps_path(self._folder, kind, rank, world_size), np.int32, (len(ids),)
            )
            steps[:] = -1
            if before is None:
                continue
            for start, end in fixed_blocks(len(ids), _COPY_BLOCK):
                vectors[start:end] = before.read(kind, ids[start:end])
                steps[start:end] = before.steps(kind)[ids[start:end]]


def open_fresh(
    folder: Path,
    sizes: Mapping[Kind, int],
    width: int,
    details: Mapping[str, Any],
    step: int,
    max_age_steps: int,
) -> FreshVectors | None:
    """Returns what a run kept in the `max_age_steps` steps before `step`; None if it kept nothing.

    For reading a run that is over; arguments as for `VectorCache` and `VectorCache.fresh`. No
    communication.
    """
    world_size, _ = _find(folder, _about(sizes, width, details), step)
    if not world_size:
        return None
    return FreshVectors(_Shards(folder, world_size, sizes), step - max_age_steps, step)


class FreshVectors:
    """The kept vectors that mining may use, of every rank.

    Made by `VectorCache.fresh` and `open_fresh`.

    Attributes:
        is_fresh: by kind, bool by id.
    """

    def __init__(self, shards: _Shards, first_step: int, end_step: int) -> None:
        self._shards = shards
        self.is_fresh: dict[Kind, NDArray[np.bool_]] = {}
        for kind in KINDS:
            steps = shards.steps(kind)
            self.is_fresh[kind] = (steps >= max(first_step, 0)) & (steps < end_step)

    def read(self, kind: Kind, ids: Ids) -> Tensor:
        """Returns the vectors of some texts, fp32 [n, D] on the host; all must be fresh."""
        assert self.is_fresh[kind][ids].all()
        return torch.from_numpy(self._shards.read(kind, ids)).float()


class _Shard:
    """One rank's files, memory-mapped."""

    def __init__(self, folder: Path, rank: int, world_size: int, mode: Literal["r", "r+"]) -> None:
        self.vectors = {k: np.load(_path(folder, k, rank, world_size), mode) for k in KINDS}
        self.steps = {k: np.load(_steps_path(folder, k, rank, world_size), mode) for k in KINDS}

    def flush(self) -> None:
        for array in (*self.vectors.values(), *self.steps.values()):
            array.flush()


class _Shards:
    """Every rank's files, for reading by id."""

    def __init__(self, folder: Path, world_size: int, sizes: Mapping[Kind, int]) -> None:
        self._shards = [_Shard(folder, rank, world_size, "r") for rank in range(world_size)]
        self._sizes = sizes

    def steps(self, kind: Kind) -> NDArray[np.int32]:
        """Returns the step of every text, by id."""
        steps = np.empty(self._sizes[kind], np.int32)
        for rank, shard in enumerate(self._shards):
            part = steps[rank :: len(self._shards)]
            part[:] = shard.steps[kind][: len(part)]
        return steps

    def read(self, kind: Kind, ids: Ids) -> NDArray[np.float16]:
        """Returns the vectors of some texts, [n, D]."""
        world_size = len(self._shards)
        owners = partition.owner(ids, world_size)
        vectors = np.empty((len(ids), self._shards[0].vectors[kind].shape[1]), np.float16)
        for rank, shard in enumerate(self._shards):
            own = owners == rank
            vectors[own] = shard.vectors[kind][partition.local_row(ids[own], world_size)]
        return vectors


def _about(sizes: Mapping[Kind, int], width: int, details: Mapping[str, Any]) -> dict[str, Any]:
    return {"sizes": dict(sizes), "width": width, **details}


def _find(folder: Path, about: Mapping[str, Any], first_step: int) -> tuple[int, str]:
    """Returns the world size of usable files and "", or 0 and what is wrong with them."""
    path = folder / _RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        world_size, step = int(record.pop("world_size")), int(record.pop("step"))
        if record != about:
            return 0, f"they are of {record}, needed are those of {about}"
        if not 0 < first_step <= step:
            return 0, f"they were last synced at step {step}, needed is step {first_step}"
        _Shards(folder, world_size, about["sizes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return 0, f"{type(error).__name__}: {error}"
    return world_size, ""


def _path(folder: Path, kind: Kind, rank: int, world_size: int) -> Path:
    return folder / f"{kind}-{rank:05d}-of-{world_size:05d}.npy"


def _steps_path(folder: Path, kind: Kind, rank: int, world_size: int) -> Path:
    return _path(folder, kind, rank, world_size).with_suffix(".steps.npy")


def _new_file(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    """Returns a new memory-mapped array of zeros, its disk space reserved.

    It has at least one row, as an empty file cannot be mapped.
    """
    shape = (max(1, shape[0]), *shape[1:])
    try:
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise UserError(
            f"mining.source: {path} cannot hold the kept vectors: {error}; free disk space, choose "
            "another --output, or set mining.source to encode"
        ) from error
    return array
