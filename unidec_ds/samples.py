"""Example predictions for people to look at: as text, and as data for the report page."""

from __future__ import annotations

from typing import Any

import numpy as np

from unidec_ds.data.corpus import Corpus, TextTable
from unidec_ds.data.keyed import hash64
from unidec_ds.data.pairs import Ids
from unidec_ds.evaluation import Predictions

_WIDTH = 88
_WIDTH_SAVED = 400


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
    table = _table(split)
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


def _shorten(text: str, width: int = _WIDTH) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."


def choose_samples(
    corpus: Corpus,
    split: str,
    query_ids: Ids,
    predictions: Predictions,
    *,
    seed: int,
    count: int = 6,
    k: int = 5,
) -> dict[str, list[dict[str, Any]]]:
    """Returns `count` queries whose first prediction is true, and as many whose is not.

    Args:
        corpus: the texts and the truth.
        split: "test", or "validation" for train queries.
        query_ids: int64 [N], the queries that `predictions` belong to.
        predictions: label ids and scores [N, K].
        seed: chooses among the queries; those without truth are never chosen.
        count: of each kind, if there are that many.
        k: predictions and missed labels kept per query.

    Returns:
        {"right": [...], "wrong": [...]}, plain data: each query with its "uid", "text", its
        "predictions" (uid, text, score, is_true), the true labels "missed" among those k (uid,
        text), and "num_missed", which may be more.
    """
    truth = corpus.positives[_table(split)]
    first = predictions.label_ids[:, 0]
    order = np.argsort(hash64(seed, "samples", query_ids), kind="stable")
    samples: dict[str, list[dict[str, Any]]] = {"right": [], "wrong": []}
    for place in order.tolist():
        true_ids = truth.row(int(query_ids[place]))
        chosen = samples["right" if first[place] in true_ids else "wrong"]
        if len(true_ids) and len(chosen) < count:
            chosen.append(_sample(corpus, split, int(query_ids[place]), predictions, place, k))
        if all(len(kind) == count for kind in samples.values()):
            break
    return samples


def _sample(
    corpus: Corpus, split: str, query_id: int, predictions: Predictions, place: int, k: int
) -> dict[str, Any]:
    table = _table(split)
    true_ids = corpus.positives[table].row(query_id).astype(np.int64)
    found = predictions.label_ids[place, :k]
    found = found[found >= 0]
    missed = np.setdiff1d(true_ids, found)
    query = np.array([query_id])
    return {
        **_named(corpus.queries[table], query)[0],
        "predictions": [
            {**label, "score": round(float(score), 4), "is_true": bool(label_id in true_ids)}
            for label, score, label_id in zip(
                _named(corpus.labels, found), predictions.scores[place], found, strict=False
            )
        ],
        "missed": _named(corpus.labels, missed[:k]),
        "num_missed": len(missed),
    }


def _named(table: TextTable, ids: Ids) -> list[dict[str, Any]]:
    texts = (_shorten(text, _WIDTH_SAVED) for text in table.texts(ids))
    return [{"uid": uid, "text": t} for uid, t in zip(table.uids(ids), texts, strict=True)]


def _table(split: str) -> str:
    return "test" if split == "test" else "train"
