"""Evaluation against a dense oracle, and the same at any number of ranks."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import make_inputs, write_recipe_file
from torch.nn.functional import normalize

from unidec_ds import comm
from unidec_ds.assembly import build_model, evaluate_split, trained_views, tune_unified
from unidec_ds.classifier import partition
from unidec_ds.config import load_recipe
from unidec_ds.data.corpus import split_validation
from unidec_ds.data.pairs import Pairs
from unidec_ds.data.prepare import resolve_corpus
from unidec_ds.embedding import embed, embed_all
from unidec_ds.evaluation import KS, format_breakdown, sample_queries
from unidec_ds.metrics import inverse_propensity, score_predictions
from unidec_ds.projector import embed_some_labels
from unidec_ds.unified import GRID, choose_weight


class Rows:
    """This rank's rows of one dense matrix."""

    def __init__(self, matrix_LD):
        self.matrix = matrix_LD

    def read(self, label_ids):
        assert (partition.owner(label_ids, comm.world_size()) == comm.rank()).all()
        return self.matrix[torch.from_numpy(label_ids)]


def setting(folder):
    recipe = load_recipe(str(folder / "recipe.yaml"))
    corpus = resolve_corpus(
        recipe.corpus, recipe.encoder.name, recipe.encoder.max_length, show_progress=False
    )
    model = build_model(recipe, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    return recipe, corpus, model, torch.randn(corpus.num_labels, model.width, generator=generator)


def evaluated(folder):
    recipe, corpus, model, matrix = setting(folder)
    return evaluate_split(
        model, Rows(matrix), corpus, recipe, "test", ("encoder", *trained_views(recipe))
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    write_recipe_file(folder)
    return folder


def test_rankings_equal_a_dense_search_with_filter_pairs_removed(folder):
    _, corpus, model, matrix = setting(folder)
    result = evaluated(folder)

    def pooled(table):
        ids = np.arange(len(table))
        tokens = table.tokens(ids)
        rows = [
            model.encoder(
                input_ids=torch.from_numpy(tokens.values[a:b]).long()[None]
            ).last_hidden_state.mean(1)
            for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
        ]
        return torch.cat(rows)

    with torch.no_grad():
        queries, labels = pooled(corpus.queries["test"]), pooled(corpus.labels)
        cosine_de = model.embed(queries) @ model.embed(labels).T
        g2 = normalize(model.classify(queries), dim=-1)
        cosine_rows = g2 @ normalize(matrix, dim=-1).T
        no_text = torch.from_numpy(~corpus.label_has_text)
        assert no_text.any()
        masked_de = cosine_de.masked_fill(no_text, -torch.inf)
        expected = {
            "encoder": (normalize(queries, dim=-1) @ normalize(labels, dim=-1).T).masked_fill(
                no_text, -torch.inf
            ),
            "de": masked_de,
            "classifier": g2 @ matrix.T,
            "unified": cosine_de.masked_fill(no_text, 0.0) + cosine_rows,
        }
    filters = corpus.filter_pairs["test"]
    assert filters.num_pairs
    for view, scores in expected.items():
        scores[torch.from_numpy(filters.rows_of_pairs()), filters.indices.astype(np.int64)] = -9e9
        found = result.predictions[view]
        for query in range(len(scores)):
            keep = found.label_ids[query] >= 0
            ids = found.label_ids[query][keep]
            assert not set(ids) & set(filters.row(query))
            best = scores[query].sort(descending=True).values[: len(ids)]
            torch.testing.assert_close(scores[query][torch.from_numpy(ids)], best)
            torch.testing.assert_close(torch.from_numpy(found.scores[query][keep]), best)
        hits = [
            found.label_ids[q, 0] in corpus.positives["test"].row(q) for q in range(len(scores))
        ]
        assert result.metrics[view]["P@1"] == pytest.approx(100 * np.mean(hits))


def evaluated_and_tuned(folder):
    return evaluated(folder), tuned(folder)


def test_every_view_has_its_parts_by_label_frequency(folder):
    result = evaluated(folder)
    assert result.breakdown.keys() == result.metrics.keys()
    for view, bins in result.breakdown.items():
        assert [part.name for part in bins] == ["head", "torso", "tail"]
        total = sum(part.scores["P@5"] for part in bins)
        assert total == pytest.approx(result.metrics[view]["P@5"])
        lines = format_breakdown(bins).splitlines()
        assert [line.split()[0] for line in lines[1:4]] == ["head", "torso", "tail"]
        for line, part in zip(lines[1:], bins, strict=False):
            assert float(line.split()[-1]) == pytest.approx(part.scores["R@100"], abs=0.005)


def test_embedded_labels_are_a_seeded_sample_of_those_with_a_text(folder):
    _, corpus, model, _ = setting(folder)
    some = embed_some_labels(model, corpus, 7, seed=0)
    assert some.vectors_nD.shape == (len(some.rows), model.width) == (7, 16)
    every = embed_some_labels(model, corpus, 1000, seed=0)
    ids = np.flatnonzero(corpus.label_has_text)
    counts = corpus.positives["train"].column_counts()
    assert every.rows == [(corpus.labels.texts(ids[i : i + 1])[0], counts[ids[i]])
                          for i in range(len(ids))]  # fmt: skip
    (vectors,) = embed(model, corpus.labels, ids, ("de",), corpus.pad_token_id)
    torch.testing.assert_close(every.vectors_nD, vectors)
    for vector, row in zip(some.vectors_nD, some.rows, strict=True):
        same = [i for i, other in enumerate(every.rows) if other == row]
        assert any(torch.allclose(vector, vectors[i], atol=1e-5) for i in same)
    assert embed_some_labels(model, corpus, 7, seed=1).rows != some.rows


def test_the_result_is_the_same_at_any_number_of_ranks(folder):
    one, one_weight = evaluated_and_tuned(folder)
    for world_size in (2, 3):
        answers = run_ranks(world_size, evaluated_and_tuned, folder)
        for answer, weight in answers:
            assert answer.metrics == one.metrics
            assert weight == one_weight
        for view, predictions in one.predictions.items():
            assert (answers[0][0].predictions[view].label_ids == predictions.label_ids).all()


def test_sampled_queries_are_few_sorted_and_seeded():
    ids = np.arange(100, 200)
    sample = sample_queries(ids, 10, seed=3)
    assert len(sample) == 10
    assert (np.diff(sample) > 0).all()
    assert set(sample) <= set(ids)
    assert (sample_queries(ids, 10, seed=3) == sample).all()
    assert set(sample_queries(ids, 10, seed=4)) != set(sample)
    assert len(sample_queries(ids, 0, seed=3)) == len(sample_queries(ids, 500, seed=3)) == 100


def test_a_sample_is_reported_as_one(folder):
    recipe, corpus, model, _ = setting(folder)
    whole = evaluate_split(model, None, corpus, recipe, "test", ("encoder",))
    assert whole.describe_queries() == f"{len(corpus.queries['test'])} queries"
    changed = recipe.evaluation.model_copy(update={"max_queries": 3})
    few = recipe.model_copy(update={"evaluation": changed})
    part = evaluate_split(model, None, corpus, few, "test", ("encoder",))
    assert part.describe_queries() == f"a sample of 3 of {len(corpus.queries['test'])} queries"


def weighted(folder):
    recipe, corpus, model, matrix = setting(folder)
    weights = {"half": 0.5, "rows alone": 0.0, "0.7": 0.7}
    return evaluate_split(
        model, Rows(matrix), corpus, recipe, "test", ("de", "unified"), unified_weights=weights
    )


def tuned(folder):
    recipe, corpus, model, matrix = setting(folder)
    return tune_unified(model, Rows(matrix), corpus, recipe)


def test_weighted_rankings_are_the_unified_one_a_head_alone_and_a_dense_sum_between(folder):
    _, corpus, model, matrix = setting(folder)
    result = weighted(folder)
    assert list(result.metrics) == ["de", "unified", "half", "rows alone", "0.7"]
    assert result.metrics["half"] == result.metrics["unified"]
    np.testing.assert_array_equal(
        result.predictions["half"].scores, result.predictions["unified"].scores
    )
    ids = np.arange(len(corpus.queries["test"]))
    query_de, query_rows = embed_all(
        model, corpus.queries["test"], ids, ("de", "classifier"), corpus.pad_token_id
    )
    label_ids = np.arange(corpus.num_labels)
    (label_de,) = embed_all(model, corpus.labels, label_ids, ("de",), corpus.pad_token_id)
    label_de[torch.from_numpy(~corpus.label_has_text)] = 0.0
    cosines = query_de @ label_de.T, query_rows @ normalize(matrix, dim=-1).T
    for name, weight in (("rows alone", 0.0), ("0.7", 0.7)):
        found = result.predictions[name]
        scores = 2 * (weight * cosines[0] + (1 - weight) * cosines[1])
        filters = corpus.filter_pairs["test"]
        scores[torch.from_numpy(filters.rows_of_pairs()), filters.indices.astype(np.int64)] = -9e9
        kept = found.label_ids[:, :40]
        best = scores.sort(dim=1, descending=True).values[:, :40]
        torch.testing.assert_close(scores.gather(1, torch.from_numpy(kept)), best)


def test_the_weight_is_chosen_on_the_validation_queries_alone(folder):
    recipe, corpus, model, matrix = setting(folder)
    one = tuned(folder)
    _, validation_ids = split_validation(
        corpus, recipe.corpus.validation_fraction, recipe.train.seed
    )
    assert one.num_queries == len(validation_ids) > 0
    assert tuple(one.metrics) == GRID
    # The metrics it chose by are those of the validation queries' own rankings.
    whole = evaluate_split(
        model, Rows(matrix), corpus, recipe, "validation", (), unified_weights={"w": one.weight_de}
    )
    truth_rows, truth_columns = corpus.positives["train"].take(validation_ids)
    truth = Pairs.from_pairs(truth_rows, truth_columns, len(validation_ids), corpus.num_labels)
    expected = score_predictions(
        truth,
        whole.predictions["w"].label_ids,
        inverse_propensity=inverse_propensity(
            corpus.positives["train"], *recipe.evaluation.propensity
        ),
        ks=KS,
    )
    assert one.metrics[one.weight_de] == expected
    assert one.weight_de == choose_weight(one.metrics)


def test_no_weight_is_chosen_where_there_is_nothing_to_choose_it_on(folder):
    recipe, corpus, model, matrix = setting(folder)
    for section, change in (
        ("evaluation", {"tune_unified": False}),
        ("corpus", {"validation_fraction": 0.0}),
        ("objective", {"classifier": "none"}),
    ):
        changed = getattr(recipe, section).model_copy(update=change)
        other = recipe.model_copy(update={section: changed})
        assert tune_unified(model, Rows(matrix), corpus, other) is None


def test_choice_of_the_weight_by_hand():
    def metrics(ndcg):
        weights = (0.0, 0.25, 0.5, 0.75, 1.0)
        return {w: {"nDCG@5": value} for w, value in zip(weights, ndcg, strict=True)}

    # A lone peak loses to a broad one: (1 + 9 + 1) / 3 against (6 + 6 + 6) / 3.
    assert choose_weight(metrics([1.0, 9.0, 1.0, 6.0, 6.0])) == 1.0
    assert choose_weight(metrics([1.0, 2.0, 9.0, 2.0, 1.0])) == 0.5
    assert choose_weight(metrics([5.0, 5.0, 5.0, 5.0, 5.0])) == 0.5  # ties: the nearest to equal
    assert choose_weight(metrics([9.0, 5.0, 5.0, 5.0, 5.0])) == 0.0  # an end has one neighbour
