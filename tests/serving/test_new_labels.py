"""Labels a run never saw: found among its own, on the same scale, without training."""

import json

import numpy as np
import pytest
import torch
from data.raw_corpora import write
from saved_run import save_run
from tiny import make_inputs
from torch.nn.functional import normalize

import unidec_ds
from unidec_ds.assembly import load_run
from unidec_ds.data.label_digests import write_label_digests
from unidec_ds.embedding import embed
from unidec_ds.errors import CorpusError
from unidec_ds.exits import exit_with_message
from unidec_ds.index import IndexConfig
from unidec_ds.serving import new_labels as module
from unidec_ds.serving.label_vectors import label_vectors
from unidec_ds.serving.new_labels import calibration, fit_calibration, open_new_labels

CPU = torch.device("cpu")
NEW = {"n1": "red boat", "n2": "the old paper house", "n3": "new car"}
QUERIES = ["red car", "old house made of paper", "small tree"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(inputs):
    return save_run(inputs)


def load(run, **options):
    return unidec_ds.load(run, device="cpu", show_progress=False, **options)


def parts_of(loaded, texts):
    """The vectors of texts, one by one: (de, classifier), unit length."""
    from unidec_ds.encoders import load_tokenizer
    from unidec_ds.model import Chunk

    tokenizer = load_tokenizer(loaded.recipe.encoder.name)
    rows = []
    for text in texts:
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=8)["input_ids"]])
        with torch.no_grad():
            pooled = loaded.model.pool(Chunk(ids, torch.ones_like(ids)))
            rows.append((loaded.model.embed(pooled), normalize(loaded.model.classify(pooled))))
    return tuple(torch.cat(column) for column in zip(*rows, strict=True))


@pytest.mark.parametrize("logits", ["dot", "cosine"])
@pytest.mark.parametrize(
    ("view", "weight_de"), [("de", 0.5), ("classifier", 0.5), ("unified", 0.3)]
)
def test_answers_are_those_of_a_double_loop(inputs, view, weight_de, logits):
    run = save_run(inputs, f"loop-{view}-{logits}", objective={"classifier_logits": logits})
    loaded = load_run(run, CPU)
    slope, offset = calibration(loaded, view, show_progress=False)
    assert view == "de" or 0.1 < slope < 10
    queries_de, queries_g2 = parts_of(loaded, QUERIES)
    labels_de, labels_g2 = parts_of(loaded, list(NEW.values()))
    own = label_vectors(loaded, view, weight_de=weight_de, show_progress=False).as_tensor()
    asked = {"de": queries_de, "classifier": queries_g2}.get(view)
    asked = torch.cat([queries_de, queries_g2], dim=1) if asked is None else asked
    num_labels = loaded.corpus.num_labels
    answers = load(run, view=view, weight_de=weight_de, new_labels=NEW).predict(QUERIES, k=1000)
    for query, labels in enumerate(answers):
        expected = {i: float(asked[query] @ own[i]) for i in range(num_labels)}
        for place in range(len(NEW)):
            de = float(queries_de[query] @ labels_de[place])
            cosine = float(queries_g2[query] @ labels_g2[place])
            score = {"de": de, "classifier": slope * cosine + offset}.get(view)
            if score is None:
                score = 2 * (weight_de * de + (1 - weight_de) * (slope * cosine + offset))
            expected[num_labels + place] = score
        if view == "de":
            for label in np.flatnonzero(~loaded.corpus.label_has_text):
                del expected[label]
        found = {label.label_id: label.score for label in labels}
        assert found == pytest.approx(expected, abs=1e-5)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        named = {label.uid: label.text for label in labels if label.label_id >= num_labels}
        assert named == NEW


