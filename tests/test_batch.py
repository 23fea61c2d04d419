"""One rank's part of a step: every text once over the ranks, chunks padded as they should be."""

import numpy as np
import pytest
from tiny import make_inputs, write_recipe_file

from unidec_ds.batch import make_batch
from unidec_ds.config import load_recipe
from unidec_ds.data.pool import Planner
from unidec_ds.data.prepare import resolve_corpus


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    recipe = load_recipe(str(write_recipe_file(folder)))
    corpus = resolve_corpus(
        recipe.corpus, recipe.encoder.name, recipe.encoder.max_length, show_progress=False
    )
    planner = Planner(
        query_ids=corpus.train_query_ids(),
        positives=corpus.positives["train"],
        filter_pairs=corpus.filter_pairs["train"],
        pool=recipe.pool,
        batch_size=recipe.train.batch_size,
        seed=0,
    )
    return corpus, [planner.plan(step) for step in range(planner.steps_per_epoch)]


def texts_of(batch):
    """Returns the tokens of each text in the caller's order, padding removed."""
    rows = [
        tuple(ids[mask.bool()].tolist())
        for chunk in batch.chunks
        for ids, mask in zip(*chunk, strict=True)
    ]
    return [rows[place] for place in batch.order.tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("encoder_chunk", [0, 1, 4])
def test_ranks_together_hold_every_query_and_every_label_with_text(
    setting, world_size, encoder_chunk
):
    corpus, plans = setting
    for plan in plans:
        batches = [
            make_batch(plan, corpus, rank=rank, world_size=world_size, encoder_chunk=encoder_chunk)
            for rank in range(world_size)
        ]
        queries, labels = [], {}
        for rank, batch in enumerate(batches):
            count = batch.query_sizes[rank]
            texts = texts_of(batch)
            queries += texts[:count]
            own = plan.label_ids[batch.own_pool_with_text]
            labels.update(zip(own.tolist(), texts[count:], strict=True))
            assert (batch.own_label_ids % world_size == rank).all()
            assert batch.num_tokens == sum(map(len, texts))
            for chunk in batch.chunks:
                assert chunk.attention_mask.any(0).all()  # no column of padding only
                assert (chunk.input_ids[chunk.attention_mask == 0] == corpus.pad_token_id).all()
        tokens = corpus.queries["train"].tokens(plan.query_ids)
        expected = np.split(tokens.values, tokens.offsets[1:-1])
        assert queries == [tuple(text.tolist()) for text in expected]
        with_text = plan.label_ids[corpus.label_has_text[plan.label_ids]]
        assert sorted(labels) == with_text.tolist()
        sizes = batches[0].query_sizes
        assert sum(sizes) == len(plan.query_ids)
        assert max(sizes) - min(sizes) <= 1


def test_targets_of_all_ranks_are_the_plans_pairs(setting):
    corpus, plans = setting
    plan, found = plans[0], []
    for rank in range(3):
        batch = make_batch(plan, corpus, rank=rank, world_size=3, encoder_chunk=4)
        targets = batch.classifier_targets
        pool = batch.own_pool[targets.positive_label.numpy()]
        found += zip(targets.positive_query.tolist(), pool.tolist(), strict=True)
        assert targets.num_queries == len(plan.query_ids)
    assert sorted(found) == list(
        zip(plan.positive_query.tolist(), plan.positive_pool.tolist(), strict=True)
    )
