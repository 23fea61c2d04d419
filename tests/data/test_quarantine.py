"""Bad lines put aside: what is left is the corpus without them, ids meaning what they meant."""

import json

import numpy as np
import pytest
from raw_corpora import WRITERS, random_content, save_tokenizer

from unidec_ds.data.prepare import prepare
from unidec_ds.errors import CorpusError, UserError
from unidec_ds.exits import exit_with_message

LAYOUTS = ["xmc", "renee", "dexml", "jsonl"]
LABELS = {"xmc": "lbl.json", "renee": "Y.txt", "dexml": "raw/Y.txt", "jsonl": "labels.jsonl"}
TRAIN = {
    "xmc": "trn.json",
    "renee": "trn_X.txt",
    "dexml": "raw/trn_X.txt",
    "jsonl": "queries.jsonl",
}
FILTER = {
    layout: "trn_filter_labels.txt" if layout == "renee" else "filter_labels_train.txt"
    for layout in LAYOUTS
}


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("encoder"))


def spoil(path, rows, bad=b"caf\xe9 {"):
    """Replaces the lines of some rows, counted from 0."""
    lines = path.read_bytes().split(b"\n")
    for row in rows:
        lines[row] = bad
    path.write_bytes(b"\n".join(lines))


def make(tmp_path, encoder, quarantine="bad.jsonl", out="out"):
    return prepare(
        tmp_path / "raw",
        tmp_path / out,
        encoder=encoder,
        max_length=8,
        quarantine=tmp_path / quarantine if quarantine else None,
        show_progress=False,
    )


