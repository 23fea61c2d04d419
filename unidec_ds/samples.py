"""Example predictions for people to look at."""

from __future__ import annotations

import numpy as np

from unidec_ds.data.corpus import Corpus
from unidec_ds.data.pairs import Ids
from unidec_ds.evaluation import Predictions

_WIDTH = 88


def describe_samples(
    corpus: Corpus, split: str, query_ids: Ids, predictions: Predictions, count: int = 5, k: int = 5
) -> str:
    """Returns Markdown: `count` queries spread over the set, what is predicted and what is true.

    Args:
        corpus: the texts and the truth.
        split: "test", or "validation" for train queries.
        query_ids: int64 [N], the queries that `predictions` belong to.
        predictions: label ids and scores [N, K].
        count: number of queries.
        k: predictions shown per query.
    """
    table = "test" if split == "test" else "train"
    truth = corpus.positives[table]
    places = np.linspace(0, len(query_ids) - 1, min(count, len(query_ids))).astype(np.int64)
    lines = []
    for place in places:
        query_id = query_ids[place]
        true_ids = truth.row(int(query_id)).astype(np.int64)
        (text,) = corpus.queries[table].texts(query_ids[place : place + 1])
        lines.append(f"query: {_shorten(text)}")
        found = predictions.label_ids[place, :k]
        found = found[found >= 0]
        for score, label_id, label in zip(
            predictions.scores[place], found, corpus.labels.texts(found), strict=False
        ):
            mark = "+" if label_id in true_ids else " "
            lines.append(f"  {mark} {score:6.3f}  {_shorten(label)}")
        missed = np.setdiff1d(true_ids, found)
        lines += [f"  missed   {_shorten(label)}" for label in corpus.labels.texts(missed[:k])]
        if len(missed) > k:
            lines.append(f"  missed   and {len(missed) - k} more")
    return "\n".join(["```", *lines, "```"])


def _shorten(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _WIDTH else flat[: _WIDTH - 3] + "..."
