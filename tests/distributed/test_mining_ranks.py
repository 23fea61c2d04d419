"""Shortlists and clusters are the same, bit for bit, at any number of ranks; kept vectors too."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch.nn.functional import normalize

from unidec_ds import embedding
from unidec_ds.data.corpus import open_corpus
from unidec_ds.encoders import EncoderConfig, load_encoder
from unidec_ds.mining import approximate as mining_index
from unidec_ds.mining import mine as mining
from unidec_ds.mining.mine import MiningConfig, mine
from unidec_ds.mining.vector_cache import VectorCache
from unidec_ds.model import ModelConfig, UniDEC

NUM_CLUSTERS = 7


def mine_on_this_rank(folder: Path, output: Path):
    """Mines in small blocks, so that three ranks have work; returns shortlists and clusters.

    First with every text encoded, then with the vectors of most texts kept, then the same with an
    approximate search.
    """
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
        patch.object(mining_index, "_QUERY_BLOCK", 16),
    ):
        found = []
        some = kept_vectors(corpus, model.width, output / "vectors")
        for kept, search in ((None, "exact"), (some, "exact"), (some, "ivf")):
            mined = mine(
                model,
                corpus,
                corpus.train_query_ids(),
                config=MiningConfig(shortlist_size=9, search=search),
                num_clusters=NUM_CLUSTERS,
                folder=output,
                epoch=2,
                seed=0,
                kept=kept,
            )
            found += [np.array(mined.shortlists), np.array(mined.clusters)]
    torch.set_num_threads(num_threads)
    return found


def kept_vectors(corpus, width, folder):
    """Keeps the same random vectors at any world size, all but every fourth text's."""
    sizes = {"queries": len(corpus.queries["train"]), "labels": corpus.num_labels}
    cache = VectorCache(folder, sizes, width, {}, first_step=0)
    generator = torch.Generator().manual_seed(1)
    for kind, size in sizes.items():
        vectors = normalize(torch.randn(size, width, generator=generator))
        ids = np.flatnonzero(np.arange(size) % 4 > 0)
        cache.keep(kind, ids, vectors[torch.from_numpy(ids)], step=0)
    return cache.fresh(1, max_age_steps=1)


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
        for part, expected_part in zip(found, expected, strict=True):
            np.testing.assert_array_equal(part, expected_part)
    shortlists, clusters, *with_kept = expected
    assert (shortlists >= 0).any()
    assert len(set(clusters)) == NUM_CLUSTERS
    assert (with_kept[0] != shortlists).any()
