"""Shortlists are the best negatives by a dense argsort; files are whole or not there."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_encoder, make_raw_corpus
from torch.nn.functional import normalize

from unidec_ds import embedding
from unidec_ds.data.prepare import prepare
from unidec_ds.embedding import embed_all
from unidec_ds.encoders import EncoderConfig, load_encoder
from unidec_ds.errors import CheckpointError
from unidec_ds.mining import mine as mining
from unidec_ds.mining.mine import (
    MiningConfig,
    is_exact,
    label_block,
    last_mined_epoch,
    mine,
    mines_at,
)
from unidec_ds.mining.mined import MiningTexts, open_mined, remove_mined
from unidec_ds.mining.vector_cache import VectorCache
from unidec_ds.model import ModelConfig, UniDEC

NUM_TRAIN, NUM_LABELS = 90, 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mining")
    make_raw_corpus(folder / "raw", num_train=NUM_TRAIN, num_labels=NUM_LABELS)
    encoder = make_encoder(folder / "encoder")
    return prepare(folder / "raw", folder / "out", encoder=encoder, max_length=8)


@pytest.fixture(scope="module")
def model(corpus):
    encoder = load_encoder(
        EncoderConfig(name=str(corpus.path.parent / "encoder"), max_length=8), torch.device("cpu")
    )
    torch.manual_seed(0)
    return UniDEC(encoder, 16, ModelConfig(width=12))


def mine_here(model, corpus, folder, *, query_ids=None, num_clusters=None, kept=None, **settings):
    return mine(
        model,
        corpus,
        np.arange(NUM_TRAIN) if query_ids is None else query_ids,
        config=MiningConfig(**settings),
        num_clusters=num_clusters,
        folder=folder,
        epoch=5,
        seed=1,
        kept=kept,
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks of texts, labels, queries and keys even here."""
    for module, name in ((embedding, "BLOCK"), (mining, "BLOCK")):
        monkeypatch.setattr(module, name, 16)
    monkeypatch.setattr(mining, "label_block", lambda num_labels: 16)
    monkeypatch.setattr(mining, "query_block", lambda device: 32)
    monkeypatch.setattr(mining, "_MERGE_BLOCK", 20)


@pytest.mark.parametrize("shortlist_size", [1, 7, 200])
def test_shortlists_are_those_of_a_dense_argsort(
    model, corpus, tmp_path, small_blocks, shortlist_size
):
    query_ids = np.flatnonzero(np.arange(NUM_TRAIN) % 4 != 1)[::-1]  # neither all nor in order
    mined = mine_here(model, corpus, tmp_path, query_ids=query_ids, shortlist_size=shortlist_size)
    assert mined.shortlists.shape == (NUM_TRAIN, shortlist_size)
    assert mined.shortlists.dtype == np.int32
    assert (mined.shortlists[np.arange(NUM_TRAIN) % 4 == 1] == -1).all()

    views = ("de",)
    tables = (corpus.queries["train"], NUM_TRAIN), (corpus.labels, NUM_LABELS)
    queries_ND, labels_LD = (
        embed_all(model, table, np.arange(size), views, corpus.pad_token_id)[0].numpy()
        for table, size in tables
    )
    positives, filter_pairs = corpus.positives["train"], corpus.filter_pairs["train"]
    assert filter_pairs.num_pairs
    assert not corpus.label_has_text.all()
    assert (positives.row_counts(query_ids) == 0).any()  # queries without a positive too
    for query_id in query_ids:
        barred = np.union1d(positives.row(query_id), filter_pairs.row(query_id))
        allowed = np.setdiff1d(np.flatnonzero(corpus.label_has_text), barred)
        scores_L = labels_LD @ queries_ND[query_id]
        found = mined.shortlists[query_id]
        filled = min(shortlist_size, len(allowed))
        assert (found[filled:] == -1).all()
        assert len(set(found[:filled])) == filled
        assert np.isin(found[:filled], allowed).all()
        best = np.sort(scores_L[allowed])[::-1][:filled]
        np.testing.assert_allclose(scores_L[found[:filled]], best, atol=1e-5)


def test_kept_vectors_are_used_and_only_other_texts_are_encoded(
    model, corpus, tmp_path, small_blocks
):
    queries, labels = corpus.queries["train"], corpus.labels
    vectors = {
        kind: embed_all(model, table, np.arange(len(table)), ("de",), corpus.pad_token_id)[0]
        for kind, table in (("queries", queries), ("labels", labels))
    }
    sizes = {"queries": NUM_TRAIN, "labels": NUM_LABELS}
    cache = VectorCache(tmp_path / "vectors", sizes, model.width, {}, first_step=0)
    generator = torch.Generator().manual_seed(3)
    num_kept = 0
    for kind, size in sizes.items():
        # Another direction than the model's, so that a kept vector cannot pass for a fresh one.
        ids = np.flatnonzero(np.arange(size) % 3 > 0)
        if kind == "labels":
            ids = ids[corpus.label_has_text[ids]]
        other = torch.randn(len(ids), model.width, generator=generator)
        vectors[kind][torch.from_numpy(ids)] = normalize(other).half().float()
        cache.keep(kind, ids, normalize(other), step=4)
        num_kept += len(ids)
    mined = mine_here(
        model, corpus, tmp_path, kept=cache.fresh(5, max_age_steps=3), shortlist_size=7
    )

    scores = vectors["queries"] @ vectors["labels"].T
    scores[:, torch.from_numpy(~corpus.label_has_text)] = -torch.inf
    for pairs in (corpus.positives["train"], corpus.filter_pairs["train"]):
        scores[torch.from_numpy(pairs.rows_of_pairs()), pairs.indices.astype(np.int64)] = -torch.inf
    best = scores.sort(dim=1, descending=True).values[:, :7]
    found = scores.gather(1, torch.from_numpy(mined.shortlists.astype(np.int64)))
    torch.testing.assert_close(found, best, rtol=0, atol=1e-5)
    total = NUM_TRAIN + np.count_nonzero(corpus.label_has_text)
    assert mined.texts == MiningTexts(encoded=total - num_kept, reused=num_kept)
    assert open_mined(tmp_path, 5).texts == mined.texts


