import json
import logging
import multiprocessing
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import raw_corpora
from raw_corpora import WRITERS, oracle_tokens, random_content, save_tokenizer, write, write_xmc

from unidec_ds.data import build as build_module
from unidec_ds.data.corpus import CorpusConfig, open_corpus
from unidec_ds.data.pairs import Pairs
from unidec_ds.data.prepare import embedded_corpora, prepare, resolve_corpus, tokenizer_hash
from unidec_ds.data.uids import UidDigests
from unidec_ds.encoders import PACKAGED_ENCODER, load_tokenizer
from unidec_ds.errors import CorpusError, UserError

LENGTH = 8


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def made(tmp_path, encoder):
    """Prepares a raw folder into `tmp_path/out` (or another place) without bars."""

    def call(raw, out="out", **options):
        options = {"encoder": encoder, "max_length": LENGTH, "show_progress": False} | options
        return prepare(Path(raw), tmp_path / out, **options)

    return call


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def check_holds(corpus, content):
    """Compares a corpus with the content it was made from, the slow and obvious way."""
    tables = {"labels": (corpus.labels, content.labels)}
    tables |= {s: (corpus.queries[s], content.queries[s]) for s in content.queries}
    for table, texts in tables.values():
        ids = np.arange(len(texts))
        assert len(table) == len(texts)
        assert table.texts(ids) == texts
        values, offsets = table.tokens(ids)
        expected = [oracle_tokens(text, LENGTH) for text in texts]
        assert [values[a:b].tolist() for a, b in pairwise(offsets)] == expected
    assert corpus.label_has_text.tolist() == [bool(text) for text in content.labels]
    for split, targets in content.targets.items():
        rows = [corpus.positives[split].row(i).tolist() for i in range(len(targets))]
        assert rows == [sorted(set(row)) for row in targets]
        pairs = corpus.filter_pairs[split]
        found = zip(pairs.rows_of_pairs().tolist(), pairs.indices.tolist(), strict=True)
        assert list(found) == sorted(set(content.filters.get(split, [])))


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_gives_the_corpus_of_its_content(layout, gz, tmp_path, made):
    content = random_content()
    WRITERS[layout](tmp_path / "raw", content, gz)
    check_holds(made(tmp_path / "raw"), content)


def test_many_batches_and_chunks_give_the_same_corpus(tmp_path, made, monkeypatch):
    content = random_content(num_train=300)
    write_xmc(tmp_path / "raw", content)
    monkeypatch.setattr(build_module, "_BATCH_ROWS", 7)
    monkeypatch.setattr(build_module, "_CHUNK_ROWS", 20)
    corpus = made(tmp_path / "raw")
    assert corpus.queries["train"].dataset.data.column("tokens").num_chunks > 10
    check_holds(corpus, content)
    monkeypatch.undo()
    whole = made(tmp_path / "raw", "whole")
    assert whole.manifest["oddities"] == corpus.manifest["oddities"]
    assert whole.manifest["token_lengths"] == corpus.manifest["token_lengths"]


def test_datasets_loads_the_tables_memory_mapped(tmp_path, made):
    content = random_content()
    write_xmc(tmp_path / "raw", content)
    made(tmp_path / "raw")
    table = datasets.load_from_disk(str(tmp_path / "out" / "train"))
    assert table.cache_files
    assert table["text"][:] == content.queries["train"]
    assert table[5]["tokens"] == oracle_tokens(content.queries["train"][5], LENGTH)


def test_twice_gives_the_same_bytes(tmp_path, made):
    write_xmc(tmp_path / "raw", random_content())
    first, second = (made(tmp_path / "raw", out) for out in ("one", "two"))
    assert files_of(first.path) == files_of(second.path)


def test_a_second_call_reads_no_text(tmp_path, made, monkeypatch):
    write_xmc(tmp_path / "raw", random_content())
    first = made(tmp_path / "raw")
    monkeypatch.setattr("unidec_ds.data.prepare.build", None)
    assert made(tmp_path / "raw").fingerprint == first.fingerprint


