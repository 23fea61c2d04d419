"""Reads truth and any system's predictions from files and scores them: all of `unidec-ds score`.

Files are sparse text or .npz as `data.matrices` reads them, filter pairs lines of `row col`. In a
truth or train file every entry but an explicit 0 is a positive. In a prediction file every entry is
a prediction, one of score 0 too. Memory: 8·k bytes per query, and the truth.

Letters: N queries, K predictions kept per query, C predictions of a query,
M positives.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unidec_ds.data.matrices import MatrixRow, SparseMatrixFile, read_pairs
from unidec_ds.data.pairs import Ids, Pairs
from unidec_ds.errors import CorpusError, UserError
from unidec_ds.metrics import KS, inverse_propensity, score_predictions


def score_files(
    truth: Path,
    predictions: Path,
    train: Path,
    *,
    filter_pairs: Path | None = None,
    propensity: tuple[float, float],
    ks: Sequence[int] = KS,
) -> dict[str, float]:
    """Returns the metrics of `metrics.score_predictions` and what they rest on.

    Args:
        truth: true labels of the test queries.
        predictions: scored labels of the same queries; a missing one counts as a miss.
        train: positives of all train queries, for the propensities.
        filter_pairs: (query row, label row) pairs that are removed from the predictions.
        propensity: (a, b) of the inverse propensities.
        ks: cut-offs.

    Returns:
        "P@1", "nDCG@1", ... in percent, then "propensity_a", "propensity_b",
        "num_train_queries" (the N of the propensities), "num_queries" and "num_labels".

    Raises:
        UserError: a file is missing, malformed or of another shape; (a, b) is out of range.
    """
    a, b = propensity
    if not (math.isfinite(a) and a >= 0 and math.isfinite(b) and b > 0):
        raise UserError(
            f"propensity {a},{b}: a >= 0 and b > 0 were needed, such as 0.55,1.5 "
            "(Amazon sets 0.6,2.6; Wikipedia-500K 0.5,0.4)."
        )
    true_pairs, train_pairs = read_positives(truth), read_positives(train)
    num_queries, num_labels = true_pairs.num_rows, true_pairs.num_columns
    if train_pairs.num_columns != num_labels:
        raise CorpusError(
            f"{train}: {train_pairs.num_columns} labels, but {truth} has {num_labels}. "
            "Both must be over the same labels."
        )
    for path, pairs in ((truth, true_pairs), (train, train_pairs)):
        if pairs.num_rows == 0:
            raise CorpusError(f"{path}: no rows; at least one query was needed.")
    exclude = Pairs.empty(num_queries, num_labels)
    if filter_pairs is not None:
        pairs_read = read_pairs(_existing(filter_pairs), num_queries, num_labels)
        exclude = Pairs.from_pairs(*pairs_read, num_queries, num_labels)
    predicted_ids_NK = read_predictions(
        predictions, max(ks), num_queries=num_queries, num_labels=num_labels, exclude=exclude
    )
    scores = score_predictions(
        true_pairs,
        predicted_ids_NK,
        inverse_propensity=inverse_propensity(train_pairs, a, b),
        ks=ks,
    )
    return scores | {
        "propensity_a": a,
        "propensity_b": b,
        "num_train_queries": train_pairs.num_rows,
        "num_queries": num_queries,
        "num_labels": num_labels,
    }


def read_positives(path: Path) -> Pairs:
    """Returns the non-zero entries of a truth or train file.

    Raises:
        CorpusError: the file is missing or malformed, or a value is NaN.
    """
    matrix = SparseMatrixFile(_existing(path))
    counts, columns = array("q"), array("q")
    for row in matrix:
        positives = [column for column, value in zip(row.columns, row.values, strict=True) if value]
        counts.append(len(positives))
        columns.extend(positives)
    rows_M = np.repeat(np.arange(matrix.num_rows), np.array(counts, np.int64))
    columns_M = np.array(columns, np.int64)
    return Pairs.from_pairs(rows_M, columns_M, matrix.num_rows, matrix.num_columns)


def read_predictions(
    path: Path, k: int, *, num_queries: int, num_labels: int, exclude: Pairs | None = None
) -> Ids:
    """Returns each query's k best predictions: int64 [N, K], -1 where there are fewer.

    Order: score descending, label id ascending.

    Args:
        path: scored labels, one row per query.
        k: predictions to keep per query.
        num_queries: rows the file must have.
        num_labels: columns the file must have.
        exclude: pairs that are dropped before the k best are taken.

    Raises:
        CorpusError: the file is missing, malformed or of another shape, a label id is out of range
            or twice in a row, or a score is NaN; the message starts with file:line.
    """
    matrix = SparseMatrixFile(_existing(path))
    if (matrix.num_rows, matrix.num_columns) != (num_queries, num_labels):
        raise CorpusError(
            f"{path}:1: {matrix.num_rows} rows and {matrix.num_columns} columns, but the truth has "
            f"{num_queries} queries and {num_labels} labels. One row per test query, in the "
            "order of the truth, was needed."
        )
    ids_NK = np.full((num_queries, k), -1, np.int64)
    for query, row in enumerate(matrix):
        _refuse_repetition(row, path)
        ids_C = np.array(row.columns, np.int64)
        ranked_C = ids_C[np.lexsort((ids_C, -np.array(row.values, np.float64)))]
        if exclude is not None and len(excluded := exclude.row(query)):
            ranked_C = ranked_C[~np.isin(ranked_C, excluded)]
        ranked_C = ranked_C[:k]
        ids_NK[query, : len(ranked_C)] = ranked_C
    return ids_NK


def _refuse_repetition(row: MatrixRow, path: Path) -> None:
    if len(set(row.columns)) < len(row.columns):
        twice = Counter(row.columns).most_common(1)[0][0]
        raise CorpusError(
            f"{path}:{row.line}: label {twice} is predicted more than once. "
            "Keep one score per label."
        )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    return path