@pytest.mark.parametrize("shortlist_size", [7, 200])
def test_an_approximate_search_finds_negatives_only_and_says_how_many_it_missed(
    model, corpus, tmp_path, shortlist_size
):
    query_ids = np.flatnonzero(np.arange(NUM_TRAIN) % 4 != 1)
    settings = {"query_ids": query_ids, "shortlist_size": shortlist_size}
    exact = mine_here(model, corpus, tmp_path / "exact", search="exact", **settings)
    found = mine_here(model, corpus, tmp_path / "ivf", search="ivf", **settings)
    assert exact.recall == 1.0
    num_found = 0
    for query_id in range(NUM_TRAIN):
        best, row = exact.shortlists[query_id], found.shortlists[query_id]
        best, row = best[best >= 0], row[row >= 0]
        assert len(set(row)) == len(row)
        num_found += len(np.intersect1d(best, row))
        # What it finds are labels that the exact search may find, in the exact search's order.
        barred = np.union1d(
            corpus.positives["train"].row(query_id), corpus.filter_pairs["train"].row(query_id)
        )
        assert corpus.label_has_text[row].all()
        assert not np.isin(row, barred).any()
        common = best[np.isin(best, row)]
        np.testing.assert_array_equal(row[np.isin(row, common)], common)
    # So few vectors have as many lists as probes: nothing is missed but rounding of near ties.
    assert found.recall == pytest.approx(num_found / (exact.shortlists >= 0).sum(), abs=1e-6)
    assert found.recall > 0.99
    assert [path.name for path in (tmp_path / "ivf").iterdir()] == ["epoch-0005"]
    assert open_mined(tmp_path / "ivf", 5).recall == found.recall


def test_auto_is_exact_up_to_a_number_of_operations():
    auto = MiningConfig()
    few, many = torch.empty(1000, 100), torch.empty(1000, 100, device="meta")
    assert is_exact(auto, few, 10**8)
    assert not is_exact(auto, few, 2 * 10**8)
    assert is_exact(auto, many, 2 * 10**8)
    assert not is_exact(auto, many, 10**11)
    assert not is_exact(MiningConfig(search="ivf"), few, 10)
    assert is_exact(MiningConfig(search="exact"), few, 10**12)


def test_clusters_are_balanced_and_optional(model, corpus, tmp_path):
    query_ids = corpus.train_query_ids()
    mined = mine_here(model, corpus, tmp_path, query_ids=query_ids, num_clusters=7)
    assert mined.clusters.shape == query_ids.shape
    assert np.ptp(np.bincount(mined.clusters, minlength=7)) <= 1
    again = mine_here(model, corpus, tmp_path, query_ids=query_ids)  # replaces the first
    assert again.clusters is None
    np.testing.assert_array_equal(again.shortlists, mined.shortlists)


def test_opens_again_what_it_wrote(model, corpus, tmp_path):
    mined = mine_here(model, corpus, tmp_path, num_clusters=4)
    opened = open_mined(tmp_path, 5)
    assert isinstance(opened.shortlists, np.memmap)
    np.testing.assert_array_equal(opened.shortlists, mined.shortlists)
    np.testing.assert_array_equal(opened.clusters, mined.clusters)
    assert opened.seconds == mined.seconds
    assert opened.seconds.total_s > opened.seconds.embed_s > 0
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0005"]


def test_model_is_left_as_it_was(model, corpus, tmp_path):
    model.train()
    mine_here(model, corpus, tmp_path)
    assert all(module.training for module in model.modules())


def test_what_is_missing_or_damaged_is_named(model, corpus, tmp_path):
    with pytest.raises(CheckpointError, match=r"epoch-0005.*mined for epoch 5"):
        open_mined(tmp_path, 5)
    mine_here(model, corpus, tmp_path)
    file = tmp_path / "epoch-0005" / "shortlists.npy"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="epoch-0005"):
        open_mined(tmp_path, 5)
    (tmp_path / "epoch-0005" / "mined.json").write_text(json.dumps([]))
    with pytest.raises(CheckpointError, match="epoch-0005"):
        open_mined(tmp_path, 5)


def test_only_epochs_to_keep_are_kept(model, corpus, tmp_path):
    mine_here(model, corpus, tmp_path)
    remove_mined(tmp_path, keep={5})
    open_mined(tmp_path, 5)
    remove_mined(tmp_path, keep=())
    assert not list(tmp_path.iterdir())


def test_epochs_that_mine():
    config = MiningConfig(start_epoch=5, every_epochs=5)
    assert [epoch for epoch in range(20) if mines_at(config, epoch)] == [5, 10, 15]
    assert [last_mined_epoch(config, epoch) for epoch in (0, 4, 5, 9, 10)] == [
        None,
        None,
        5,
        5,
        10,
    ]
    assert mines_at(MiningConfig(start_epoch=0, every_epochs=1), 0)
    off = MiningConfig(every_epochs=0)
    assert not any(mines_at(off, epoch) for epoch in range(20))


@given(st.integers(1, 10**8))
def test_label_blocks_are_whole_text_blocks(num_labels):
    size = label_block(num_labels)
    assert size % embedding.BLOCK == 0
    assert 0 < size <= 16384