def test_a_changed_source_tokenizer_or_setting_is_noticed(tmp_path, made, caplog):
    content = random_content()
    write_xmc(tmp_path / "raw", content)
    seen = {made(tmp_path / "raw").fingerprint}
    content.labels[0] = "changed"
    write_xmc(tmp_path / "raw", content)
    corpus = made(tmp_path / "raw")
    assert corpus.labels.texts(np.array([0])) == ["changed"]
    assert "replaced" in caplog.text
    seen.add(corpus.fingerprint)
    other = save_tokenizer(tmp_path / "other", raw_corpora.WORDS[:5])
    seen.add(made(tmp_path / "raw", encoder=other).fingerprint)
    seen.add(made(tmp_path / "raw", max_length=LENGTH + 1).fingerprint)
    corpus = made(tmp_path / "raw", text="title")
    seen.add(corpus.fingerprint)
    assert corpus.queries["train"].texts(np.array([0])) == content.queries["train"][0].split()[:1]
    assert len(seen) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "other", "out", "raw"]


def test_large_sources_are_known_by_size_time_and_ends(tmp_path, made, monkeypatch):
    write_xmc(tmp_path / "raw", random_content())
    monkeypatch.setattr("unidec_ds.data.prepare.HASHED_WHOLE_BYTES", 0)
    monkeypatch.setattr("unidec_ds.data.prepare._END_BYTES", 10)
    first = made(tmp_path / "raw", "one")
    assert made(tmp_path / "raw", "two").fingerprint == first.fingerprint
    path = tmp_path / "raw" / "trn.json"
    data = path.read_bytes()
    path.write_bytes(data[:500] + data[500:].replace(b"r", b"R", 1))
    assert made(tmp_path / "raw", "three").fingerprint != first.fingerprint


def test_the_tokenizers_hash_ignores_what_a_call_left_in_it(encoder):
    tokenizer = load_tokenizer(encoder)
    before = tokenizer_hash(tokenizer)
    tokenizer(["red car", "blue"], truncation=True, max_length=3, padding=True)
    assert tokenizer_hash(tokenizer) == before


