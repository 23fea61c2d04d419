"""Corpora at the edges: right counts, and memory and time that a laptop has."""

from itertools import pairwise

import numpy as np
import pytest
from raw_corpora import save_tokenizer, write

from unidec_ds.data.build import _BATCH_TARGETS, _batches
from unidec_ds.data.pool import Planner, PoolConfig
from unidec_ds.data.prepare import prepare
from unidec_ds.data.records import Record


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("encoder"))


def make(folder, encoder, labels, texts, rows):
    """Prepares a corpus of Renee's layout with a test set of one query."""
    raw = folder / "raw"
    write(raw / "Y.txt", labels, False)
    for split, queries, targets in (("trn", texts, rows), ("tst", texts[:1], rows[:1])):
        write(raw / f"{split}_X.txt", queries, False)
        lines = (" ".join(f"{label}:1" for label in row) for row in targets)
        write(raw / f"{split}_X_Y.txt", [f"{len(queries)} {len(labels)}", *lines], False)
    return prepare(raw, folder / "out", encoder=encoder, max_length=8, show_progress=False)


def plan(corpus, batch_size=2, size=64, **options):
    planner = Planner(
        query_ids=corpus.train_query_ids(),
        positives=corpus.positives["train"],
        filter_pairs=corpus.filter_pairs["train"],
        pool=PoolConfig(size=size),
        batch_size=batch_size,
        seed=0,
        **options,
    )
    return planner.plan(0)


def check_plan(corpus, step):
    """Every pair of the plan is a positive, and every positive in the pool is a pair."""
    expected = []
    for row, query in enumerate(step.query_ids):
        own = np.isin(step.label_ids, corpus.positives["train"].row(int(query)))
        expected += [(row, int(column)) for column in np.flatnonzero(own)]
    pairs = zip(step.positive_query.tolist(), step.positive_pool.tolist(), strict=True)
    assert list(pairs) == expected
    assert (np.diff(step.label_ids) > 0).all()


@pytest.mark.parametrize("num_labels", [30_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_one_query_has_every_label_as_a_positive(num_labels, tmp_path, encoder):
    """A second one has the last."""
    labels = ["red"] * num_labels
    corpus = make(tmp_path, encoder, labels, ["car", "blue"], [range(num_labels), [num_labels - 1]])
    assert corpus.positives["train"].row_counts().tolist() == [num_labels, 1]
    assert corpus.positives["train"].column_counts().tolist() == [1] * (num_labels - 1) + [2]
    assert (corpus.positives["train"].row(0) == np.arange(num_labels)).all()
    step = plan(corpus)
    assert len(step.label_ids) == 64
    assert step.query_ids.tolist() == [0, 1]
    check_plan(corpus, step)
    whole = plan(corpus, all_labels=True)
    assert len(whole.label_ids) == num_labels
    assert len(whole.positive_pool) == num_labels + 1


@pytest.mark.parametrize("num_queries", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_one_label_on_all_queries(num_queries, tmp_path, encoder):
    texts = ["red car"] * num_queries
    corpus = make(tmp_path, encoder, ["old", "new"], texts, [[1]] * len(texts))
    assert corpus.positives["train"].column_counts().tolist() == [0, num_queries]
    assert corpus.manifest["oddities"]["labels_without_train_positive"] == 1
    step = plan(corpus, batch_size=1024)
    assert step.label_ids.tolist() == [1]
    assert len(step.query_ids) == len(step.positive_pool)
    assert step.num_dropped_queries == 0


def test_texts_of_a_million_characters_and_labels_without_any(tmp_path, encoder):
    long, word = "red " * 250_000, "x" * 1_000_000
    rows = [[0, 1, 2, 3], [3]]
    corpus = make(tmp_path, encoder, ["", long, "", word], [long, "car"], rows)
    assert corpus.label_has_text.tolist() == [False, True, False, True]
    values, offsets = corpus.labels.tokens(np.arange(4))
    assert [len(values[a:b]) for a, b in pairwise(offsets)] == [2, 8, 2, 3]
    assert corpus.labels.texts(np.array([1, 3])) == [long.strip(), word]
    check_plan(corpus, plan(corpus))


def test_no_label_with_a_text(tmp_path, encoder):
    corpus = make(tmp_path, encoder, [""] * 5, ["red", "car"], [[0, 4], [2]])
    assert not corpus.label_has_text.any()
    assert corpus.manifest["oddities"]["labels_without_text"] == 5
    check_plan(corpus, plan(corpus))


def test_a_batch_of_records_is_bounded_by_their_targets_too():
    """8,192 queries of 100,000 positives each would have been 30 GB of Python integers."""
    targets = tuple(range(100_000))
    records = (Record(n, str(n), "red", targets=targets, row=n) for n in range(30))
    sizes = [len(batch) for batch in _batches(records)]
    most = -(-_BATCH_TARGETS // len(targets))
    assert sizes == [most, most, 30 - 2 * most]


def test_many_predictions_of_which_one_is_given_twice(tmp_path):
    """Looking for the repeated label took time in the square of their number."""
    from unidec_ds.data.predictions import read_predictions
    from unidec_ds.errors import CorpusError

    row = " ".join(f"{label}:1" for label in [*range(100_000), 99_999])
    write(tmp_path / "p.txt", ["1 100000", row], False)
    with pytest.raises(CorpusError, match=r"p\.txt:2: label 99999 is predicted more than once"):
        read_predictions(tmp_path / "p.txt", 5, num_queries=1, num_labels=100_000)
