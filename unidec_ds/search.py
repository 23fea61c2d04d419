"""Exact top-k search in blocks of scores, with the same answer at any number of ranks.

A caller makes scores block by block (queries times labels) and feeds them to a `TopK`, which keeps
each query's best k. `exact_search` does so for one inner product (mining, predict); evaluation
does its own products, one per view, and feeds three `TopK`s from one pass over the labels.

The order is total: score descending, label id ascending. A kept entry is one int64 *key* whose
high half orders as its fp32 score does and whose low half falls with its label id, so equal scores
at the k-th place are no special case, and neither the order of the blocks nor the way ranks shared
them changes a result. The scores themselves are floats of a matrix product, whose last bit may
depend on its shape: ranks must therefore cut queries and labels where `fixed_blocks` cuts them.

Cost: nearly all of a block's scores are read once and never looked at again. The maxima of strided
groups of columns (one vectorised pass) are compared with each query's bar, the higher of its k-th
best score so far and the block's k-th best group maximum; only the groups that reach it are looked
into, and a query's partial sort sees little more than 2k keys per label block. Memory: 8·k bytes
per query, and beside a block of scores a quarter of its size (15 times it if all scores are equal).
No communication: a rank's `keys_QK` is a tensor to gather and to `merge_keys` elsewhere.

Letters: Q queries of a search, B queries of a block, L labels, D width, K kept, G column groups,
C candidates, H groups looked into, S
columns of a group.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unidec_ds.data.pairs import Pairs

LABEL_BLOCK = 16384
"""Labels per block of a search; with `query_block`, 32 MiB of fp32 scores on a CPU."""

_EMPTY = torch.iinfo(torch.int64).min  # below the key of every score, -inf included
_MAX_ID = 2**31 - 1
_GROUP_SIZE = 8


def query_block(device: torch.device) -> int:
    """Returns the queries per block that suit a device (accelerators: 256 MiB of fp32 scores)."""
    return 512 if device.type == "cpu" else 4096


def fixed_blocks(total: int, size: int) -> list[tuple[int, int]]:
    """Returns the (start, stop) ranges that cut `total` things, the same on every rank."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]


