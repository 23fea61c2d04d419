"""Some labels' embeddings, for people to look at in TensorBoard's projector.

Shape legend: n labels, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unidec_ds.data.corpus import Corpus
from unidec_ds.data.keyed import hash64
from unidec_ds.embedding import BLOCK, embed
from unidec_ds.model import UniDEC
from unidec_ds.search import fixed_blocks


class LabelVectors(NamedTuple):
    """Some labels as the dual encoder sees them."""

    vectors_nD: Tensor
    """fp32 on the host, L2-normalised."""
    rows: list[tuple[str, int]]
    """Text and number of train positives of each."""


def embed_some_labels(model: UniDEC, corpus: Corpus, count: int, seed: int) -> LabelVectors:
    """Embeds `count` labels that have a text, a seeded sample. No communication.

    Args:
        model: with a trained dual-encoder head.
        corpus: the label texts.
        count: of labels; all of them if there are fewer.
        seed: chooses the labels.
    """
    ids = np.flatnonzero(corpus.label_has_text)
    ids = np.sort(ids[np.argsort(hash64(seed, "projector labels", ids), kind="stable")[:count]])
    blocks = [
        embed(model, corpus.labels, ids[start:end], ("de",), corpus.pad_token_id)[0].cpu()
        for start, end in fixed_blocks(len(ids), BLOCK)
    ]
    vectors_nD = torch.cat(blocks) if blocks else torch.empty(0, model.width)
    counts = corpus.positives["train"].column_counts()[ids].tolist()
    return LabelVectors(vectors_nD, list(zip(corpus.labels.texts(ids), counts, strict=True)))
