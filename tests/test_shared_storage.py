"""What another node has written may show late; whoever needs it waits for a while."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

from unidec_ds import shared_storage
from unidec_ds.shared_storage import appears


def test_what_shows_late_is_found_and_what_never_does_is_given_up(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    looks = []

    def look():
        looks.append((folder / "file").read_text())  # an OSError for as long as it is not there
        return looks[-1] == "whole"

    def write():
        folder.mkdir()
        (folder / "file").write_text("")
        while not looks:
            time.sleep(0.01)
        (folder / "file").write_text("whole")

    writer = threading.Timer(0.3, write)
    writer.start()
    assert appears(look, tmp_path, folder)
    writer.join()
    assert looks[0] == ""
    monkeypatch.setattr(shared_storage, "PATIENCE_S", 0.3)
    assert not appears(lambda: (folder / "other").is_file(), folder)
    assert not appears(lambda: True, tmp_path / "none")


def mine_where_rank_1_sees_it_late(inputs: Path, output: Path):
    """Returns the shortlists that this rank has opened."""
    from unidec_ds import comm
    from unidec_ds.data.corpus import open_corpus
    from unidec_ds.encoders import EncoderConfig, load_encoder
    from unidec_ds.mining.mine import MiningConfig, mine
    from unidec_ds.model import ModelConfig, UniDEC

    corpus = open_corpus(inputs / "out")
    config = EncoderConfig(name=str(inputs / "encoder"), max_length=8)
    torch.manual_seed(0)
    model = UniDEC(load_encoder(config, torch.device("cpu")), 16, ModelConfig())
    written = folder = output / "mining"
    if comm.rank() == 1:
        folder = output / "view"

        def show_late():
            while not (written / "epoch-0002" / "mined.json").is_file():
                time.sleep(0.01)
            time.sleep(1.0)
            folder.symlink_to(written)

        threading.Thread(target=show_late, daemon=True).start()
    mined = mine(
        model,
        corpus,
        corpus.train_query_ids(),
        config=MiningConfig(shortlist_size=9),
        num_clusters=None,
        folder=folder,
        epoch=2,
        seed=0,
    )
    return np.array(mined.shortlists)


@pytest.mark.slow
def test_a_rank_waits_for_shortlists_that_show_late(tmp_path):
    from tiny import make_encoder, make_raw_corpus

    from unidec_ds.data.prepare import prepare

    make_raw_corpus(tmp_path / "raw", num_train=90, num_labels=60)
    encoder = make_encoder(tmp_path / "encoder")
    prepare(tmp_path / "raw", tmp_path / "out", encoder=encoder, max_length=8)
    found = run_ranks(2, mine_where_rank_1_sees_it_late, tmp_path, tmp_path / "run")
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] >= 0).any()
