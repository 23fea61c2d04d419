"""What one mining found, and its files.

    RUN/mining/epoch-0005/
        shortlists.npy    int32 [number of train queries, K]
        clusters.npy      int32 [N], with clustered batches
        mined.json        how long it took and what it encoded

The files are memory-mapped by every rank and kept for as long as a checkpoint may need them.

Letters: N queries mined for, K shortlist length.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unidec_ds.errors import CheckpointError
from unidec_ds.shared_storage import appears

_SHORTLISTS, _CLUSTERS, _RECORD = "shortlists.npy", "clusters.npy", "mined.json"


@dataclass(frozen=True)
class MiningSeconds:
    """How long mining took on rank 0."""

    embed_s: float
    """Encoding this rank's share of the texts (and the exchange of query vectors)."""
    search_s: float
    """Scores and their best, waiting for the other ranks, merging."""
    cluster_s: float
    """Clustering; about 0 without clusters."""

    @property
    def total_s(self) -> float:
        """The sum."""
        return self.embed_s + self.search_s + self.cluster_s


@dataclass(frozen=True)
class MiningTexts:
    """Where the vectors of the texts came from."""

    encoded: int
    """Texts that mining encoded."""
    reused: int
    """Texts whose vectors were kept from training steps; 0 without `source: cached`."""


@dataclass(frozen=True)
class Mined:
    """What one mining found, memory-mapped; what `Planner` takes."""

    epoch: int
    """The epoch it was mined for."""
    shortlists: NDArray[np.int32]
    """[number of train queries, K] label ids by query_id, best first; -1 = empty, as is the whole
    row of a query that was not mined for."""
    clusters: NDArray[np.int32] | None
    """[N], the cluster of each of the query ids that were mined for; None without clusters."""
    seconds: MiningSeconds
    """How long it took."""
    texts: MiningTexts
    """What was encoded for it."""
    recall: float
    """Share of the exact shortlists that was found, 0..1, on a sample; 1 for an exact search."""

    def figures(self) -> dict[str, float]:
        """Returns what the log says about it."""
        return {
            **asdict(self.seconds),
            "total_s": self.seconds.total_s,
            "texts_encoded": self.texts.encoded,
            "texts_reused": self.texts.reused,
            "recall": self.recall,
        }


def open_mined(folder: Path, epoch: int, *, is_new: bool = False) -> Mined:
    """Opens, memory-mapped, what `write_mined` wrote for `epoch`.

    Args:
        folder: where it is.
        epoch: the epoch that it was mined for.
        is_new: whether it was written just now, maybe by another node; it may show late then.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    place = _folder(folder, epoch)
    if is_new:
        appears(lambda: is_mined(folder, epoch), folder.parent, folder)
    try:
        record = json.loads((place / _RECORD).read_text(encoding="utf-8"))
        clusters = np.load(place / _CLUSTERS, mmap_mode="r") if record["clusters"] else None
        shortlists = np.load(place / _SHORTLISTS, mmap_mode="r")
        for array, what, ndim in ((shortlists, _SHORTLISTS, 2), (clusters, _CLUSTERS, 1)):
            if array is not None and (array.ndim, array.dtype) != (ndim, np.int32):
                raise ValueError(f"{what} holds {array.dtype} of shape {array.shape}")
        numbers = [*record["seconds"].values(), *record["texts"].values()]
        if not all(type(number) in (int, float) for number in numbers):
            raise ValueError(f"{_RECORD} holds {numbers}, needed numbers")
        return Mined(
            epoch=epoch,
            shortlists=shortlists,
            clusters=clusters,
            seconds=MiningSeconds(**record["seconds"]),
            texts=MiningTexts(**record["texts"]),
            recall=float(record["recall"]),
        )
    except Exception as error:  # NumPy and json have a dozen kinds for damaged files
        raise CheckpointError(
            f"{place}: cannot open the shortlists mined for epoch {epoch} ({error}); needed "
            f"{_SHORTLISTS} and {_RECORD} as mining wrote them, on a disk that every rank sees. "
            "Resume from a checkpoint of an earlier epoch, or put the folder back."
        ) from None


def is_mined(folder: Path, epoch: int) -> bool:
    """Returns whether `folder` holds what was mined for `epoch`."""
    return (_folder(folder, epoch) / _RECORD).is_file()


def remove_mined(folder: Path, keep: Collection[int]) -> None:
    """Removes what was mined for all epochs but those in `keep`. For one rank to call."""
    for place in folder.glob("epoch-*"):
        if place.name not in {_folder(folder, epoch).name for epoch in keep}:
            shutil.rmtree(place)


def write_mined(
    folder: Path,
    epoch: int,
    shortlists: NDArray[np.int32],
    clusters: NDArray[np.int32] | None,
    seconds: MiningSeconds,
    texts: MiningTexts,
    recall: float,
) -> None:
    """Writes one mining's files; whole or not there. What `folder` holds of `epoch` is replaced."""
    place = _folder(folder, epoch)
    partial = place.with_name(f".{place.name}.partial")
    for stale in (partial, place):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    np.save(partial / _SHORTLISTS, shortlists)
    if clusters is not None:
        np.save(partial / _CLUSTERS, clusters)
    record = {
        "clusters": clusters is not None,
        "seconds": asdict(seconds),
        "texts": asdict(texts),
        "recall": recall,
    }
    (partial / _RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    partial.rename(place)


def _folder(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch:04d}"
