"""Shortlists and clusters are the same, bit for bit, at any number of ranks."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from ranks import run_ranks

from unidec_ds import embedding, mining
from unidec_ds.data.corpus import open_corpus
from unidec_ds.encoders import EncoderConfig, load_encoder
from unidec_ds.mining import MiningConfig, mine
from unidec_ds.model import ModelConfig, UniDEC

NUM_CLUSTERS = 7


def mine_on_this_rank(folder: Path, output: Path):
    """Mines in small blocks, so that three ranks have work; returns shortlists and clusters."""
    corpus = open_corpus(folder / "out")
    encoder = load_encoder(
        EncoderConfig(name=str(folder / "encoder"), max_length=8), torch.device("cpu")
    )
    torch.manual_seed(0)
    model = UniDEC(encoder, 16, ModelConfig())
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on the ranks
    with (
        patch.object(embedding, "BLOCK", 16),
        patch.object(mining, "BLOCK", 8),
        patch.object(mining, "label_block", lambda num_labels: 13),
        patch.object(mining, "_MERGE_BLOCK", 20),
    ):
        mined = mine(
            model,
            corpus,
            corpus.train_query_ids(),
            config=MiningConfig(shortlist_size=9),
            num_clusters=NUM_CLUSTERS,
            folder=output,
            epoch=2,
            seed=0,
        )
    torch.set_num_threads(num_threads)
    return np.array(mined.shortlists), np.array(mined.clusters)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Imported here, as the ranks import this module too and need none of it.
    from tiny import make_encoder, make_raw_corpus

    from unidec_ds.data.prepare import prepare

    folder = tmp_path_factory.mktemp("mining")
    make_raw_corpus(folder / "raw", num_train=90, num_labels=60)
    encoder = make_encoder(folder / "encoder")
    prepare(folder / "raw", folder / "out", encoder=encoder, max_length=8)
    return folder


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    return run_ranks(1, mine_on_this_rank, folder, tmp_path_factory.mktemp("one"))[0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_mining_does_not_depend_on_the_world_size(folder, expected, tmp_path, world_size):
    for found in run_ranks(world_size, mine_on_this_rank, folder, tmp_path):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
    assert (expected[0] >= 0).any()
    assert len(set(expected[1])) == NUM_CLUSTERS
