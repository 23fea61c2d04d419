"""The rivals of UniDEC: what their recipes change, and that they are what they are named after."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from unidec_ds.config import load_recipe, recipe_names
from unidec_ds.data.pairs import Pairs
from unidec_ds.data.pool import Planner
from unidec_ds.losses import Targets, head_loss

UNIDEC = {"lf-wordnet-verbs-9k": "quickstart", "lf-wordnet-84k": "lf-wordnet-84k"}
SECTIONS = {
    "dexml": {"objective", "pool"},
    "renee": {"objective", "pool", "classifier"},
    "pol": {"objective", "pool"},
    "pal": {"pool"},
}
# Beside those: no mining, random batches, the start and the rates of rows that are trained.
FREE = {
    "mining.start_epoch", "mining.every_epochs", "mining.shortlist_size", "batches.kind",
    "classifier.init", "objective.classifier_logits", "optimizer.row_lr",
    "optimizer.row_weight_decay", "train.recompute",
}  # fmt: skip


def settings(name: str) -> dict[str, Any]:
    content = load_recipe(name).as_yaml_object()
    return {f"{section}.{key}": v for section, keys in content.items() for key, v in keys.items()}


def test_every_rival_has_a_recipe_on_every_corpus():
    corpora = [*UNIDEC, "lf-amazontitles-131k"]
    assert {f"{rival}-{corpus}" for rival in SECTIONS for corpus in corpora} <= set(recipe_names())


@pytest.mark.parametrize("corpus", UNIDEC)
@pytest.mark.parametrize("rival", SECTIONS)
def test_a_rival_differs_from_unidec_in_what_it_is_alone(rival, corpus):
    ours, theirs = settings(UNIDEC[corpus]), settings(f"{rival}-{corpus}")
    different = {key for key in ours if ours[key] != theirs[key]} - FREE
    if rival == "renee":
        different.discard("model.head_dropout")  # it has no other regulariser
    assert {key.split(".")[0] for key in different} <= SECTIONS[rival]
    assert different


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.startswith(("dexml", "renee"))])
def test_full_label_space_recipes_score_every_label(name):
    recipe = load_recipe(name)
    assert recipe.objective.pool == "all"
    if name.startswith("renee"):
        assert recipe.classifier.streamed
        assert recipe.objective.head_weights == {"classifier": 1.0}
    else:
        assert recipe.objective.head_weights == {"de": 1.0}
        assert recipe.train.encoder_chunk > 0
        assert recipe.train.recompute


def plan_of(name: str):
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 5, 40)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    indices = np.concatenate([np.sort(rng.choice(90, n, replace=False)) for n in counts])
    positives = Pairs(indptr, indices.astype(np.int32), 90)
    planner = Planner(
        query_ids=np.arange(40), positives=positives, filter_pairs=None,
        pool=load_recipe(name).pool, batch_size=12, seed=0,
    )  # fmt: skip
    plan = planner.plan(0)
    return plan, positives.take(plan.query_ids)[1]


def test_pol_samples_one_positive_of_each_query_and_nothing_else():
    plan, labels = plan_of("pol-lf-wordnet-verbs-9k")
    assert 8 <= len(plan.label_ids) <= len(plan.query_ids) == plan.positive_query.max() + 1
    assert set(plan.label_ids) < set(labels)


def test_pal_takes_every_positive_of_the_batch():
    plan, labels = plan_of("pal-lf-wordnet-verbs-9k")
    assert set(plan.label_ids) == set(labels)


@pytest.mark.parametrize("both_directions", [False, True])
def test_pick_one_label_is_multiple_negatives_ranking(both_directions):
    """Where no query of the batch shares a positive with another; MNRL knows of no others."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    directions = ("query_to_doc", "doc_to_query") if both_directions else ("query_to_doc",)
    theirs = losses.MultipleNegativesRankingLoss(
        torch.nn.Identity(), scale=20.0, directions=directions, partition_mode="per_direction"
    )
    torch.manual_seed(0)
    queries, labels = (torch.randn(7, 16).requires_grad_() for _ in range(2))
    expected = theirs.compute_loss_from_embeddings([queries, labels], None)
    expected_grads = torch.autograd.grad(expected, [queries, labels])
    every, none = np.arange(7), np.zeros(0, np.int64)
    found = head_loss(
        "softmax", normalize(queries, dim=-1), normalize(labels, dim=-1),
        Targets.from_plan(
            batch_size=7, positive_query=every, positive_pool=every, ignored_query=none,
            ignored_pool=none, columns=every, eligible=np.ones(7, bool),
        ),
        temperature=20.0, l2q=both_directions, block_bytes=1 << 20,
        combine_logsumexp=lambda local: local,
    ).total  # fmt: skip
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, [queries, labels]), expected_grads)
