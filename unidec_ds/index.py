"""Approximate nearest labels, by FAISS; the only module that knows it.

Exact search (`search`) reads every vector for every query. Above some number of vectors an
approximate index reads a few: IVF those of the lists nearest to the query, HNSW those along a walk
through a graph. Knows arrays, no run and no view:

    index = build_index(vectors_LV, kind, config)         # once
    index.save(path, record)
    index = open_index(path, kind, config, record)        # mapped: milliseconds, little memory
    scores_QK, ids_QK = index.search(queries_QV, k, vectors_LV)

The index finds more candidates than asked for, from vectors stored in fp16 or int8, and their
scores are computed again from the fp32 vectors: what it returns are exact scores in exact order
(score descending, id ascending); all that can be wrong is that a better vector was not found.

Cost of building: IVF about 2·L·V·(lists + 10·40·lists²/L) operations, 0.1 s per 1,000 vectors and
core; HNSW several times that. Memory while building: L·V·2 bytes (int8: 1 byte), HNSW
L·links·8 bytes more, and 40 vectors per list to train on. Nothing is read whole afterwards.

Letters: L vectors, V their width, Q queries, K kept, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from unidec_ds import stamp
from unidec_ds.errors import UserError
from unidec_ds.settings import Settings

ApproximateKind = Literal["ivf", "hnsw"]
IndexKind = Literal["exact", "ivf", "hnsw"]
IndexChoice = Literal["auto", "exact", "ivf", "hnsw"]

_ADD_BLOCK = 16384  # vectors read from the mapped array and added at once
_TRAIN_PER_LIST = 40  # vectors per list that the lists' centres are fitted to
_SEARCH_QUERIES, _SEARCH_BYTES = 256, 64 << 20  # at once: queries, and candidates' vectors
# The settings that an index cannot be opened with others of.
_SHAPING: dict[str, tuple[str, ...]] = {
    "ivf": ("storage", "lists"),
    "hnsw": ("storage", "links", "build_depth"),
}


class IndexConfig(Settings):
    """How labels are searched."""

    kind: IndexChoice = "auto"
    """`exact` compares with every vector. `ivf` and `hnsw` are approximate: hnsw answers a single
    query fastest, but takes longest to build and most memory. `auto` is exact up to `exact_up_to`
    vectors and ivf above."""
    exact_up_to: Annotated[int, Field(ge=0)] = 200_000
    """Most vectors that `auto` searches exactly: up to there a single query reads at most 600 MB at
    V = 768, some tens of milliseconds, and nothing has to be built or can be missed."""
    storage: Literal["fp16", "int8"] = "int8"
    """How an index holds its vectors. Scores are computed again from the fp32 vectors either way,
    so that int8 finds as much: on the 9,412 labels of a trained run the same at any `probes`."""
    lists: Annotated[int, Field(ge=0)] = 0
    """Of ivf: lists that the vectors are shared over; 0 = 4·sqrt(L)."""
    probes: Annotated[int, Field(ge=1)] = 64
    """Of ivf: lists read per query. More find more and cost more, in proportion. On the 9,412
    labels of a trained run 16, 32, 64 and 128 found 91, 96, 98.5 and 99.5% of the exact 10 best."""
    links: Annotated[int, Field(ge=4, le=128)] = 32
    """Of hnsw: neighbours per vector in the graph."""
    build_depth: Annotated[int, Field(ge=8)] = 80
    """Of hnsw: candidates held while a vector is linked. More link better and cost more, once."""
    search_depth: Annotated[int, Field(ge=8)] = 128
    """Of hnsw: candidates held while a query is searched. More find more and cost more."""


def chosen_kind(config: IndexConfig, num_vectors: int) -> IndexKind:
    """Returns what `config` means for this many vectors."""
    if config.kind != "auto":
        return config.kind
    return "exact" if num_vectors <= config.exact_up_to else "ivf"


def is_approximate(kind: IndexKind) -> TypeGuard[ApproximateKind]:
    """Returns whether a kind is one of this module's indexes."""
    return kind != "exact"


