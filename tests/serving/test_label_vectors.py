"""The label vectors on disk: what evaluation scores with, made once, never another run's."""

import json
import threading

import numpy as np
import pytest
import torch
from saved_run import save_run
from tiny import make_inputs

from unidec_ds.assembly import load_run, trained_views
from unidec_ds.embedding import embed
from unidec_ds.errors import UserError
from unidec_ds.evaluation import KS, evaluate
from unidec_ds.serving import label_vectors as module
from unidec_ds.serving.label_vectors import (
    label_vectors,
    make_label_vectors,
    open_label_vectors,
    query_vectors,
)
from unidec_ds.stamp import record_path

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def run(inputs, request):
    return load_run(save_run(inputs, request.node.name[:40]), CPU)


@pytest.mark.parametrize("logits", ["dot", "cosine"])
@pytest.mark.parametrize("view", ["de", "classifier", "unified"])
def test_products_are_the_scores_of_evaluation(inputs, view, logits):
    objective = {"classifier_logits": logits}
    run = load_run(save_run(inputs, f"scores-{view}-{logits}", objective=objective), CPU)
    assert view in trained_views(run.recipe)
    corpus, test = run.corpus, run.corpus.queries["test"]
    ids = np.arange(len(test))
    kinds = {"de": ("de",), "classifier": ("classifier",), "unified": ("de", "classifier")}[view]
    queries = torch.cat(embed(run.model, test, ids, kinds, corpus.pad_token_id), dim=1)
    found = label_vectors(run, view, show_progress=False)
    scores = queries @ torch.from_numpy(np.array(found.vectors_LV)).T
    result = evaluate(
        run.model, run.rows, corpus, ids, split="test", views=(view,),
        cosine_classifier=logits == "cosine", propensity=(0.55, 1.5),
    ).predictions[view]  # fmt: skip
    assert max(KS) > corpus.num_labels  # all labels are ranked
    for query in ids:
        kept = result.label_ids[query][result.label_ids[query] >= 0]
        assert len(kept) > corpus.num_labels / 2
        expected = torch.from_numpy(result.scores[query, : len(kept)])
        torch.testing.assert_close(scores[query, kept], expected, rtol=0, atol=1e-6)


def test_query_vectors_are_the_embeddings_evaluation_uses(run):
    test, corpus = run.corpus.queries["test"], run.corpus
    ids = np.arange(len(test))
    pooled = run.model.pool(_chunk(run, ids))
    parts = embed(run.model, test, ids, ("de", "classifier"), corpus.pad_token_id)
    for view, expected in (("de", parts[0]), ("classifier", parts[1]), ("unified", None)):
        expected = torch.cat(parts, dim=1) if expected is None else expected
        made = query_vectors(run.model, pooled, view)
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)


def _chunk(run, ids):
    from unidec_ds.batch import make_chunks
    from unidec_ds.model import Chunk

    tokens = run.corpus.queries["test"].tokens(ids)
    ((input_ids, mask),), order = make_chunks(tokens, 0, run.corpus.pad_token_id)
    return Chunk(input_ids[order], mask[order])


def test_a_weight_scales_the_two_parts(run):
    ids, width = np.arange(run.corpus.num_labels), run.model.width
    equal, weighted = (make_label_vectors(run, ids, "unified", w) for w in (0.5, 0.7))
    torch.testing.assert_close(weighted[:, :width], 1.4 * equal[:, :width])
    torch.testing.assert_close(weighted[:, width:], 0.6 * equal[:, width:])
    only_de = make_label_vectors(run, ids, "unified", 1.0)
    assert not only_de[:, width:].any()
    without_text = ~np.asarray(run.corpus.label_has_text)
    assert without_text.any()
    assert not equal[torch.from_numpy(without_text), :width].any()
    torch.testing.assert_close(equal.norm(dim=1)[0], torch.tensor(2.0).sqrt())


def test_vectors_are_mapped_made_once_and_again_for_a_newer_checkpoint(inputs, run, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 7)  # more than one block
    first = label_vectors(run, "unified", show_progress=False)
    assert isinstance(first.vectors_LV, np.memmap)
    assert not first.vectors_LV.flags.writeable
    expected = make_label_vectors(run, np.arange(run.corpus.num_labels), "unified").numpy()
    np.testing.assert_allclose(first.vectors_LV, expected, rtol=0, atol=1e-6)
    made_ns = first.path.stat().st_mtime_ns
    label_vectors(run, "unified", show_progress=False)
    assert first.path.stat().st_mtime_ns == made_ns
    newer = load_run(save_run(inputs, run.folder.name, step=2, seed=1), CPU)
    again = label_vectors(newer, "unified", show_progress=False)
    assert again.path == first.path
    assert abs(again.vectors_LV - expected).max() > 0.01
    assert sorted(p.suffix for p in first.path.parent.iterdir() if p.name[0] != ".") == [
        ".json",
        ".npy",
    ]


@pytest.mark.parametrize("damage", ["no record", "cut record", "other record", "cut vectors"])
def test_damaged_vectors_are_made_again_in_the_run_and_refused_elsewhere(run, damage):
    made = label_vectors(run, "de", show_progress=False)
    expected, record = np.array(made.vectors_LV), record_path(made.path)
    if damage == "no record":
        record.unlink()
    elif damage == "cut record":
        record.write_text(record.read_text()[:20])
    elif damage == "other record":
        record.write_text(json.dumps({**made.record, "checkpoint_sha256": "0" * 64}))
    else:
        made.path.write_bytes(made.path.read_bytes()[:-64])
    with pytest.raises(UserError, match="does not hold the label vectors of"):
        open_label_vectors(made.path, run, "de")
    np.testing.assert_array_equal(label_vectors(run, "de").vectors_LV, expected)
    np.testing.assert_array_equal(open_label_vectors(made.path, run, "de").vectors_LV, expected)


def test_vectors_of_another_run_view_or_weight_are_refused(inputs, run):
    made = label_vectors(run, "unified", show_progress=False)
    other = load_run(save_run(inputs, "other", seed=5), CPU)
    for args, weight, named in (
        ((other, "unified"), 0.5, "checkpoint_sha256 is"),
        ((run, "de"), 0.5, "view is unified, needed de"),
        ((run, "unified"), 0.6, "weight_de is 0.5, needed 0.6"),
    ):
        with pytest.raises(UserError, match=named):
            open_label_vectors(made.path, *args, weight_de=weight)
    with pytest.raises(UserError, match="there is no file"):
        open_label_vectors(made.path.with_name("none.npy"), run, "unified")


def test_two_at_once_make_them_once(run, monkeypatch):
    found, writes = [], []

    def write(*args, **options):
        writes.append(args)
        module_write(*args, **options)

    module_write = module.write_label_vectors
    monkeypatch.setattr(module, "write_label_vectors", write)
    threads = [
        threading.Thread(target=lambda: found.append(label_vectors(run, "de"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(writes) == 1
    np.testing.assert_array_equal(found[0].vectors_LV, found[1].vectors_LV)


def test_a_run_that_cannot_be_written_to_is_named(inputs):
    run = load_run(save_run(inputs, "full"), CPU)
    (run.folder / "index").write_text("in the way")
    with pytest.raises(UserError, match=r"vectors-de\.npy cannot be written \(File exists\)"):
        label_vectors(run, "de", show_progress=False)


def test_a_view_the_run_did_not_train_is_named(inputs):
    run = load_run(save_run(inputs, "de-only", objective={"classifier": "none"}), CPU)
    assert module.choose_view(run, None) == "de"
    with pytest.raises(UserError, match="trained de, not unified"):
        module.choose_view(run, "unified")
