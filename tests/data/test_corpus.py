import pickle
from itertools import pairwise

import numpy as np
import pytest

from unidec_ds.data.build import TextTableWriter
from unidec_ds.data.corpus import Corpus, CorpusConfig, TextTable, split_validation
from unidec_ds.data.pairs import Pairs


@pytest.fixture(scope="module")
def table_and_rows(tmp_path_factory):
    """A table of six record batches of uneven sizes, and its rows as plain lists."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("tables") / "table"
    rows = []
    with pytest.MonkeyPatch.context() as patch, TextTableWriter(folder, "seed") as writer:
        patch.setattr("unidec_ds.data.build._CHUNK_ROWS", 1)
        for size in (1, 40, 3, 100, 7, 60):
            lengths = rng.integers(1, 30, size)
            batch = [
                (f"u{len(rows) + i}", "é" * int(n), rng.integers(0, 2**31 - 1, n).tolist())
                for i, n in enumerate(lengths)
            ]
            rows += batch
            writer.add(*(list(column) for column in zip(*batch, strict=True)))
    return TextTable(folder), rows


def test_tokens_equal_the_rows_asked_for(table_and_rows):
    table, rows = table_and_rows
    assert table.dataset.data.column("tokens").num_chunks == 6
    rng = np.random.default_rng(1)
    for ids in (
        np.arange(len(rows)),
        np.array([40, 41, 0, 1, 210, 0, 143, 144]),  # both sides of the batches' edges, repeats
        rng.integers(0, len(rows), 500),
        np.zeros(0, np.int64),
    ):
        values, offsets = table.tokens(ids)
        assert (values.dtype, offsets.dtype) == (np.int32, np.int64)
        parts = [values[a:b].tolist() for a, b in pairwise(offsets)]
        assert parts == [rows[i][2] for i in ids]
        counts = table.token_counts(ids)
        assert counts.dtype == np.int32
        assert counts.tolist() == [len(rows[i][2]) for i in ids]
        assert table.texts(ids) == [rows[i][1] for i in ids]
        assert table.uids(ids) == [rows[i][0] for i in ids]


def test_the_table_is_a_dataset(table_and_rows):
    table, rows = table_and_rows
    assert len(table) == len(table.dataset) == len(rows)
    row = table.dataset[142]
    assert (row["uid"], row["text"], row["tokens"]) == rows[142]


def test_the_table_is_mapped_and_travels_as_a_path(table_and_rows):
    table, rows = table_and_rows
    data = pickle.dumps(table)
    assert len(data) < 1000
    assert pickle.loads(data).uids(np.array([3])) == [rows[3][0]]
    assert not table._words.flags.owndata
    assert not table._words.flags.writeable


@pytest.mark.parametrize("ids", [[-1], [211]])
def test_ids_out_of_range_are_our_bug(table_and_rows, ids):
    with pytest.raises(AssertionError, match="out of range"):
        table_and_rows[0].tokens(np.array(ids))


def test_config_refuses_values_out_of_range():
    assert CorpusConfig(path="x").validation_fraction == 0.05
    for wrong in ({"validation_fraction": 0.6}, {"text": "content"}, {"pathh": "x"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CorpusConfig(**{"path": "x", **wrong})


def corpus_of(positives):
    """A corpus of which only the train positives matter."""
    return Corpus(
        path=None,
        name="",
        fingerprint="",
        manifest={},
        labels=range(positives.num_columns),
        queries={},
        positives={"train": positives},
        filter_pairs={},
        label_has_text=None,
        pad_token_id=0,
    )


def random_positives(seed, num_queries=4000, num_labels=1500, num_pairs=12000):
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.zipf(1.3, num_pairs) - 1, num_labels - 1)
    return Pairs.from_pairs(
        rng.integers(0, num_queries, num_pairs), labels, num_queries, num_labels
    )


@pytest.mark.parametrize("seed", range(3))
def test_validation_leaves_every_label_a_train_positive(seed):
    positives = random_positives(seed)
    corpus = corpus_of(positives)
    train, validation = split_validation(corpus, 0.1, seed)
    both = np.concatenate([train, validation])
    assert sorted(both.tolist()) == corpus.train_query_ids().tolist()
    assert len(validation) == int(0.1 * len(both))
    left = np.unique(positives.take(train)[1])
    assert left.tolist() == np.flatnonzero(positives.column_counts()).tolist()
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()


def test_validation_depends_on_the_seed_alone():
    corpus = corpus_of(random_positives(0))
    splits = [split_validation(corpus, 0.1, seed)[1].tolist() for seed in (7, 7, 8)]
    assert splits[0] == splits[1] != splits[2]


def test_validation_is_capped(monkeypatch):
    monkeypatch.setattr("unidec_ds.data.corpus.MAX_VALIDATION_QUERIES", 50)
    assert len(split_validation(corpus_of(random_positives(0)), 0.5, 0)[1]) == 50


def test_no_validation():
    corpus = corpus_of(random_positives(0))
    train, validation = split_validation(corpus, 0.0, 0)
    assert len(validation) == 0
    assert train.tolist() == corpus.train_query_ids().tolist()


def test_validation_takes_less_where_labels_would_lose_their_last_query(caplog):
    # Labels 0..3 have one query each; label 4 has queries 0..5, so 4 and 5 alone are free.
    rows, columns = [0, 1, 2, 3, *range(6)], [0, 1, 2, 3, *[4] * 6]
    corpus = corpus_of(Pairs.from_pairs(rows, columns, 7, 5))
    train, validation = split_validation(corpus, 0.5, 0)
    assert validation.tolist() == [4, 5]
    assert train.tolist() == [0, 1, 2, 3]
    assert "2 queries instead of 3" in caplog.text