def test_default_place_and_names(tmp_path, encoder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_xmc(tmp_path / "My-Corpus", random_content())
    corpus = prepare(tmp_path / "My-Corpus", encoder=encoder, max_length=8, show_progress=False)
    assert corpus.name == "My-Corpus"
    assert corpus.path == Path("prepared") / f"My-Corpus-{corpus.fingerprint[:8]}"


def test_fast_path_equals_the_tokenizers_own_call(tmp_path):
    tokenizer = load_tokenizer(PACKAGED_ENCODER)
    texts = ["Émigré naïveté [SEP] 東京 " * 9, "a", "unaffable-ish: 1,234.5", "\u200b", "x" * 300]
    write(tmp_path / "raw" / "Y.txt", texts, False)
    for split in ("trn", "tst"):
        write(tmp_path / "raw" / f"{split}_X.txt", texts, False)
        rows = [f"{i}:1" for i in range(5)]
        write(tmp_path / "raw" / f"{split}_X_Y.txt", ["5 5", *rows], False)
    corpus = prepare(
        tmp_path / "raw",
        tmp_path / "out",
        encoder=PACKAGED_ENCODER,
        max_length=12,
        show_progress=False,
    )
    expected = tokenizer([t.strip() for t in texts], truncation=True, max_length=12)["input_ids"]
    values, offsets = corpus.labels.tokens(np.arange(5))
    assert [values[a:b].tolist() for a, b in pairwise(offsets)] == expected


def test_a_tokenizer_written_in_python_works(tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizer

    class Letters(PreTrainedTokenizer):
        def __init__(self, **options):
            super().__init__(pad_token="\0", unk_token="\1", **options)

        vocab_size = 128

        def get_vocab(self):
            return {chr(i): i for i in range(128)}

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return ord(token) if ord(token) < 128 else 1

        def _convert_id_to_token(self, index):
            return chr(index)

    tokenizer = Letters()
    assert not tokenizer.is_fast
    monkeypatch.setattr("unidec_ds.data.prepare.load_tokenizer", lambda name: tokenizer)
    content = random_content()
    write_xmc(tmp_path / "raw", content)
    corpus = prepare(
        tmp_path / "raw", tmp_path / "out", encoder="x", max_length=5, show_progress=False
    )
    values, offsets = corpus.labels.tokens(np.arange(len(content.labels)))
    for text, (begin, end) in zip(content.labels, pairwise(offsets), strict=True):
        expected = [ord(c) if ord(c) < 128 else 1 for c in text][:5]
        assert values[begin:end].tolist() == (expected or [corpus.pad_token_id])


def test_oddities_are_counted_and_said_once(tmp_path, made, caplog):
    def query(uid, title, targets, **more):
        return json.dumps({"uid": uid, "title": title, "target_ind": targets, **more})

    labels = [("a", "red", ""), ("a", "blue", "car"), ("b", "", ""), ("c", "", "old")]
    rows = [json.dumps({"uid": u, "title": t, "content": c}) for u, t, c in labels]
    write(tmp_path / "raw" / "lbl.json", rows, False)
    train = [
        query("q", "red", [1, 0, 1, 1]),
        query("q", "", [0, 2], content="house"),
        query("r", "car", []),
        query("s", "car", [1, 2], target_rel=[0, 0]),
    ]
    write(tmp_path / "raw" / "trn.json", train, False)
    write(tmp_path / "raw" / "tst.json", [query("q", "tree", []), query("t", "x", [0])], False)
    with caplog.at_level(logging.WARNING):
        corpus = made(tmp_path / "raw")
    assert corpus.manifest["oddities"] == {
        "train_queries_without_positive": 2,
        "test_queries_without_positive": 1,
        "labels_without_text": 1,
        "labels_without_train_positive": 1,
        "duplicate_label_uids": 1,
        "duplicate_train_uids": 1,
        "duplicate_test_uids": 0,
        "empty_titles": 2,
        "empty_contents": 6,
        "repeated_targets": 2,
        "irrelevant_targets": 2,
    }
    assert corpus.train_query_ids().tolist() == [0, 1]
    assert len(corpus.queries["test"]) == 2
    assert corpus.label_has_text.tolist() == [True, True, False, True]
    assert "2 train queries without a positive" in caplog.text
    assert "no filter file for test" in caplog.text
    assert "duplicate_test" not in caplog.text
    caplog.clear()
    made(tmp_path / "raw")
    assert not caplog.text
    for line in ("4 labels", "4 queries, 4 positive pairs", "1 labels without text"):
        assert line in corpus.describe()


def test_targets_by_uid_mean_the_first_label_of_that_uid(tmp_path, made):
    labels = [{"id": i, "text": "red"} for i in ("x", 7, "x")]
    write(tmp_path / "raw" / "labels.jsonl", [json.dumps(row) for row in labels], False)
    queries = [{"id": 0, "text": "a", "labels": ["x", "7"]}, {"id": 1, "text": "b", "labels": [7]}]
    write(tmp_path / "raw" / "queries.jsonl", [json.dumps(row) for row in queries], False)
    corpus = made(tmp_path / "raw")
    assert [corpus.positives["train"].row(i).tolist() for i in (0, 1)] == [[0, 1], [1]]
    assert list(corpus.queries) == ["train"]
    queries[1]["labels"] = ["7", "8"]
    write(tmp_path / "raw" / "queries.jsonl", [json.dumps(row) for row in queries], False)
    with pytest.raises(CorpusError, match=r"queries\.jsonl:2: label id '8' is not an id in labels"):
        made(tmp_path / "raw")


def test_digests_find_every_uid():
    uids, digests = [str(i) for i in range(5000)], UidDigests()
    digests.add(uids[:2000])
    digests.add(uids[2000:] + uids[:10])
    assert digests.num_repeated() == 10
    assert digests.rows([*uids, "-", ""]).tolist() == [*range(5000), -1, -1]


@pytest.mark.parametrize(
    ("file", "line", "new", "where"),
    [
        ("trn.json", 40, '{"uid": "x", "title": "", "target_ind": []}', "trn.json:40"),
        ("tst.json", 3, "no", "tst.json:3"),
        ("filter_labels_test.txt", 2, "0 99", "filter_labels_test.txt:2"),
    ],
)
def test_a_bad_corpus_leaves_nothing_behind(file, line, new, where, tmp_path, made):
    write_xmc(tmp_path / "raw", random_content())
    lines = (tmp_path / "raw" / file).read_text().splitlines()
    lines[line - 1] = new
    write(tmp_path / "raw" / file, lines, False)
    with pytest.raises(CorpusError, match=re.escape(where)):
        made(tmp_path / "raw")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "raw"]


@pytest.mark.parametrize("table", ["lbl.json", "trn.json"])
def test_empty_tables_are_refused(table, tmp_path, made):
    content = random_content()
    content.filters = {}
    write_xmc(tmp_path / "raw", content)
    (tmp_path / "raw" / table).write_text("")
    with pytest.raises(CorpusError, match=rf"{table}:1: "):
        made(tmp_path / "raw")


def test_a_killed_run_is_never_taken_for_a_corpus(tmp_path, made, encoder):
    content = random_content()
    write_xmc(tmp_path / "raw", content)
    script = (
        "import os, sys, pathlib\n"
        "from unidec_ds.data import build, prepare\n"
        "build._Builder.finish = lambda self: os._exit(9)\n"
        "prepare.prepare(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), encoder=sys.argv[3],"
        f" max_length={LENGTH}, show_progress=False)\n"
    )
    out = tmp_path / "out"
    killed = [sys.executable, "-c", script, str(tmp_path / "raw"), str(out), encoder]
    assert subprocess.run(killed, check=False).returncode == 9
    assert not out.exists()
    assert (tmp_path / ".out.building" / "train").exists()
    with pytest.raises(CorpusError, match="not a prepared corpus"):
        open_corpus(tmp_path / ".out.building")
    check_holds(made(tmp_path / "raw"), content)
    assert not (tmp_path / ".out.building").exists()


def _prepare_and_report(raw, out, encoder, builds):
    from unidec_ds.data import prepare as module

    real_build = module.build

    def counted(*arguments):
        builds.put(1)
        real_build(*arguments)

    module.build = counted
    corpus = module.prepare(raw, out, encoder=encoder, max_length=LENGTH, show_progress=False)
    builds.put(corpus.fingerprint)


def test_of_two_processes_one_builds_and_both_open(tmp_path, encoder):
    content = random_content(num_train=3000)
    write_xmc(tmp_path / "raw", content)
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    arguments = (tmp_path / "raw", tmp_path / "out", encoder, said)
    processes = [context.Process(target=_prepare_and_report, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    answers = [said.get(timeout=120) for _ in range(3)]
    for process in processes:
        process.join()
    assert answers.count(1) == 1
    assert len({answer for answer in answers if answer != 1}) == 1
    check_holds(open_corpus(tmp_path / "out"), content)


def test_a_folder_with_other_files_is_not_overwritten(tmp_path, made):
    write_xmc(tmp_path / "raw", random_content())
    (tmp_path / "out").mkdir()
    made(tmp_path / "raw")  # empty: fine
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("dear")
    with pytest.raises(CorpusError, match="holds files but no prepared corpus"):
        made(tmp_path / "raw", "home")
    with pytest.raises(CorpusError, match="holds files but no prepared corpus"):
        made(tmp_path / "raw", "raw")
    with pytest.raises(CorpusError, match="already a prepared corpus"):
        made(tmp_path / "out", "again")


def test_no_room_for_a_text(tmp_path, made):
    write_xmc(tmp_path / "raw", random_content())
    with pytest.raises(UserError, match="more than the 2 special tokens"):
        made(tmp_path / "raw", max_length=2)


def test_resolve_finds_raw_and_prepared_folders(tmp_path, encoder):
    write_xmc(tmp_path / "raw", random_content())

    def resolve(path, text="title+content", length=LENGTH, name=encoder):
        config = CorpusConfig(path=str(path), text=text, prepared_dir=str(tmp_path / "prepared"))
        return resolve_corpus(config, name, length, show_progress=False)

    corpus = resolve(tmp_path / "raw")
    assert corpus.path.parent == tmp_path / "prepared"
    moved = Path(shutil.copytree(corpus.path, tmp_path / "elsewhere"))
    assert resolve(moved).fingerprint == corpus.fingerprint
    with pytest.raises(
        CorpusError, match=r"encoder.max_length: prepared with 8, the recipe says 9"
    ):
        resolve(moved, length=9)
    with pytest.raises(CorpusError, match=r"corpus.text: prepared with title\+content, the recipe"):
        resolve(moved, text="title")
    other = save_tokenizer(tmp_path / "other", raw_corpora.WORDS[:5])
    with pytest.raises(CorpusError, match=r"tokenizer of encoder\.name"):
        resolve(moved, name=other)
    with pytest.raises(CorpusError, match=r"'nowhere' is neither a folder .*lf-wordnet-verbs-9k"):
        resolve("nowhere")


def test_incomplete_copies_and_other_versions_are_refused(tmp_path, made):
    write_xmc(tmp_path / "raw", random_content())
    path = made(tmp_path / "raw").path
    indices = path / "train.positives.indices.npy"
    data = indices.read_bytes()
    indices.write_bytes(data[:-4])
    with pytest.raises(CorpusError, match=r"indices.npy: \d+ bytes, needed \d+"):
        open_corpus(path)
    indices.unlink()
    with pytest.raises(CorpusError, match=r"indices.npy: missing"):
        open_corpus(path)
    made(tmp_path / "raw")  # notices and builds again
    manifest = json.loads((path / "corpus.json").read_text())
    (path / "corpus.json").write_text(json.dumps({**manifest, "format_version": 0}))
    with pytest.raises(CorpusError, match="format version 0, needed 1"):
        open_corpus(path)
    (path / "corpus.json").write_text("{")
    with pytest.raises(CorpusError, match=r"corpus.json:1: not valid JSON"):
        open_corpus(path)


def statistics(readme):
    return {
        key: value.strip()
        for key, value in re.findall(r"^\| (\w+) \| (.*) \|$", readme.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize(
    "name",
    ["lf-wordnet-verbs-9k", pytest.param("lf-wordnet-84k", marks=pytest.mark.slow)],
)
def test_embedded_corpora_are_what_their_readme_says(name, tmp_path):
    config = CorpusConfig(path=name, prepared_dir=str(tmp_path))
    corpus = resolve_corpus(config, PACKAGED_ENCODER, 256, show_progress=False)
    said = statistics(embedded_corpora()[name] / "README.md")
    counted = {"n_labels": corpus.num_labels}
    for split in ("train", "test"):
        counted[f"n_{split}"] = len(corpus.queries[split])
        counted[f"{split}_pairs"] = corpus.positives[split].num_pairs
        counted[f"filter_{split}"] = corpus.filter_pairs[split].num_pairs
    assert counted == {key: int(said[key]) for key in counted}
    assert set(corpus.manifest["oddities"].values()) == {0}
    assert (corpus.positives["train"].column_counts() > 0).all()
    assert corpus.label_has_text.all()
    length = corpus.manifest["token_lengths"]["labels"]
    assert said["label_tokens"].startswith(
        f"mean {length['mean']:.1f}, median {length['median']}, p90 {length['p90']}, max "
    )
    assert isinstance(corpus.positives["train"], Pairs)