class TopK:
    """The k best labels of each of Q queries among all scores seen so far.

    Args:
        num_queries: Q.
        k: labels to keep per query; may exceed the number of labels.
        device: where the scores will be.

    Attributes:
        keys_QK: int64 [Q, k], the kept entries in no particular order.
    """

    def __init__(self, num_queries: int, k: int, device: torch.device | str = "cpu") -> None:
        assert k >= 1
        self.keys_QK = torch.full((num_queries, k), _EMPTY, dtype=torch.int64, device=device)
        self._bar_Q = torch.full((num_queries,), -torch.inf, device=device)

    def update(
        self,
        scores_BL: Tensor,
        *,
        first_query: int = 0,
        first_label: int = 0,
        exclude: Pairs | None = None,
    ) -> None:
        """Takes in the scores of one block of queries against one block of labels.

        Args:
            scores_BL: fp32, bf16 or fp16 [B, L] on this object's device. A score of -inf is never
                kept. Overwritten with -inf where `exclude` says so.
            first_query: query that row 0 stands for.
            first_label: label id that column 0 stands for.
            exclude: pairs (query, label id) that must not be found, over *all* Q queries.

        Raises:
            FloatingPointError: a score is NaN.
        """
        num_queries, num_labels = scores_BL.shape
        queries = slice(first_query, first_query + num_queries)
        assert queries.stop <= len(self.keys_QK)
        assert first_label + num_labels <= _MAX_ID
        if num_labels == 0:
            return
        if exclude is not None:
            mask_pairs(scores_BL, exclude, first_query=first_query, first_label=first_label)
        k = self.keys_QK.shape[1]

        group_size = max(1, min(_GROUP_SIZE, num_labels // (4 * k)))
        num_groups = -(-num_labels // group_size)
        maxima_BG = _group_maxima(scores_BL, num_groups)
        if maxima_BG.amax(1).isnan().any():  # waits for the device
            raise FloatingPointError(
                f"a score of labels {first_label}..{first_label + num_labels - 1} is NaN; "
                "the weights or the embeddings it was made from are not finite"
            )
        bar_B = self._bar_Q[queries]
        if num_groups > k:
            bar_B = torch.maximum(bar_B, _largest(maxima_BG, k).amin(1))
        # Groups that reach the bar, then their columns that do. Column c is in group c % G.
        query_H, group_H = (maxima_BG >= bar_B[:, None]).nonzero().unbind(1)
        column_HS = group_H[:, None] + torch.arange(
            0, num_groups * group_size, num_groups, device=scores_BL.device
        )
        inside_HS = column_HS < num_labels
        flat_HS = query_H[:, None] * num_labels + column_HS.clamp(max=num_labels - 1)
        score_HS = scores_BL.reshape(-1).index_select(0, flat_HS.view(-1)).view_as(flat_HS).float()
        keep_HS = inside_HS & (score_HS >= bar_B[query_H, None]) & (score_HS > -torch.inf)
        query_C, column_C = query_H[:, None].expand_as(keep_HS)[keep_HS], column_HS[keep_HS]
        keys_C = _encode(score_HS[keep_HS], column_C + first_label)
        if len(keys_C):
            self._keep(queries, _ragged_to_padded(keys_C, query_C, num_queries))

    def update_found(self, scores_BC: Tensor, label_ids_BC: Tensor, *, first_query: int) -> None:
        """Takes in labels that another search found, with their scores.

        Args:
            scores_BC: fp32 [B, C]; -inf is never kept.
            label_ids_BC: int64 [B, C], no label twice in a row.
            first_query: query that row 0 stands for.
        """
        keys_BC = _encode(scores_BC, label_ids_BC).masked_fill(scores_BC == -torch.inf, _EMPTY)
        self.merge_keys(keys_BC, first_query)

    def merge_keys(self, keys_QC: Tensor, first_query: int = 0) -> None:
        """Takes in another search's `keys_QK` (any number of columns) over other labels.

        Args:
            keys_QC: int64 [Q', C]; row 0 stands for query `first_query`.
            first_query: as above.
        """
        self._keep(slice(first_query, first_query + len(keys_QC)), keys_QC)

    def result(self) -> tuple[Tensor, Tensor]:
        """Returns (scores fp32 [Q, k], label ids int64 [Q, k]), best first.

        Where fewer than k labels were found the rest is (-inf, -1).
        """
        keys_QK = self.keys_QK.sort(dim=1, descending=True).values
        empty_QK = keys_QK == _EMPTY
        return (
            _decode_scores(keys_QK),
            torch.where(empty_QK, -1, _MAX_ID - (keys_QK & 0xFFFFFFFF)),
        )

    def _keep(self, queries: slice, keys_BC: Tensor) -> None:
        k = self.keys_QK.shape[1]
        kept_BK = _largest(torch.cat([self.keys_QK[queries], keys_BC], dim=1), k)
        self.keys_QK[queries] = kept_BK
        self._bar_Q[queries] = _decode_scores(kept_BK.amin(1))


def mask_pairs(scores_BL: Tensor, pairs: Pairs, *, first_query: int, first_label: int) -> None:
    """Sets the scores of `pairs` to -inf, in place; columns of other labels are passed over."""
    num_queries, num_labels = scores_BL.shape
    indptr = pairs.indptr[first_query : first_query + num_queries + 1]
    columns = np.asarray(pairs.indices[indptr[0] : indptr[-1]], np.int64) - first_label
    rows = np.repeat(np.arange(num_queries), np.diff(indptr))
    inside = (columns >= 0) & (columns < num_labels)
    if inside.any():
        where = torch.from_numpy(np.stack([rows[inside], columns[inside]])).to(scores_BL.device)
        scores_BL[where[0], where[1]] = -torch.inf


@torch.no_grad()
def exact_search(
    queries_QD: Tensor,
    labels_LD: Tensor,
    k: int,
    *,
    exclude: Pairs | None = None,
    hidden_L: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the k labels of largest inner product for each query, exactly.

    Args:
        queries_QD: float [Q, D]; the search runs on its device.
        labels_LD: float [L, D], possibly elsewhere (memory-mapped on the host, say): it is read
            once, block by block. Products are fp32 whatever the dtypes.
        k: labels per query.
        exclude: pairs (query, label id) never to be found, at no cost in depth.
        hidden_L: bool [L], labels that no query may find, likewise.

    Returns:
        (scores fp32 [Q, k], label ids int64 [Q, k]), score descending, id ascending; the rest of a
        query with fewer than k labels is (-inf, -1).
    """
    device, num_labels = queries_QD.device, len(labels_LD)
    query_ranges = fixed_blocks(len(queries_QD), query_block(device))
    top = TopK(len(queries_QD), k, device)
    buffer = torch.empty(query_block(device) * min(LABEL_BLOCK, num_labels), device=device)
    for first_label, end_label in fixed_blocks(num_labels, LABEL_BLOCK):
        block_DL = labels_LD[first_label:end_label].to(device, torch.float32).T
        hidden = None
        if hidden_L is not None:
            hidden = hidden_L[first_label:end_label].nonzero().view(-1).to(device)
        for first_query, end_query in query_ranges:
            shape = (end_query - first_query, end_label - first_label)
            scores_BL = buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(queries_QD[first_query:end_query].float(), block_DL, out=scores_BL)
            if hidden is not None:
                scores_BL[:, hidden] = -torch.inf
            top.update(scores_BL, first_query=first_query, first_label=first_label, exclude=exclude)
    return top.result()


def _group_maxima(scores_BL: Tensor, num_groups: int) -> Tensor:
    """Returns [B, G], the maxima of the columns c, c + G, c + 2G, ... for c in 0..G-1."""
    num_labels = scores_BL.shape[1]
    if num_groups == num_labels:
        return scores_BL
    full = num_labels // num_groups
    maxima_BG: Tensor = scores_BL[:, : full * num_groups].unflatten(1, (full, num_groups)).amax(1)
    rest = num_labels - full * num_groups
    if rest:
        torch.maximum(maxima_BG[:, :rest], scores_BL[:, -rest:], out=maxima_BG[:, :rest])
    return maxima_BG


def _largest(values_BC: Tensor, k: int) -> Tensor:
    """Returns the k largest of each row, in no particular order."""
    if values_BC.device.type != "cpu":
        return values_BC.topk(k, dim=1, sorted=False).values
    # numpy's vectorised partition is ten times faster than torch.topk here. It has no bf16.
    array = (values_BC.float() if values_BC.is_floating_point() else values_BC).numpy()
    split = array.shape[1] - k
    return torch.from_numpy(np.partition(array, split, axis=1)[:, split:])


def _ragged_to_padded(keys_C: Tensor, query_C: Tensor, num_queries: int) -> Tensor:
    """Returns [B, most per query] with each query's keys, the rest empty; `query_C` ascends."""
    counts_B = torch.bincount(query_C, minlength=num_queries)
    place_C = torch.arange(len(query_C), device=query_C.device)
    place_C -= (counts_B.cumsum(0) - counts_B)[query_C]
    padded = keys_C.new_full((num_queries, int(counts_B.max())), _EMPTY)
    padded[query_C, place_C] = keys_C
    return padded


def _encode(scores: Tensor, label_ids: Tensor) -> Tensor:
    """Returns int64 keys whose order is (score descending, label id ascending), reversed."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, in the order of the floats
    return (ordered.long() << 32) | (_MAX_ID - label_ids)


def _decode_scores(keys: Tensor) -> Tensor:
    """Returns the fp32 scores of keys; -inf for an empty key."""
    ordered = (keys >> 32).int()
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return scores.masked_fill(keys == _EMPTY, -torch.inf)
