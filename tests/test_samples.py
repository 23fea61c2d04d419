"""Example predictions: the right ones are right, the wrong ones wrong, none is made up."""

import numpy as np
import pytest
from tiny import make_inputs, write_recipe_file

from unidec_ds.config import load_recipe
from unidec_ds.data.prepare import resolve_corpus
from unidec_ds.evaluation import Predictions
from unidec_ds.samples import choose_samples


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    recipe = load_recipe(str(write_recipe_file(folder)))
    return resolve_corpus(
        recipe.corpus, recipe.encoder.name, recipe.encoder.max_length, show_progress=False
    )


@pytest.fixture(scope="module")
def predictions(corpus):
    """Random rankings, half of which start with a true label; the last has a single prediction."""
    generator, truth = np.random.default_rng(0), corpus.positives["train"]
    ids = np.stack([generator.permutation(corpus.num_labels)[:8] for _ in range(truth.num_rows)])
    for query in range(0, truth.num_rows, 2):
        true = truth.row(query)
        if len(true):
            others = ids[query][~np.isin(ids[query], true[:1])]
            ids[query] = np.r_[true[:1], others][:8]
    scores = np.sort(generator.random(ids.shape, np.float32))[:, ::-1]
    ids[-1, 1:], scores[-1, 1:] = -1, -np.inf
    return Predictions(ids, scores)


def chosen(corpus, predictions, seed=0, count=6):
    queries = np.arange(len(predictions.label_ids))
    return choose_samples(corpus, "validation", queries, predictions, seed=seed, count=count)


def test_samples_agree_with_truth_and_predictions(corpus, predictions):
    samples = chosen(corpus, predictions, count=1000)
    truth, table = corpus.positives["train"], corpus.queries["train"]
    uids = table.uids(np.arange(len(table)))
    label_uids = corpus.labels.uids(np.arange(corpus.num_labels))
    label_texts = corpus.labels.texts(np.arange(corpus.num_labels))
    seen = []
    for kind, queries in samples.items():
        for query in queries:
            place = uids.index(query["uid"])
            seen.append(place)
            assert query["text"] == table.texts(np.array([place]))[0]
            true = {label_uids[label] for label in truth.row(place)}
            found = [label for label in predictions.label_ids[place, :5] if label >= 0]
            assert [p["uid"] for p in query["predictions"]] == [label_uids[i] for i in found]
            assert [p["text"] for p in query["predictions"]] == [label_texts[i] for i in found]
            assert [p["is_true"] for p in query["predictions"]] == [
                label_uids[i] in true for i in found
            ]
            assert query["predictions"][0]["is_true"] == (kind == "right")
            missed = true - {label_uids[i] for i in found}
            assert query["num_missed"] == len(missed)
            assert {label["uid"] for label in query["missed"]} <= missed
            assert len(query["missed"]) == min(5, len(missed))
    assert sorted(seen) == np.flatnonzero(truth.row_counts()).tolist()  # each once, if it has truth


def test_samples_are_few_and_seeded(corpus, predictions):
    samples = chosen(corpus, predictions)
    assert {kind: len(queries) for kind, queries in samples.items()} == {"right": 6, "wrong": 6}
    assert chosen(corpus, predictions) == samples
    assert chosen(corpus, predictions, seed=1) != samples