def put_aside(tmp_path):
    lines = (tmp_path / "bad.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_label_keeps_its_row_and_a_bad_query_goes_with_all_it_has(layout, tmp_path, encoder):
    content = random_content()
    bad_labels, bad_queries = [2, 9], [0, 17, 18, 39]
    content.filters["train"] = [(0, 1), (1, 5), (17, 3), (20, 7), (39, 2), (38, 11)]
    for targets in content.targets.values():  # by uid, a query of a lost uid is lost too
        targets[:] = [[t for t in row if t not in bad_labels] for row in targets]
    WRITERS[layout](tmp_path / "raw", content)
    spoil(tmp_path / "raw" / LABELS[layout], bad_labels)
    spoil(tmp_path / "raw" / TRAIN[layout], bad_queries)
    spoil(tmp_path / "raw" / FILTER[layout], [3])

    corpus = make(tmp_path, encoder)

    texts = ["" if row in bad_labels else text for row, text in enumerate(content.labels)]
    assert corpus.labels.texts(np.arange(len(texts))) == texts
    assert corpus.label_has_text.tolist() == [bool(text) for text in texts]
    kept = [row for row in range(40) if row not in bad_queries]
    train = corpus.queries["train"]
    assert train.texts(np.arange(len(train))) == [content.queries["train"][row] for row in kept]
    assert train.uids(np.arange(len(train))) == [str(row) for row in kept]
    positives = [corpus.positives["train"].row(i).tolist() for i in range(len(kept))]
    assert positives == [sorted(set(content.targets["train"][row])) for row in kept]
    pairs = corpus.filter_pairs["train"]
    found = list(zip(pairs.rows_of_pairs().tolist(), pairs.indices.tolist(), strict=True))
    assert found == sorted([(kept.index(1), 5), (kept.index(38), 11)])
    assert len(corpus.queries["test"]) == 11
    assert corpus.manifest["put_aside"] == {
        "lines": 7,
        "labels": 2,
        "train_queries": 4,
        "test_queries": 0,
        "filter_pairs": 1,
    }
    lines = put_aside(tmp_path)
    places = [(line["file"].removeprefix(f"{tmp_path}/raw/"), line["line"]) for line in lines]
    assert places == [
        *((LABELS[layout], row + 1) for row in bad_labels),
        *((TRAIN[layout], row + 1) for row in bad_queries),
        (FILTER[layout], 4),
    ]
    assert all("0xe9" in line["reason"] for line in lines)
    assert {line["text"] for line in lines} == {"caf\\xe9 {"}
    for said in ("7 bad lines", "2 labels without a text: kept", "4 train queries left out"):
        assert said in corpus.describe()


def test_a_bad_row_of_positives_takes_its_query(tmp_path, encoder):
    content = random_content()
    WRITERS["renee"](tmp_path / "raw", content)
    spoil(tmp_path / "raw" / "trn_X_Y.txt", [1, 6], b"1:1 99:1")
    spoil(tmp_path / "raw" / "trn_X.txt", [5])
    corpus = make(tmp_path, encoder)
    assert corpus.queries["train"].uids(np.arange(3)) == ["1", "2", "3"]
    assert len(corpus.queries["train"]) == 38  # row 5 is bad in both files, one query
    assert corpus.manifest["put_aside"] == {
        "lines": 3, "labels": 0, "train_queries": 2, "test_queries": 0, "filter_pairs": 0,
    }  # fmt: skip
    assert put_aside(tmp_path)[0]["text"].split() == ["1:1.0", "99:1.0"]


def test_a_label_whose_text_alone_is_bad_keeps_its_uid(tmp_path, encoder):
    content = random_content()
    WRITERS["jsonl"](tmp_path / "raw", content)
    spoil(tmp_path / "raw" / "labels.jsonl", [4], b'{"id": 4, "text": 7}')
    corpus = make(tmp_path, encoder)
    assert corpus.manifest["put_aside"]["lines"] == 1
    assert corpus.labels.uids(np.array([4])) == ["4"]
    assert corpus.positives["train"].num_pairs == sum(
        len(set(row)) for row in content.targets["train"]
    )


def test_a_query_of_an_unknown_label_is_put_aside(tmp_path, encoder):
    content = random_content()
    content.targets["train"][7] = [1, 999]
    WRITERS["jsonl"](tmp_path / "raw", content)
    corpus = make(tmp_path, encoder)
    (line,) = put_aside(tmp_path)
    assert line["line"] == 8
    assert "'999' is not an id in labels.jsonl" in line["reason"]
    assert json.loads(line["text"])["labels"] == ["1", "999"]
    assert corpus.queries["train"].uids(np.array([6, 7])) == ["6", "8"]


def test_a_split_may_lose_all_its_queries(tmp_path, encoder):
    content = random_content()
    num_queries = len(content.targets["test"])
    content.targets["test"] = [[999]] * num_queries
    WRITERS["jsonl"](tmp_path / "raw", content)
    corpus = make(tmp_path, encoder)
    assert len(corpus.queries["test"]) == corpus.positives["test"].num_rows == 0
    assert len(put_aside(tmp_path)) == num_queries


@pytest.mark.parametrize("quarantine", ["bad.jsonl", None])
def test_a_bad_header_is_a_matter_of_the_file(quarantine, tmp_path, encoder):
    WRITERS["renee"](tmp_path / "raw", random_content())
    spoil(tmp_path / "raw" / "trn_X_Y.txt", [0], b"caf\xe9")
    with pytest.raises(CorpusError, match=r"trn_X_Y.txt:1: found .*needed the header") as error:
        make(tmp_path, encoder, quarantine)
    assert "quarantine" not in str(error.value)


def test_without_a_quarantine_the_first_bad_line_is_an_error_also_after_one(tmp_path, encoder):
    WRITERS["xmc"](tmp_path / "raw", random_content())
    clean = make(tmp_path, encoder, quarantine=None, out="clean")
    assert make(tmp_path, encoder, out="clean").fingerprint == clean.fingerprint
    assert not (tmp_path / "bad.jsonl").exists()  # it was prepared before, nothing was read
    spoil(tmp_path / "raw" / "trn.json", [4])
    assert make(tmp_path, encoder).num_lines_put_aside == 1
    with pytest.raises(CorpusError, match=r"trn\.json:5: .*--quarantine FILE"):
        make(tmp_path, encoder, quarantine=None)
    assert make(tmp_path, encoder).num_lines_put_aside == 1  # that one is still there


def test_a_file_that_is_damaged_as_a_whole_is_no_matter_for_a_quarantine(tmp_path, encoder):
    WRITERS["renee"](tmp_path / "raw", random_content())
    path = tmp_path / "raw" / "trn_X_Y.txt"
    path.write_bytes(path.read_bytes().replace(b"40 23", b"41 23"))
    with pytest.raises(CorpusError, match="announces 41 rows"):
        make(tmp_path, encoder)


def test_no_other_file_is_written_over(tmp_path, encoder):
    WRITERS["xmc"](tmp_path / "raw", random_content())
    spoil(tmp_path / "raw" / "trn.json", [4])
    with pytest.raises(UserError, match="holds something else"):
        make(tmp_path, encoder, quarantine="raw/lbl.json")
    with pytest.raises(UserError, match="in the corpus's own folder"):
        make(tmp_path, encoder, quarantine="out/bad.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        make(tmp_path, encoder, quarantine="file/bad.jsonl")


def test_prepare_says_how_many_lines_were_put_aside(tmp_path, encoder, capsys, monkeypatch):
    from unidec_ds import cli

    WRITERS["renee"](tmp_path / "raw", random_content())
    spoil(tmp_path / "raw" / "trn_X.txt", [4])
    command = ["unidec-ds", "prepare", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    command += ["--encoder", encoder, "--quarantine", str(tmp_path / "bad.jsonl")]
    monkeypatch.setattr("sys.argv", command)
    assert exit_with_message(cli._main) == 0
    said = capsys.readouterr()
    assert "1 bad lines put aside" in said.out
    assert "1 train queries left out" in said.out
    assert len(put_aside(tmp_path)) == 1
