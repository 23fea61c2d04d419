"""One rank's part of a step: its texts as padded chunks, and what each head has to predict.

`make_batch` follows a `StepPlan` on one rank: the rank's slice of the queries, the pool labels it
owns (`label_id % world_size`), their tokens sorted by length into chunks so that padding is small,
and the targets of both heads. It runs in the background worker, on host memory, without
communication; `Batch.to` copies the result to the device.

Shape legend: B queries of the global batch, P pool labels, n texts of a chunk, t its longest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unidec_ds.classifier import partition
from unidec_ds.data.corpus import Corpus, RaggedTokens
from unidec_ds.data.pairs import Ids
from unidec_ds.data.pool import StepPlan
from unidec_ds.model import Chunk
from unidec_ds.targets import Targets


@dataclass(frozen=True)
class Batch:
    """What one rank needs for one step."""

    plan: StepPlan
    """The step's plan, the same on every rank."""
    chunks: tuple[Chunk, ...]
    """This rank's queries, then its labels that have a text, sorted by length and padded."""
    order: Tensor
    """int64, the row in the chunks' order of each text; see `UniDEC.forward`."""
    query_sizes: tuple[int, ...]
    """Number of queries of each rank."""
    own_pool: Ids
    """Pool indices of the labels this rank owns, ascending: its classifier columns."""
    own_pool_with_text: Ids
    """Those of them that have a text: its dual-encoder columns."""
    de_targets: Targets
    """Targets of the dual encoder's columns."""
    classifier_targets: Targets
    """Targets of the classifier's columns."""
    num_tokens: int
    """Tokens of this rank's texts, padding not counted."""

    @property
    def own_label_ids(self) -> Ids:
        """Label ids of `own_pool`."""
        return self.plan.label_ids[self.own_pool]

    @property
    def num_padded_tokens(self) -> int:
        """Tokens the encoder computes, padding counted."""
        return sum(chunk.input_ids.numel() for chunk in self.chunks)

    def figures(self, num_positives: int, world_size: int, seconds: float) -> dict[str, float]:
        """Returns what the log says of the pool, the texts and their speed.

        Args:
            num_positives: sampled per query (0: all), to tell them from those others brought.
            world_size: number of ranks; tokens and padding are this rank's times that.
            seconds: what the step took.
        """
        plan, num_pairs = self.plan, len(self.plan.positive_query)
        per_query = np.bincount(plan.positive_query)
        sampled = int(np.minimum(per_query, num_positives or per_query.max()).sum())
        num_texts = len(plan.query_ids) + self.de_targets.num_labels
        return {
            "pool_size": len(plan.label_ids),
            "hard_negatives": plan.num_hard_negatives,
            "dropped_queries": plan.num_dropped_queries,
            "positives_per_query": num_pairs / len(plan.query_ids),
            "in_batch_positive_share": 1 - sampled / num_pairs,
            "texts_per_s": num_texts / seconds,
            "tokens_per_s": self.num_tokens * world_size / seconds,
            "padding_share": 1 - self.num_tokens / self.num_padded_tokens,
        }

    def to(self, device: torch.device) -> Batch:
        """Returns the batch with its tensors on `device`."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            chunks=tuple(Chunk(*map(move, chunk)) for chunk in self.chunks),
            order=move(self.order),
            de_targets=self.de_targets.to(device),
            classifier_targets=self.classifier_targets.to(device),
        )


def make_batch(
    plan: StepPlan,
    corpus: Corpus,
    *,
    rank: int,
    world_size: int,
    encoder_chunk: int,
    with_label_texts: bool = True,
) -> Batch:
    """Returns `rank`'s part of the step that `plan` describes.

    Args:
        plan: the step's plan.
        corpus: where the tokens are.
        rank: which rank.
        world_size: number of ranks.
        encoder_chunk: texts per chunk; 0 puts all into one.
        with_label_texts: False where no dual encoder is trained: no label is encoded.
    """
    bounds = np.arange(world_size + 1) * len(plan.query_ids) // world_size
    query_ids = plan.query_ids[bounds[rank] : bounds[rank + 1]]
    has_text = corpus.label_has_text[plan.label_ids] & with_label_texts
    own_pool = np.flatnonzero(partition.owner(plan.label_ids, world_size) == rank)
    own_pool_with_text = own_pool[has_text[own_pool]]
    texts = concatenate(
        corpus.queries["train"].tokens(query_ids),
        corpus.labels.tokens(plan.label_ids[own_pool_with_text]),
    )
    chunks, order = make_chunks(texts, encoder_chunk, corpus.pad_token_id)

    def targets(columns: Ids, eligible: NDArray[np.bool_]) -> Targets:
        return Targets.from_plan(
            batch_size=len(plan.query_ids),
            positive_query=plan.positive_query,
            positive_pool=plan.positive_pool,
            ignored_query=plan.ignored_query,
            ignored_pool=plan.ignored_pool,
            columns=columns,
            eligible=eligible,
        )

    return Batch(
        plan=plan,
        chunks=chunks,
        order=order,
        query_sizes=tuple(int(size) for size in np.diff(bounds)),
        own_pool=own_pool,
        own_pool_with_text=own_pool_with_text,
        de_targets=targets(own_pool_with_text, has_text),
        classifier_targets=targets(own_pool, np.ones_like(has_text)),
        num_tokens=int(texts.offsets[-1]),
    )


def concatenate(first: RaggedTokens, second: RaggedTokens) -> RaggedTokens:
    """Returns the texts of `first`, then those of `second`."""
    return RaggedTokens(
        np.concatenate([first.values, second.values]),
        np.concatenate([first.offsets, first.offsets[-1] + second.offsets[1:]]),
    )


def make_chunks(
    texts: RaggedTokens, chunk_size: int, pad_token_id: int
) -> tuple[tuple[Chunk, ...], Tensor]:
    """Returns texts sorted by length, cut into padded chunks, and the place of each text in them.

    A rank without a text gets one chunk of one padding text that `order` does not name: its
    engine must take part in the step all the same.

    Args:
        texts: the tokens.
        chunk_size: texts per chunk; 0 puts all into one.
        pad_token_id: what to pad with.

    Returns:
        The chunks, int64 [n, t] each, and int64 [number of texts]: the row, in the chunks' order,
        of each text.
    """
    lengths = np.diff(texts.offsets)
    by_length = np.argsort(-lengths, kind="stable")  # longest first: memory peaks at once
    count = len(lengths)
    if count == 0:
        ids = torch.full((1, 1), pad_token_id)
        return (Chunk(ids, torch.ones_like(ids)),), torch.zeros(0, dtype=torch.int64)
    chunks = []
    for start in range(0, count, chunk_size or count):
        rows = by_length[start : start + (chunk_size or count)]
        chunks.append(_pad(texts, rows, lengths[rows], pad_token_id))
    order = np.empty(count, np.int64)
    order[by_length] = np.arange(count)
    return tuple(chunks), torch.from_numpy(order)


def _pad(texts: RaggedTokens, rows: Ids, lengths: Ids, pad_token_id: int) -> Chunk:
    place = np.arange(lengths.max())
    mask = place < lengths[:, None]
    ids = np.full(mask.shape, pad_token_id, np.int64)
    ids[mask] = texts.values[(texts.offsets[rows][:, None] + place)[mask]]
    return Chunk(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)))
