"""Sample steps are those that training would take; given sizes bound them."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import make_inputs, write_recipe_file

from unidec_ds.assembly import split_train_queries
from unidec_ds.config import load_recipe
from unidec_ds.data.prepare import resolve_corpus
from unidec_ds.errors import UserError
from unidec_ds.preflight.workload import (
    corpus_workload,
    given_sizes,
    sizes_workload,
    with_random_shortlists,
)

MINING = {"every_epochs": 1, "start_epoch": 0}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def load(inputs, **sections):
    recipe = load_recipe(str(write_recipe_file(inputs, **sections)))
    corpus = resolve_corpus(recipe.corpus, recipe.encoder.name, 8, show_progress=False)
    return recipe, corpus


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_corpus_s_steps(inputs, world_size):
    recipe, corpus = load(inputs)
    workload = corpus_workload(corpus, recipe, world_size)
    train_ids, validation_ids = split_train_queries(corpus, recipe)
    # Queries whose positives are all masked are trained on by nobody; here the plan drops them.
    assert workload.sizes.trained_queries >= len(train_ids)
    assert workload.sizes.validation_queries == len(validation_ids)
    assert workload.total_steps == workload.steps_per_epoch * recipe.train.epochs
    for step in workload.steps:
        assert step.pool_size <= recipe.pool.size
        assert step.own_labels <= -(-step.pool_size // world_size) + recipe.pool.size // 2
        texts = step.own_queries + step.own_label_texts
        assert sum(size for size, _ in step.chunks) == texts
        assert texts <= step.num_tokens <= step.num_padded_tokens


@pytest.mark.parametrize(
    ("every", "start", "max_steps", "minings"),
    [(0, 0, 0, 0), (1, 0, 0, 3), (1, 2, 0, 1), (2, 0, 0, 2), (1, 3, 0, 0), (1, 1, 7, 0)],
)
def test_minings_are_those_that_training_comes_to(inputs, every, start, max_steps, minings):
    section = {"every_epochs": every, "start_epoch": start}
    recipe, corpus = load(inputs, mining=section, train={"max_steps": max_steps})
    workload = corpus_workload(corpus, recipe, 1)
    assert workload.steps_per_epoch == 7
    assert workload.num_minings == minings


def test_mined_negatives_are_stood_in_for_by_random_ones(inputs):
    recipe, corpus = load(inputs, mining=MINING, pool={"size": 0, "fill_with_positives": False})
    plain, _ = load(inputs, pool={"size": 0, "fill_with_positives": False})
    mined = corpus_workload(corpus, recipe, 1)
    assert mined.steps[0].pool_size > corpus_workload(corpus, plain, 1).steps[0].pool_size
    planner = with_random_shortlists(_StandIn(), corpus, recipe)
    assert planner.shortlists.shape == (len(corpus.queries["train"]), recipe.mining.shortlist_size)
    assert planner.shortlists.max() < corpus.num_labels
    assert all(len(np.unique(row)) == len(row) for row in planner.shortlists)
    assert with_random_shortlists(planner, corpus, plain) is planner


class _StandIn:
    """Takes what a planner would be given."""

    def with_mined(self, shortlists, clusters):
        assert clusters is None
        self.shortlists = shortlists
        return self


def sizes(recipe, **changes):
    given = {"labels": 60, "queries": 90, "test_queries": 9, "positives": 3.0,
             "query_tokens": None, "label_tokens": None, **changes}  # fmt: skip
    return given_sizes(recipe, **given)


def test_given_sizes_bound_what_the_corpus_of_those_sizes_takes(inputs):
    recipe, corpus = load(inputs, mining=MINING)
    real = corpus_workload(corpus, recipe, 1)
    bound = sizes_workload(sizes(recipe), recipe, 1)
    assert max(step.pool_size for step in real.steps) <= bound.steps[0].pool_size
    assert max(step.num_padded_tokens for step in real.steps) <= bound.steps[0].num_padded_tokens


def test_every_label_is_in_the_pool_of_all(inputs):
    recipe, corpus = load(inputs, objective={"pool": "all"})
    assert corpus_workload(corpus, recipe, 1).steps[0].pool_size == corpus.num_labels
    assert sizes_workload(sizes(recipe), recipe, 1).steps[0].pool_size == 60


def test_lengths_are_those_given_and_at_most_the_encoders(inputs):
    recipe, _ = load(inputs)
    assert sizes(recipe, query_tokens=5.0, label_tokens=99.0).query_tokens == 5.0
    assert sizes(recipe, query_tokens=5.0, label_tokens=99.0).label_tokens == 8.0
    assert "unknown length" in sizes(recipe).source
    assert "unknown length" not in sizes(recipe, query_tokens=5.0, label_tokens=4.0).source


def test_nothing_to_train_on_is_refused(inputs):
    recipe, _ = load(inputs)
    with pytest.raises(UserError, match="at least one label and one query"):
        sizes_workload(sizes(recipe, queries=0), recipe, 1)