def test_calibration_matches_the_scores_of_labels_that_are_no_answers(run):
    loaded = load_run(run, CPU)
    corpus = loaded.corpus
    slope, offset = fit_calibration(loaded, "unified", show_progress=False)
    labels = np.flatnonzero(corpus.label_has_text)
    queries = corpus.train_query_ids()
    pad = corpus.pad_token_id
    (asked,) = embed(loaded.model, corpus.queries["train"], queries, ("classifier",), pad)
    (texts,) = embed(loaded.model, corpus.labels, labels, ("classifier",), pad)
    rows = normalize(loaded.rows.read(labels))
    best = -(-len(labels) // 10)
    by_row, by_text = [], []
    for place, query in enumerate(queries):
        answers = {
            *corpus.positives["train"].row(query).tolist(),
            *corpus.filter_pairs["train"].row(query).tolist(),
        }
        kept = [i for i, label in enumerate(labels.tolist()) if label not in answers]
        by_row += sorted((rows[kept] @ asked[place]).tolist())[-best:]
        by_text += sorted((texts[kept] @ asked[place]).tolist())[-best:]
    calibrated = slope * np.array(by_text) + offset
    assert calibrated.mean() == pytest.approx(np.mean(by_row), abs=1e-5)
    assert calibrated.std() == pytest.approx(np.std(by_row), abs=1e-5)


def test_a_calibration_is_kept_until_the_run_has_another_checkpoint(inputs, monkeypatch):
    run = save_run(inputs, "kept")
    first = calibration(load_run(run, CPU), "unified", show_progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(module, "fit_calibration", None)  # called, it would fail
        assert calibration(load_run(run, CPU), "unified", show_progress=False) == first
    save_run(inputs, "kept", step=2, seed=5)
    assert calibration(load_run(run, CPU), "unified", show_progress=False) != first


def test_an_index_is_searched_too(run):
    exact = load(run, new_labels=NEW).predict(QUERIES, k=7)
    approximate = load(run, new_labels=NEW, index=IndexConfig(kind="hnsw")).predict(QUERIES, k=7)
    assert [[x.uid for x in labels] for labels in approximate] == [
        [x.uid for x in labels] for labels in exact
    ]


@pytest.mark.parametrize("file", ["new.jsonl", "new.json.gz"])
def test_files_and_labels_that_the_run_knows(inputs, run, tmp_path, file):
    loaded = load_run(run, CPU)  # of a layout without uids: labels are known by text
    known = loaded.corpus.labels.texts(np.arange(2))
    texts = [*NEW.values(), *known]
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    if file.endswith(".gz"):
        rows = [{"uid": str(i), "title": "", "content": text} for i, text in enumerate(texts)]
    name = file.removesuffix(".gz")
    write(tmp_path / name, [json.dumps(row) for row in rows], file.endswith(".gz"))
    for written in (False, True):
        if written:
            write_label_digests(run, loaded.corpus)
        new = open_new_labels(loaded, "unified", tmp_path / file, show_progress=False)
        assert new.uids == ["0", "1", "2"]
        assert new.num_known == 2
    assert (
        load(run, new_labels=tmp_path / file)
        .describe()
        .endswith("3 new labels (2 others are the run's own)")
    )
    nothing_new = {str(i): text for i, text in enumerate(known)}
    plain, same = load(run), load(run, new_labels=nothing_new)
    assert same.predict(QUERIES) == plain.predict(QUERIES)


@pytest.mark.parametrize(
    ("file", "content", "needed"),
    [
        (
            "a.jsonl",
            '{"id": 1, "text": "x"}\n{"id": 2, "text": " "}',
            "jsonl:2: label '2' has no",
        ),
        ("a.jsonl", '{"id": 1, "text": "x"}\n{"id": 1, "text": "y"}', "there already, in line 1"),
        ("a.jsonl", '{"text": "x"}', "a.jsonl:1: id missing"),
        ("a.txt", "x", "not a kind of file that names its labels"),
        (None, None, "there is no such file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(run, tmp_path, capsys, file, content, needed):
    path = tmp_path / (file or "none.jsonl")
    if file:
        path.write_text(content + "\n")

    def main():
        load(run, new_labels=path)

    assert exit_with_message(main) == CorpusError.exit_code == 2
    assert needed in capsys.readouterr().err
