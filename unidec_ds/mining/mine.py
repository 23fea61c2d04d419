"""Shortlists of hard negatives, and clusters of similar queries, from the dual encoder as it is.

Before certain epochs every label that has a text and every query to train on is embedded with the
DE head, and each query's `shortlist_size` best labels are found, by exact search or, above a size,
with an approximate index (`approximate`). The true positives of the whole train set and the filter
pairs are masked before the search keeps anything, so a shortlist is full of negatives. With
clustered batches the same query vectors are cut into one cluster per batch (`clustering`).
`data.pool` draws from both.

What is mined is a pure function of weights, corpus, query ids, settings, seed and epoch: texts,
scores and merges are cut at places fixed by id, and ties go to the smaller label id, so the world
size changes nothing (nor resume: files are kept by epoch and opened again).

Source: UniDEC, arXiv 2405.03714; masking filter pairs is ours.
Cost: one encoder pass over the N queries and the L labels, 2·N·L·D operations for the search,
both shared by the ranks: the search of 294,805 queries against 131,073 labels at D = 768 is 59
TFLOP, of 2.2M against 1.3M 4.4 PFLOP. Memory of each rank: the query vectors, N·D·4 bytes on the
device (6.3 GiB at 2.2M x 768; twice that for a moment at W > 1, while they are summed over ranks),
the running best, N·K·8 bytes (0.7 GiB at K = 40), and one block of labels and scores. Label vectors
are never held together.

Letters: N queries to train on, L labels, D width, K shortlist length, B queries of a block, W
ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from unidec_ds import comm
from unidec_ds.data.corpus import Corpus
from unidec_ds.data.keyed import seed_of
from unidec_ds.data.pairs import Ids, Pairs
from unidec_ds.embedding import BLOCK, embed, embed_all
from unidec_ds.mining.approximate import MiningIndex
from unidec_ds.mining.clustering import balanced_clusters
from unidec_ds.mining.mined import Mined, MiningSeconds, MiningTexts, open_mined, write_mined
from unidec_ds.mining.vector_cache import FreshVectors
from unidec_ds.model import UniDEC
from unidec_ds.search import LABEL_BLOCK, TopK, fixed_blocks, mask_pairs, query_block
from unidec_ds.settings import Settings

_EXACT_OPERATIONS = {"cpu": 2e13, "accelerator": 1e16}  # most that `search: auto` does exactly
_MERGE_BLOCK = 65536  # queries whose keys are gathered on rank 0 at once: 20 MiB a rank at K = 40


class MiningConfig(Settings):
    """When hard negatives are mined, how, and how many."""

    shortlist_size: Annotated[int, Field(ge=1)] = 40
    """Labels kept per query, K. Each step draws `pool.num_hard_negatives` of them anew; a longer
    list gives easier and more varied negatives. Costs 4 bytes per query and label on disk."""
    start_epoch: Annotated[int, Field(ge=0)] = 5
    """First epoch, counted from 0, that trains on mined negatives; mining comes just before it."""
    every_epochs: Annotated[int, Field(ge=0)] = 5
    """Epochs from one mining to the next; 0 = never mine."""
    source: Literal["encode", "cached"] = "encode"
    """Where the vectors come from. `encode`: all texts are encoded with the weights as they are.
    `cached`: the vectors that training steps made since the last mining (at most `every_epochs`
    epochs before) are used as they are, and only the other texts are encoded. Cheaper by most of
    the encoder pass; the vectors are of slightly older weights, and carry the encoder's own dropout
    where `encoder.dropout` is set. Keeps 2·width bytes per text on disk, see `vector_cache`."""
    search: Literal["auto", "exact", "ivf"] = "auto"
    """`exact` compares every query with every label. `ivf` searches a FAISS index that is built
    for each mining and finds nearly the same (`mining/recall` says how nearly); its shortlists may
    end early, see `approximate`. `auto` is exact where that is 2·10^13 operations or fewer (a few
    minutes on two CPU cores), on an accelerator 10^16."""


def last_mined_epoch(config: MiningConfig, epoch: int) -> int | None:
    """Returns the epoch whose mining `epoch` (counted from 0) trains on; None before the first."""
    if config.every_epochs == 0 or epoch < config.start_epoch:
        return None
    return epoch - (epoch - config.start_epoch) % config.every_epochs


def mines_at(config: MiningConfig, epoch: int) -> bool:
    """Returns whether to mine just before `epoch`, counted from 0."""
    return last_mined_epoch(config, epoch) == epoch


def mine(
    model: UniDEC,
    corpus: Corpus,
    query_ids: Ids,
    *,
    config: MiningConfig,
    num_clusters: int | None,
    folder: Path,
    epoch: int,
    seed: int,
    kept: FreshVectors | None = None,
) -> Mined:
    """Mines with the model as it is, writes the result into `folder`, and returns it.

    Args:
        model: whole on every rank, in any mode.
        corpus: the corpus.
        query_ids: int64 [N], the train queries to mine for, each once.
        config: the settings.
        num_clusters: batches an epoch (`Planner.steps_per_epoch`); None makes no clusters.
        folder: where the files go, on a disk that every rank sees; made if missing. What it holds
            of the same epoch is replaced.
        epoch: the epoch to come.
        seed: the run's seed.
        kept: vectors to use instead of encoding their texts; None encodes all.

    Raises:
        FloatingPointError: the model is not finite.

    Collectives: an all-reduce of N·D values, gathers of N·K·8 bytes from every rank to rank 0, a
    barrier; every rank must call.
    """
    clock = _Clock(next(model.parameters()).device)
    num_texts = len(query_ids) + int(np.count_nonzero(corpus.label_has_text))
    with tqdm(
        total=num_texts, desc="mining: texts", unit="text", disable=not comm.is_main()
    ) as bar:
        queries = corpus.queries["train"]
        queries_ND = _embed_queries(model, corpus, query_ids, kept, bar.update)
        embed_s = clock.lap()
        top = TopK(len(query_ids), config.shortlist_size, queries_ND.device)
        barred = [
            _rows(pairs["train"], query_ids) for pairs in (corpus.positives, corpus.filter_pairs)
        ]
        search_s = clock.lap()
        index = None
        if is_exact(config, queries_ND, corpus.num_labels):
            size = label_block(corpus.num_labels)
            for number, (first, end) in enumerate(fixed_blocks(corpus.num_labels, size)):
                columns = np.flatnonzero(corpus.label_has_text[first:end])
                if number % comm.world_size() == comm.rank():
                    vectors_nD = _embed_labels(model, corpus, first + columns, kept)
                    embed_s += clock.lap()
                    _search(top, queries_ND, vectors_nD, first, end, columns, barred)
                    search_s += clock.lap()
                bar.update(len(columns))
        else:

            def embed_labels(label_ids: Ids) -> Tensor:
                bar.update(len(label_ids) * comm.world_size())
                return _embed_labels(model, corpus, label_ids, kept)

            text_ids = np.flatnonzero(corpus.label_has_text)
            index = MiningIndex(folder / "index", text_ids, model.width, embed_labels, BLOCK)
            embed_s += clock.lap()
            index.search(top, queries_ND, barred)

    shortlists = _merge(top, query_ids, len(queries))
    del top
    search_s += clock.lap()
    if comm.is_main():
        clusters = None
        if num_clusters is not None:
            key = seed_of(seed, "mining", epoch)
            clusters = balanced_clusters(queries_ND, num_clusters, key)
        seconds = MiningSeconds(embed_s, search_s, clock.lap())
        texts = _count_texts(corpus, query_ids, kept)
        recall = index.recall(queries_ND, shortlists[query_ids], barred) if index else 1.0
        write_mined(folder, epoch, shortlists, clusters, seconds, texts, recall)
    comm.barrier()
    if index is not None and comm.is_main():
        index.remove()
    return open_mined(folder, epoch, is_new=True)


def is_exact(config: MiningConfig, queries_ND: Tensor, num_labels: int) -> bool:
    """Returns whether the queries are compared with every label."""
    if config.search != "auto":
        return config.search == "exact"
    most = _EXACT_OPERATIONS["cpu" if queries_ND.device.type == "cpu" else "accelerator"]
    return 2 * queries_ND.numel() * num_labels <= most


def label_block(num_labels: int) -> int:
    """Returns the labels per block of mining's search; the ranks take blocks by turns.

    About 32 blocks, so that every rank finds work, but none so small that keeping the best costs
    several times its products. Depends on nothing else: where blocks end decides scores' last bits.
    """
    return min(LABEL_BLOCK, BLOCK * max(2, num_labels // (32 * BLOCK)))


def _embed_queries(
    model: UniDEC,
    corpus: Corpus,
    query_ids: Ids,
    kept: FreshVectors | None,
    on_texts: Callable[[int], object],
) -> Tensor:
    """Returns the DE vectors of train queries, fp32 [N, D], the same on every rank.

    Collectives: an all-reduce of the vectors that are encoded.
    """
    queries = corpus.queries["train"]
    if kept is None:
        return embed_all(model, queries, query_ids, ("de",), corpus.pad_token_id, on_texts)[0]
    is_kept = kept.is_fresh["queries"][query_ids]
    device = next(model.parameters()).device
    queries_ND = torch.empty(len(query_ids), model.width, device=device)
    for start, stop in fixed_blocks(len(query_ids), BLOCK):
        places = start + np.flatnonzero(is_kept[start:stop])
        vectors = kept.read("queries", query_ids[places]).to(device)
        queries_ND[torch.from_numpy(places).to(device)] = vectors
        on_texts(len(places))
    others = np.flatnonzero(~is_kept)
    if len(others):
        (encoded,) = embed_all(
            model, queries, query_ids[others], ("de",), corpus.pad_token_id, on_texts
        )
        queries_ND[torch.from_numpy(others).to(device)] = encoded
    return queries_ND


def _embed_labels(
    model: UniDEC, corpus: Corpus, label_ids: Ids, kept: FreshVectors | None
) -> Tensor:
    """Returns the DE vectors of labels that have a text, fp32 [n, D]."""
    device = next(model.parameters()).device
    vectors_nD = torch.empty(len(label_ids), model.width, device=device)
    places = np.arange(len(label_ids))
    if kept is not None:
        is_kept = kept.is_fresh["labels"][label_ids]
        read_nD = kept.read("labels", label_ids[is_kept]).to(device)
        vectors_nD[torch.from_numpy(np.flatnonzero(is_kept)).to(device)] = read_nD
        places = np.flatnonzero(~is_kept)
    for start, stop in fixed_blocks(len(places), BLOCK):
        block = places[start:stop]
        (made_nD,) = embed(model, corpus.labels, label_ids[block], ("de",), corpus.pad_token_id)
        vectors_nD[torch.from_numpy(block).to(device)] = made_nD
    return vectors_nD


def _count_texts(corpus: Corpus, query_ids: Ids, kept: FreshVectors | None) -> MiningTexts:
    total = len(query_ids) + int(np.count_nonzero(corpus.label_has_text))
    if kept is None:
        return MiningTexts(encoded=total, reused=0)
    reused = np.count_nonzero(kept.is_fresh["queries"][query_ids])
    reused += np.count_nonzero(kept.is_fresh["labels"] & corpus.label_has_text)
    return MiningTexts(encoded=total - int(reused), reused=int(reused))


def _search(
    top: TopK,
    queries_ND: Tensor,
    vectors_nD: Tensor,
    first_label: int,
    end_label: int,
    columns: Ids,
    barred: Sequence[Pairs],
) -> None:
    """Feeds `top` every query's scores for one block of labels.

    Args:
        top: of the N queries.
        queries_ND: all queries.
        vectors_nD: vectors of the block's labels that have a text.
        first_label: label id of the block's first.
        end_label: one more than the label id of its last.
        columns: int64 [n], which labels of the block have a text; no query may find the others.
        barred: sets of pairs (query, label id) that may not be found.
    """
    device = vectors_nD.device
    columns_n = torch.from_numpy(columns).to(device)
    labels_LD = torch.zeros(end_label - first_label, vectors_nD.shape[1], device=device)
    labels_LD[columns_n] = vectors_nD
    never_L = torch.ones(len(labels_LD), dtype=torch.bool, device=device)
    never_L[columns_n] = False
    for first_query, end_query in fixed_blocks(len(queries_ND), query_block(device)):
        scores_BL = queries_ND[first_query:end_query] @ labels_LD.T
        scores_BL.masked_fill_(never_L, -torch.inf)
        for pairs in barred:
            mask_pairs(scores_BL, pairs, first_query=first_query, first_label=first_label)
        top.update(scores_BL, first_query=first_query, first_label=first_label)


def _merge(top: TopK, query_ids: Ids, num_queries: int) -> NDArray[np.int32]:
    """Returns on rank 0 the shortlists by query_id from every rank's best; on others nothing.

    Collectives: a gather of each block of queries.
    """
    shortlist_size = top.keys_QK.shape[1]
    shortlists = np.full((num_queries if comm.is_main() else 0, shortlist_size), -1, np.int32)
    for start, stop in fixed_blocks(len(query_ids), _MERGE_BLOCK):
        mine_QK = top.keys_QK[start:stop]
        parts = comm.gather_rows_to(0, mine_QK, [stop - start] * comm.world_size())
        if parts is not None:
            merged = TopK(stop - start, shortlist_size, mine_QK.device)
            for keys_QK in parts:
                merged.merge_keys(keys_QK)
            shortlists[query_ids[start:stop]] = merged.result()[1].cpu().numpy()
    return shortlists


def _rows(pairs: Pairs, rows: Ids) -> Pairs:
    """Returns the pairs of some rows, in their order."""
    indptr = np.concatenate([[0], np.cumsum(pairs.row_counts(rows))])
    return Pairs(indptr, pairs.take(rows)[1].astype(np.int32), pairs.num_columns)


class _Clock:
    """Measures laps; waits for the device first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last_s = perf_counter()

    def lap(self) -> float:
        """Returns the seconds since the last lap."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        last_s, self._last_s = self._last_s, perf_counter()
        return self._last_s - last_s
