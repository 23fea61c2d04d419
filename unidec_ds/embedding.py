"""Embeds many texts without gradient: for evaluation, mining and prediction.

Texts are cut into blocks at fixed places in the id order, whatever the number of ranks, and sorted
by length within a block. A text therefore meets the same neighbours and the same padding at any
world size, and gets bitwise the same vector.

Shape legend: n texts, D head width, H encoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from unidec_ds import comm
from unidec_ds.batch import make_chunks
from unidec_ds.data.corpus import RaggedTokens, TextTable
from unidec_ds.data.pairs import Ids
from unidec_ds.model import Chunk, UniDEC
from unidec_ds.search import fixed_blocks

View = Literal["encoder", "de", "classifier"]
"""What to make of a pooled text: the encoder's own embedding, g1 or g2; all L2-normalised."""

BLOCK = 2048
"""Texts per block: sorted by length among themselves, encoded by one rank."""


def chunk_size(device: torch.device) -> int:
    """Returns the texts per encoder call that suit a device without gradients."""
    return 64 if device.type == "cpu" else 1024


@torch.no_grad()
def embed(
    model: UniDEC, tokens_of: TextTable, ids: Ids, views: tuple[View, ...], pad_token_id: int
) -> tuple[Tensor, ...]:
    """Returns one fp32 [n, D] tensor per view, on the model's device. No communication.

    Args:
        model: in any mode; it is put into evaluation mode for the call.
        tokens_of: the table that `ids` index.
        ids: int64 [n], at most a block or so: all are encoded in one go, sorted by length.
        views: what to make of each text.
        pad_token_id: of the corpus.
    """
    pooled_nH = pool_tokens(model, tokens_of.tokens(ids), pad_token_id)
    return tuple(_view(model, pooled_nH, view) for view in views)


@torch.no_grad()
def pool_tokens(model: UniDEC, tokens: RaggedTokens, pad_token_id: int) -> Tensor:
    """Returns the pooled encoder states of texts, fp32 [n, H], in one go; as `embed` does."""
    device = next(model.parameters()).device
    chunks, order = make_chunks(tokens, chunk_size(device), pad_token_id)
    was_training = model.training
    model.eval()
    pooled = torch.cat([model.pool(Chunk(*(part.to(device) for part in c))) for c in chunks])
    model.train(was_training)
    return pooled.index_select(0, order.to(device))


def embed_all(
    model: UniDEC,
    tokens_of: TextTable,
    ids: Ids,
    views: tuple[View, ...],
    pad_token_id: int,
    on_texts: Callable[[int], object] | None = None,
) -> tuple[Tensor, ...]:
    """Returns one fp32 [n, D] tensor per view, the same on every rank.

    Every rank encodes its share of the blocks. Memory: n·D·4 bytes per view on the device.

    Args:
        model: see `embed`.
        tokens_of: see `embed`.
        ids: int64 [n], any number.
        views: see `embed`.
        pad_token_id: see `embed`.
        on_texts: called with the number of texts after each block, this rank's or not.

    Collectives: one all-reduce of n·D values per view; every rank must call.
    """
    device = next(model.parameters()).device
    vectors = tuple(torch.zeros(len(ids), _width(model, view), device=device) for view in views)
    for number, (start, end) in enumerate(fixed_blocks(len(ids), BLOCK)):
        if number % comm.world_size() == comm.rank():
            parts = embed(model, tokens_of, ids[start:end], views, pad_token_id)
            for whole, part in zip(vectors, parts, strict=True):
                whole[start:end] = part
        if on_texts is not None:
            on_texts(end - start)
    if not comm.is_distributed():
        return vectors
    return tuple(comm.all_reduce_sum(whole) for whole in vectors)  # x + 0 is x, bitwise


def _view(model: UniDEC, pooled_nH: Tensor, view: View) -> Tensor:
    if view == "de":
        return model.embed(pooled_nH)
    if view == "classifier":
        pooled_nH = model.classify(pooled_nH)
    return torch.nn.functional.normalize(pooled_nH, dim=-1)


def _width(model: UniDEC, view: View) -> int:
    return model.de_head.in_features if view == "encoder" else model.width
