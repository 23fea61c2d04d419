"""Ranks that see other storage, or were started otherwise, end alike before any process group."""

from __future__ import annotations

import shutil
from datetime import timedelta

import pytest
from data.raw_corpora import random_content, write_renee
from ranks import run_ranks
from tiny import make_inputs, write_recipe_file

from unidec_ds import shared_storage

pytestmark = pytest.mark.slow


def prepare_on_this_rank(options):
    """Returns what the job's checks say on this rank, "" for nothing."""
    from unidec_ds.config import load_recipe
    from unidec_ds.errors import UserError
    from unidec_ds.job import prepare_job
    from unidec_ds.lifeline import Lifeline

    shared_storage.PATIENCE_S = 1.0
    lifeline = Lifeline.of_launch()
    recipe, ds_config, corpus, run, resume = options[lifeline.rank]
    lifeline.open(timedelta(seconds=60))
    try:
        overrides = [f"corpus.path={corpus}"] if corpus else []
        prepare_job(load_recipe(str(recipe), overrides), ds_config, run, resume, lifeline=lifeline)
    except UserError as error:
        return str(error)
    finally:
        lifeline.close()
    return ""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def prepare(inputs, *ranks):
    """Runs the checks; each of `ranks` says in what its rank differs."""
    usual = {
        "recipe": write_recipe_file(inputs),
        "ds_config": inputs / "ds_config.json",
        "corpus": None,
        "run": inputs / "run",
        "resume": None,
    }
    options = [tuple({**usual, **differs}.values()) for differs in ranks]
    return run_ranks(len(ranks), prepare_on_this_rank, options, join=False)


def test_ranks_with_a_run_directory_of_their_own_are_named(inputs, tmp_path):
    (tmp_path / "own").mkdir()
    said = prepare(inputs, {}, {"run": tmp_path / "own"})
    assert said[0] == said[1]
    assert "--output: rank 1 (host " in said[0]
    assert f"did not find in {tmp_path / 'own'} what rank 0" in said[0]
    assert f"has written to {inputs / 'run'}" in said[0]
    assert not (inputs / "run").exists()
    assert list((tmp_path / "own").iterdir()) == []


def test_another_corpus_and_other_settings_on_a_rank_are_named_all_at_once(inputs, tmp_path):
    write_renee(tmp_path / "other", random_content(num_train=80, num_labels=60))
    other = write_recipe_file(inputs, "other.yaml", train={"seed": 5})
    said = prepare(inputs, {}, {"corpus": str(tmp_path / "other"), "recipe": other})
    assert said[0] == said[1]
    assert "recipe: rank 1 (host " in said[0]
    assert "train.seed: 5, not 0" in said[0]
    assert "corpus: rank 1 (host " in said[0]
    assert "with fingerprint" in said[0]


def test_a_rank_may_have_a_copy_of_the_corpus(inputs, tmp_path):
    prepare(inputs, {})
    (prepared,) = (inputs / "prepared").glob("raw-*")
    shutil.copytree(prepared, tmp_path / "copy")
    assert prepare(inputs, {}, {"corpus": str(tmp_path / "copy")}) == ["", ""]