class ApproximateIndex:
    """A FAISS index over L vectors. Made by `build_index` or `open_index`.

    Args:
        index: the FAISS index; the position of a vector is its id.
        kind: what it is.
        config: how deep to search.
        record: what its file says it is; empty if it comes from none.
    """

    def __init__(
        self,
        index: Any,
        kind: ApproximateKind,
        config: IndexConfig,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.kind = kind
        self.record = record or {}
        self._index, self._config = index, config

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def width(self) -> int:
        """V."""
        return int(self._index.d)

    def search(
        self, queries_QV: Tensor, k: int, vectors_LV: NDArray[np.float32]
    ) -> tuple[Tensor, Tensor]:
        """Returns nearly the k vectors of largest inner product for each query.

        Args:
            queries_QV: float [Q, V], on any device; the search runs on the CPU, or where FAISS was
                built for a GPU, there (ivf).
            k: vectors per query.
            vectors_LV: what the index was built from, mapped or not; about 2·k of its rows are
                read per query.

        Returns:
            (scores fp32 [Q, k], ids int64 [Q, k]) on the queries' device, score descending, id
            ascending; the rest of a query with fewer than k is (-inf, -1). As `exact_search`.
        """
        assert vectors_LV.shape == (len(self), self.width)
        queries = np.ascontiguousarray(queries_QV.detach().float().cpu().numpy())
        scores_QK = torch.full((len(queries), k), -torch.inf)
        ids_QK = torch.full((len(queries), k), -1)
        depth = min(2 * k + 10, len(self))
        parameters = self._parameters(depth)
        step = max(1, min(_SEARCH_QUERIES, _SEARCH_BYTES // (4 * depth * self.width)))
        for start in range(0, len(queries), step):
            block = slice(start, min(start + step, len(queries)))
            _, found_QC = self._index.search(queries[block], depth, params=parameters)
            scores, ids = _score_again(queries[block], found_QC, vectors_LV, min(k, depth))
            scores_QK[block, : scores.shape[1]], ids_QK[block, : ids.shape[1]] = scores, ids
        return scores_QK.to(queries_QV.device), ids_QK.to(queries_QV.device)

    def save(self, path: Path, record: Mapping[str, Any]) -> None:
        """Writes the index and its record; a file that is there already is replaced as a whole.

        Args:
            path: where, in a folder that exists.
            record: what the vectors are, which `open_index` checks, and anything else of note. The
                settings that shaped the index are added.
        """
        # For who reads the file with FAISS alone, which by itself reads one list of ivf.
        if self.kind == "ivf":
            self._index.nprobe = min(self._config.probes, int(self._index.nlist))
        else:
            self._index.hnsw.efSearch = self._config.search_depth
        beside = path.with_suffix(".new")
        _faiss().write_index(self._index, str(beside))
        stamp.put(beside, path, _whole_record(self.kind, self._config, record))

    def _parameters(self, depth: int) -> Any:
        """Returns how deep to search for `depth` candidates: deeper than configured for many."""
        if self.kind == "hnsw":
            return _faiss().SearchParametersHNSW(efSearch=max(self._config.search_depth, 2 * depth))
        lists = int(self._index.nlist)
        wanted = math.ceil(4 * depth * lists / max(1, len(self)))
        return _faiss().SearchParametersIVF(nprobe=min(lists, max(self._config.probes, wanted)))


def build_index(
    vectors_LV: NDArray[np.float32],
    kind: ApproximateKind,
    config: IndexConfig,
    *,
    show_progress: bool = True,
) -> ApproximateIndex:
    """Returns an index over the rows of `vectors_LV`, whose ids are their numbers.

    The same vectors, settings and number of threads give the same index.

    Args:
        vectors_LV: fp32 [L, V], mapped or not, read block by block; L is at least 1.
        kind: what to build.
        config: its settings.
        show_progress: draw a bar on standard error.
    """
    num_vectors, width = vectors_LV.shape
    index = _empty_index(kind, config, num_vectors, width)
    title = f"building the {kind} index (once)"
    with tqdm(total=num_vectors, desc=title, unit=" vectors", disable=not show_progress) as bar:
        sample_size = num_vectors
        if kind == "ivf":
            sample_size = min(num_vectors, _TRAIN_PER_LIST * int(index.nlist))
        elif config.storage == "fp16":
            sample_size = min(num_vectors, 1)  # nothing to learn
        spread = np.linspace(0, num_vectors - 1, sample_size).astype(np.int64)
        index.train(np.ascontiguousarray(vectors_LV[spread]))
        for start in range(0, num_vectors, _ADD_BLOCK):
            block = np.ascontiguousarray(vectors_LV[start : start + _ADD_BLOCK])
            index.add(block)
            bar.update(len(block))
    return ApproximateIndex(index, kind, config)  # in host memory: FAISS writes no other to a file


def write_exact_index(vectors_LV: NDArray[np.float32], path: Path) -> None:
    """Writes a FAISS index that compares with every vector: for others, this package needs none.

    Args:
        vectors_LV: fp32 [L, V], mapped or not, read block by block.
        path: where, in a folder that exists.

    Memory: L·V·4 bytes.
    """
    faiss = _faiss()
    index = faiss.IndexFlatIP(vectors_LV.shape[1])
    for start in range(0, len(vectors_LV), _ADD_BLOCK):
        index.add(np.ascontiguousarray(vectors_LV[start : start + _ADD_BLOCK]))
    faiss.write_index(index, str(path))


def open_index(
    path: Path, kind: ApproximateKind, config: IndexConfig, record: Mapping[str, Any]
) -> ApproximateIndex:
    """Opens a saved index, memory-mapped: nothing is read before a search wants it.

    Args:
        path: the file that `save` wrote.
        kind: what it has to be.
        config: its settings; those that only a search uses may differ from when it was built.
        record: what its vectors have to be.

    Raises:
        UserError: there is none, it is damaged, or it was made from something else.
    """
    needed = _whole_record(kind, config, record)
    if (fault := stamp.mismatch(path, needed)) is not None:
        raise UserError(f"{path} is not the index that was needed: {fault}")
    try:
        # The older IO_FLAG_MMAP maps the lists of ivf only; this one maps vectors and graph too.
        index = _faiss().read_index(str(path), _faiss().IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[-1]}") from error
    return ApproximateIndex(_on_gpu(index, kind), kind, config, stamp.read_record(path))


def recorded_config(path: Path) -> tuple[ApproximateKind, IndexConfig]:
    """Returns the kind of a saved index and the settings that shaped it.

    Raises:
        UserError: there is no such file, or its record is not that of an index.
    """
    record = stamp.read_record(path)
    names = _SHAPING.get(record.get("kind", ""), ())
    try:
        if not names:
            raise ValueError(f"its kind is {record.get('kind')}")
        config = IndexConfig(kind=record["kind"], **{name: record[name] for name in names})
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path} is not an index of ours: {stamp.record_path(path).name} beside it does not "
            f"say what it is ({error})"
        ) from error
    return record["kind"], config


def recall(found_QK: Tensor, exact_QK: Tensor) -> float:
    """Returns the share of the exact ids that were found, 0..1; -1 in either stands for none."""
    is_there = (found_QK[:, :, None] == exact_QK[:, None, :]) & (exact_QK >= 0)[:, None, :]
    return float(is_there.any(1).sum() / (exact_QK >= 0).sum().clamp(min=1))


def _whole_record(
    kind: ApproximateKind, config: IndexConfig, record: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns `record` with the settings that shape an index of this kind."""
    return {**record, "kind": kind, **{name: getattr(config, name) for name in _SHAPING[kind]}}


def _empty_index(kind: ApproximateKind, config: IndexConfig, num_vectors: int, width: int) -> Any:
    faiss = _faiss()
    types = {"fp16": faiss.ScalarQuantizer.QT_fp16, "int8": faiss.ScalarQuantizer.QT_8bit}
    storage, metric = types[config.storage], faiss.METRIC_INNER_PRODUCT
    if kind == "hnsw":
        graph = faiss.IndexHNSWSQ(width, storage, config.links, metric)
        graph.hnsw.efConstruction = config.build_depth
        return graph
    lists = min(config.lists or int(4 * math.sqrt(num_vectors)), num_vectors)
    centres = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFScalarQuantizer(centres, width, lists, storage, metric)
    index.cp.min_points_per_centroid = 1  # of few vectors it would complain on standard error
    index.cp.max_points_per_centroid = _TRAIN_PER_LIST
    return index


def _on_gpu(index: Any, kind: ApproximateKind) -> Any:
    """Returns the index on the first GPU if FAISS was built for one, else as it is.

    The GPU build of FAISS is not among the packages this project is tested with.
    """
    faiss = _faiss()
    if kind != "ivf" or not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        return index
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)


def _faiss() -> Any:
    """Returns the module; imported when it is needed, and untyped, as FAISS is."""
    import faiss

    return faiss


def _score_again(
    queries_QV: NDArray[np.float32],
    found_QC: NDArray[np.int64],
    vectors_LV: NDArray[np.float32],
    k: int,
) -> tuple[Tensor, Tensor]:
    """Returns the best k of each query's candidates by exact score; -1 marks no candidate."""
    ids_QC = torch.from_numpy(np.sort(found_QC, axis=1))  # ids ascending, for ties
    rows_QCV = torch.from_numpy(vectors_LV[ids_QC.clamp(min=0).numpy()])
    # Not a matrix product: equal rows have to get equal scores, wherever they stand.
    scores_QC = rows_QCV.mul_(torch.from_numpy(queries_QV)[:, None]).sum(2)
    scores_QC.masked_fill_(ids_QC < 0, -torch.inf)
    order_QC = scores_QC.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores_QC.gather(1, order_QC), ids_QC.gather(1, order_QC)
