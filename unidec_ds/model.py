"""One shared text encoder with the two heads of UniDEC; knows no loss and no rank.

Texts arrive as length-sorted chunks (`Chunk`). Each chunk runs under activation checkpointing
when `recompute` is on: backward then holds the activations of one chunk only, which is gradient
caching (GradCache), so the global batch is bounded by O((B + P)·D) and not by activations.
Pooling, heads and norms are computed in fp32 whatever the encoder's dtype.

Source: arXiv 2405.03714, section 3, and the authors' public code. Head initialisation
"identity" is this project's.

Shape legend: n texts of a chunk, t its longest, B queries, P labels (of this rank), D head width,
H encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unidec_ds.settings import Settings
from unidec_ds.unit_rows import unit_rows


class ModelConfig(Settings):
    """The two heads."""

    width: Annotated[int, Field(ge=0)] = 0
    """Width D of both heads' outputs and of the classifier rows; 0 takes the encoder's width."""
    head_init: Literal["xavier", "identity"] = "xavier"
    """`xavier`: uniform, zero bias. `identity`: both heads start as the encoder's own embedding."""
    de_activation: Literal["tanh", "none"] = "tanh"
    """Activation of the dual-encoder head before its norm."""
    head_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout on the outputs of both heads."""
    row_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout on the classifier rows fetched for a step."""


class Chunk(NamedTuple):
    """Texts of similar length, padded to the longest."""

    input_ids: Tensor
    """int64 [n, t]."""
    attention_mask: Tensor
    """int64 [n, t], 1 where there is a token."""


class Masks(NamedTuple):
    """Keyed dropout masks of this rank's embeddings, already divided by the keep probability."""

    query_de_BD: Tensor
    query_classifier_BD: Tensor
    label_de_PD: Tensor


class Embeddings(NamedTuple):
    """What the model returns, fp32."""

    query_de_BD: Tensor
    """L2-normalised dual-encoder embeddings of the queries."""
    query_classifier_BD: Tensor
    """Classifier-head vectors of the queries, not normalised."""
    label_de_PD: Tensor
    """L2-normalised dual-encoder embeddings of the labels."""
    query_de_clean_BD: Tensor
    """`query_de_BD` without head dropout; detached."""
    label_de_clean_PD: Tensor
    """`label_de_PD` without head dropout; detached."""


class UniDEC(nn.Module):
    """Shared encoder, dual-encoder head g1 and classifier head g2.

    g1 = normalise(dropout(tanh(Linear))), for queries and labels; g2 = dropout(Linear), for
    queries only.

    Args:
        encoder: a Hugging Face encoder; its output has `last_hidden_state` [n, t, H].
        hidden_size: H.
        config: the heads.
    """

    def __init__(self, encoder: nn.Module, hidden_size: int, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.width = config.width or hidden_size
        self.de_head = nn.Linear(hidden_size, self.width)
        self.classifier_head = nn.Linear(hidden_size, self.width)
        for head in (self.de_head, self.classifier_head):
            nn.init.zeros_(head.bias)
            if config.head_init == "identity":
                nn.init.eye_(head.weight)
            else:
                nn.init.xavier_uniform_(head.weight)

    def forward(
        self,
        chunks: Sequence[Chunk],
        order: Tensor,
        num_queries: int,
        num_labels: int,
        masks: Masks | None = None,
        recompute: bool = False,
    ) -> Embeddings:
        """Encodes the step's texts: this rank's queries, then its labels.

        Args:
            chunks: all texts, sorted by length, at least one chunk.
            order: int64 [num_queries + num_labels]; the row, in the chunks' order, of each text.
                Padding texts are named by no entry.
            num_queries: number of queries, the first texts of `order`.
            num_labels: number of labels, the rest.
            masks: dropout masks, or None for no dropout.
            recompute: run every chunk under activation checkpointing.
        """
        pooled = torch.cat([self.pool(chunk, recompute) for chunk in chunks])
        pooled = pooled.index_select(0, order)
        queries_BH, labels_PH = pooled.split([num_queries, num_labels])
        query_de_BD = self.embed(queries_BH, masks.query_de_BD if masks else None)
        label_de_PD = self.embed(labels_PH, masks.label_de_PD if masks else None)
        query_de_clean_BD, label_de_clean_PD = query_de_BD.detach(), label_de_PD.detach()
        if masks:
            with torch.no_grad():
                query_de_clean_BD, label_de_clean_PD = map(self.embed, (queries_BH, labels_PH))
        return Embeddings(
            query_de_BD,
            self.classify(queries_BH, masks.query_classifier_BD if masks else None),
            label_de_PD,
            query_de_clean_BD,
            label_de_clean_PD,
        )

    def pool(self, chunk: Chunk, recompute: bool = False) -> Tensor:
        """Returns the mean of each text's token states, fp32 [n, H]."""
        if recompute and torch.is_grad_enabled():
            pooled: Tensor = checkpoint(self._pool, *chunk, use_reentrant=False)
            return pooled
        return self._pool(*chunk)

    def embed(self, pooled_nH: Tensor, mask_nD: Tensor | None = None) -> Tensor:
        """Returns the dual-encoder embeddings g1 of pooled texts, fp32 [n, D], L2-normalised."""
        hidden = _linear(self.de_head, pooled_nH)
        if self.config.de_activation == "tanh":
            hidden = torch.tanh(hidden)
        return unit_rows(_masked(hidden, mask_nD))

    def classify(self, pooled_nH: Tensor, mask_nD: Tensor | None = None) -> Tensor:
        """Returns the classifier-head vectors g2 of pooled texts, fp32 [n, D]."""
        return _masked(_linear(self.classifier_head, pooled_nH), mask_nD)

    def _pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        weights = attention_mask.unsqueeze(-1).float()
        total: Tensor = (states.last_hidden_state.float() * weights).sum(1)
        return total / weights.sum(1).clamp(min=1)


def dropout_mask(
    seed: int, rate: float, num_rows: int, own: NDArray[np.int64], width: int, device: torch.device
) -> Tensor:
    """Returns the rows `own` of a dropout mask over the whole batch or pool, fp32 [n, D].

    The whole mask is drawn from `seed` on every rank and then cut, so that it does not depend on
    how the rows are shared over ranks. Kept entries hold 1 / (1 - rate).

    Args:
        seed: keyed by run, step and site.
        rate: share of entries set to 0.
        num_rows: rows of the whole.
        own: the rows wanted.
        width: D.
        device: where; each kind of device has its own stream of numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)
    mask = torch.empty(num_rows, width, device=device).bernoulli_(1 - rate, generator=generator)
    return mask[torch.from_numpy(own).to(device)].div_(1 - rate)


def _linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    return F.linear(inputs, layer.weight.float(), layer.bias.float())


def _masked(hidden: Tensor, mask: Tensor | None) -> Tensor:
    return hidden if mask is None else hidden * mask
