"""Mining's approximate search: a FAISS index built for one mining and dropped after it.

Where comparing every query with every label costs too much, mining writes the label vectors into
one file (every rank encodes its share, rank 0 writes), rank 0 builds an IVF index of them beside
it, and every rank maps both and searches its share of the queries, cut at fixed places. An index
knows nothing of positives and filter pairs, so it is asked for more labels than are wanted, and
those that are barred are dropped: K + the most barred labels of a query in the block, but at most
5·K. A query with more barred labels than that, or one that finds too little in the lists it looks
into, keeps fewer than K; the rest of its shortlist is empty (-1), as with few labels.

Cost: L·D·4 bytes of disk for the vectors and about half of that for the index, while mining; a
gather of L·D·4 bytes to rank 0; see `index` for building and searching.

Letters: M labels that have a text, L all labels, D width, N queries, B queries of a block, C
candidates of a query, K shortlist length, W ranks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unidec_ds import comm
from unidec_ds.data.pairs import Ids, Pairs
from unidec_ds.index import IndexConfig, build_index, open_index, recall
from unidec_ds.search import TopK, exact_search, fixed_blocks

_CONFIG = IndexConfig(kind="ivf")
_QUERY_BLOCK = 1024  # queries one rank searches before the next block's turn
_MAX_DEPTH = 5  # times K
_SAMPLE = 256  # queries whose shortlists are compared with those of an exact search

Barred = Sequence[Pairs]
"""Sets of pairs (position of a query, label id) that may not be found."""


class MiningIndex:
    """The label vectors and their index, on disk while a mining lasts.

    Args:
        folder: where the files go, on a disk that every rank sees; replaced.
        label_ids: int64 [M], the labels that have a text, ascending.
        width: D.
        embed_labels: returns the vectors of some labels, fp32 [n, D]; called on blocks of
            `text_block` labels.
        text_block: labels encoded at once.

    Collectives: gathers of all vectors to rank 0 and barriers; every rank must make it.
    """

    def __init__(
        self,
        folder: Path,
        label_ids: Ids,
        width: int,
        embed_labels: Callable[[Ids], Tensor],
        text_block: int,
    ) -> None:
        self._folder, self._label_ids = folder, label_ids
        path, record = folder / "labels.npy", {"num_labels": len(label_ids), "width": width}
        file = None
        if comm.is_main():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            file = np.lib.format.open_memmap(path, "w+", np.float32, (len(label_ids), width))
        blocks = fixed_blocks(len(label_ids), text_block)
        for first in range(0, len(blocks), comm.world_size()):
            turn = blocks[first : first + comm.world_size()]
            sizes = [stop - start for start, stop in turn]
            sizes += [0] * (comm.world_size() - len(turn))
            start = turn[0][0] + sum(sizes[: comm.rank()])
            own_nD = embed_labels(label_ids[start : start + sizes[comm.rank()]])
            parts = comm.gather_rows_to(0, own_nD, sizes)
            if file is not None and parts is not None:
                for (start, stop), part in zip(turn, parts, strict=False):
                    file[start:stop] = part.cpu().numpy()
        if file is not None:
            if not np.isfinite(file).all():
                raise FloatingPointError("a label's vector is not finite; nor are the weights")
            file.flush()
            build_index(file, "ivf", _CONFIG).save(folder / "labels.ivf", record)
        comm.barrier()
        self._vectors_MD = np.load(path, mmap_mode="c")  # torch warns of read-only memory
        self._index = open_index(folder / "labels.ivf", "ivf", _CONFIG, record)

    def search(self, top: TopK, queries_ND: Tensor, barred: Barred) -> None:
        """Feeds `top` what this rank's share of the queries finds. No communication."""
        k = top.keys_QK.shape[1]
        for number, (start, stop) in enumerate(fixed_blocks(len(queries_ND), _QUERY_BLOCK)):
            if number % comm.world_size() != comm.rank():
                continue
            queries = np.arange(start, stop)
            most_barred = int(np.sum([pairs.row_counts(queries) for pairs in barred], axis=0).max())
            depth = min(len(self._label_ids), k + most_barred, _MAX_DEPTH * k)
            scores_BC, found_BC = self._index.search(
                queries_ND[start:stop], depth, self._vectors_MD
            )
            places_BC = found_BC.cpu().numpy()
            label_ids_BC = np.where(places_BC >= 0, self._label_ids[places_BC], -1)
            dropped_BC = (places_BC < 0) | _is_barred(label_ids_BC, queries, barred)
            scores_BC[torch.from_numpy(dropped_BC).to(scores_BC.device)] = -torch.inf
            top.update_found(
                scores_BC, torch.from_numpy(label_ids_BC).to(scores_BC.device), first_query=start
            )

    def recall(self, queries_ND: Tensor, shortlists_NK: NDArray[np.int32], barred: Barred) -> float:
        """Returns the share of the exact shortlists that was found, 0..1, on a sample of queries.

        Args:
            queries_ND: all queries.
            shortlists_NK: [N, K], what was found for them; -1 for none.
            barred: as in `search`.
        """
        sample = np.unique(np.linspace(0, len(queries_ND) - 1, _SAMPLE).astype(np.int64))
        rows, columns = [], []
        for pairs in barred:
            row, label_ids = pairs.take(sample)
            place = np.searchsorted(self._label_ids, label_ids)
            is_there = self._label_ids[np.minimum(place, len(self._label_ids) - 1)] == label_ids
            rows.append(row[is_there])
            columns.append(place[is_there])
        exclude = Pairs.from_pairs(
            np.concatenate(rows), np.concatenate(columns), len(sample), len(self._label_ids)
        )
        _, places = exact_search(
            queries_ND[torch.from_numpy(sample).to(queries_ND.device)],
            torch.from_numpy(self._vectors_MD),
            shortlists_NK.shape[1],
            exclude=exclude,
        )
        places_QK = places.cpu().numpy()
        exact_QK = np.where(places_QK >= 0, self._label_ids[places_QK], -1)
        found_QK = torch.from_numpy(shortlists_NK[sample].astype(np.int64))
        return recall(found_QK, torch.from_numpy(exact_QK))

    def remove(self) -> None:
        """Deletes the files; for rank 0 to call when every rank is done with them."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _is_barred(label_ids_BC: Ids, queries: Ids, barred: Barred) -> NDArray[np.bool_]:
    """Returns which candidates may not be found, bool [B, C]."""
    is_barred = np.zeros(label_ids_BC.shape, np.bool_)
    for pairs in barred:
        row, label_ids = pairs.take(queries)
        keys = row * pairs.num_columns + label_ids
        keys_BC = np.arange(len(queries))[:, None] * pairs.num_columns + label_ids_BC
        is_barred |= np.isin(keys_BC, keys)
    return is_barred
