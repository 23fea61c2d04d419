import gc
import gzip
import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import raw_corpora
import scipy.sparse
from raw_corpora import WRITERS, random_content, write, write_dexml, write_renee, write_xmc

from unidec_ds.data.files import count_records, read_lines
from unidec_ds.data.formats import recognise
from unidec_ds.data.matrices import SparseMatrixFile
from unidec_ds.errors import CorpusError


def text_of(record):
    return f"{record.title} {record.content}".strip()


def read_all(folder):
    """Reads a whole corpus into plain lists."""
    raw = recognise(folder)
    labels = list(raw.labels())
    row_of = {record.uid: row for row, record in enumerate(labels)}
    content = raw_corpora.Content([text_of(r) for r in labels], {}, {}, {})
    for split in raw.splits:
        records = list(raw.queries(split, len(labels)))
        content.queries[split] = [text_of(r) for r in records]
        content.targets[split] = [
            [row_of[t] if raw.targets_are_uids else t for t in r.targets] for r in records
        ]
        pairs = raw.filter_pairs(split, len(records), len(labels))
        content.filters[split] = list(zip(*(ids.tolist() for ids in pairs), strict=True))
        assert raw.count(split) == len(records)
    return content


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_yields_the_content_written(layout, gz, tmp_path):
    content = random_content()
    WRITERS[layout](tmp_path, content, gz)
    assert read_all(tmp_path) == content


def test_records_know_their_line_and_uid(tmp_path):
    write_xmc(tmp_path, random_content())
    records = list(recognise(tmp_path).queries("train", 23))
    assert [r.line for r in records] == list(range(1, 41))
    assert records[7].uid == "7"


def test_missing_filter_files_mean_no_pairs_and_the_test_table_may_be_absent(tmp_path):
    content = random_content()
    raw_corpora.write_jsonl(tmp_path, content)
    for path in [*tmp_path.glob("filter*"), tmp_path / "queries_test.jsonl"]:
        path.unlink()
    raw = recognise(tmp_path)
    assert raw.splits == ("train",)
    assert [len(ids) for ids in raw.filter_pairs("train", 40, 23)] == [0, 0]


def test_zero_relevance_is_left_out_and_counted(tmp_path):
    content = random_content()
    for writer in (write_xmc, write_renee, write_dexml):
        folder = tmp_path / writer.__name__
        writer(folder, content)
    xmc, renee, dexml = (tmp_path / w.__name__ for w in (write_xmc, write_renee, write_dexml))
    rows = [json.loads(line) for line in (xmc / "trn.json").read_text().splitlines()]
    rows[0] |= {"target_ind": [4, 5, 6], "target_rel": [1, 0, 2.5]}
    write(xmc / "trn.json", [json.dumps(row) for row in rows], False)
    lines = (renee / "trn_X_Y.txt").read_text().splitlines()
    lines[1] = "4:1 5:0.0 6:2.5"
    write(renee / "trn_X_Y.txt", lines, False)
    matrix = raw_corpora.csr([[4, 5, 6], *content.targets["train"][1:]], 23)
    matrix.data[1] = 0
    scipy.sparse.save_npz(dexml / "Y.trn.npz", matrix)
    for folder in (xmc, renee, dexml):
        first = next(recognise(folder).queries("train", 23))
        assert (first.targets, first.num_irrelevant) == ((4, 6), 1)


def test_real_text_files_have_marks_carriage_returns_and_odd_line_breaks(tmp_path):
    path = tmp_path / "Y.txt"
    path.write_bytes("\ufefffirst\r\nse\u2028c\x0bo\x85nd\n\nlast".encode())
    lines = list(read_lines(path))
    assert lines == [(1, "first"), (2, "se\u2028c\x0bo\x85nd"), (3, ""), (4, "last")]
    assert count_records(path) == 4


def test_blank_lines_among_json_objects_are_no_records(tmp_path):
    content = random_content()
    write_xmc(tmp_path, content)
    with (tmp_path / "lbl.json").open("a") as stream:
        stream.write("\n  \n")
    assert len(list(recognise(tmp_path).labels())) == len(content.labels)


def test_incomplete_folder_lists_what_is_there_and_what_is_accepted(tmp_path):
    write_renee(tmp_path, random_content())
    (tmp_path / "tst_X_Y.txt").unlink()
    with pytest.raises(CorpusError) as caught:
        recognise(tmp_path)
    message = str(caught.value)
    assert "Renee: " in message
    assert "missing here: tst_X_Y.txt" in message
    assert "found: Y.txt, trn_X.txt" in message
    for layout in ("XMC repository", "DEXML", "tables"):
        assert f"{layout}: " in message
    assert message.count("missing here") == 1


def test_not_a_folder(tmp_path):
    with pytest.raises(CorpusError, match="not a folder"):
        recognise(tmp_path / "nowhere")


def replace_line(path, number, new):
    """Replaces line `number` (from 1) by bytes; None removes it."""
    lines = path.read_bytes().split(b"\n")
    lines[number - 1 : number] = [] if new is None else [new]
    path.write_bytes(b"\n".join(lines))


XMC_QUERY = b'{"uid": "x", "title": "red", "target_ind": [1], "target_rel": [1.0]}'
BAD_LINES = [
    # layout, file, line, replacement, where, what
    ("xmc", "trn.json", 5, b'{"uid": "x", "title": ', "trn.json:5", "not valid JSON"),
    ("xmc", "trn.json", 5, b"[1, 2]", "trn.json:5", "needed a JSON object"),
    ("xmc", "trn.json", 5, b'{"uid": "caf\xe9"}', "trn.json:5", "0xe9.* is not UTF-8"),
    ("xmc", "trn.json", 5, XMC_QUERY.replace(b"red", b" "), "trn.json:5", "query without text"),
    ("xmc", "tst.json", 5, XMC_QUERY.replace(b'"red"', b"null"), "tst.json:5", "without text"),
    (
        "xmc",
        "trn.json",
        5,
        XMC_QUERY.replace(b"[1]", b"[23]"),
        "trn.json:5",
        "label id 23 .*0 to 22",
    ),
    ("xmc", "trn.json", 5, XMC_QUERY.replace(b"[1]", b"[-1]"), "trn.json:5", "label id -1 is out"),
    ("xmc", "trn.json", 5, XMC_QUERY.replace(b"[1]", b'["1"]'), "trn.json:5", "list of integers"),
    ("xmc", "trn.json", 5, XMC_QUERY.replace(b"[1]", b"[1, 2]"), "trn.json:5", "2 numbers"),
    ("xmc", "trn.json", 5, XMC_QUERY.replace(b'"red"', b"7"), "trn.json:5", "title is 7"),
    ("xmc", "trn.json", 5, XMC_QUERY.replace(b"red", b"\\ud800"), "trn.json:5", "surrogate"),
    ("xmc", "trn.json", 5, b'{"uid": "x", "title": "red"}', "trn.json:5", "target_ind missing"),
    ("xmc", "lbl.json", 5, b'{"uid": "x", "text": "red"}', "lbl.json:5", "title missing"),
    ("xmc", "lbl.json", 5, b'{"uid": 1.5, "title": "red"}', "lbl.json:5", "uid is 1.5"),
    ("renee", "trn_X.txt", 5, b"  ", "trn_X.txt:5", "query without text"),
    ("renee", "Y.txt", 5, b"caf\xe9", "Y.txt:5", "byte 4 of the line"),
    ("renee", "trn_X.txt", 5, None, "trn_X_Y.txt:41", "more rows than trn_X.txt.* after 39"),
    ("renee", "trn_X_Y.txt", 5, None, "trn_X_Y.txt:1", "announces 40 rows, the file holds 39"),
    ("renee", "trn_X_Y.txt", 1, b"39 23", "trn_X_Y.txt:41", "a row more than the 39"),
    ("renee", "trn_X_Y.txt", 1, b"40 22", "trn_X_Y.txt:", "out of range|22 columns"),
    ("renee", "trn_X_Y.txt", 1, b"forty", "trn_X_Y.txt:1", "needed the header"),
    ("renee", "trn_X_Y.txt", 5, b"1:1 23:1", "trn_X_Y.txt:5", "label id 23 is out of range"),
    ("renee", "trn_X_Y.txt", 5, b"1:1 2", "trn_X_Y.txt:5", "found '2', needed entries"),
    ("renee", "trn_X_Y.txt", 5, b"a:1", "trn_X_Y.txt:5", "found 'a:1'"),
    ("renee", "trn_filter_labels.txt", 3, b"1", "trn_filter_labels.txt:3", "two integers"),
    ("renee", "trn_filter_labels.txt", 3, b"40 1", "labels.txt:3", "query row 40 .* 0 to 39"),
    ("renee", "trn_filter_labels.txt", 3, b"1 23", "labels.txt:3", "label id 23"),
    ("jsonl", "queries.jsonl", 5, b'{"id": 1, "text": "red"}', "queries.jsonl:5", "labels missing"),
    (
        "jsonl",
        "queries.jsonl",
        5,
        b'{"id": 1, "text": "", "labels": []}',
        "jsonl:5",
        "without text",
    ),
    (
        "jsonl",
        "queries.jsonl",
        5,
        b'{"id": 1, "text": "a", "labels": "1"}',
        "jsonl:5",
        "list of lab",
    ),
    ("jsonl", "queries.jsonl", 5, b'{"id": 1, "text": "a", "labels": [1.5]}', "jsonl:5", "is 1.5"),
    ("jsonl", "labels.jsonl", 5, b'{"text": "red"}', "labels.jsonl:5", "id missing"),
]


@pytest.mark.parametrize(("layout", "file", "line", "new", "where", "what"), BAD_LINES)
def test_bad_lines_are_named_by_file_and_line(layout, file, line, new, where, what, tmp_path):
    WRITERS[layout](tmp_path, random_content())
    replace_line(tmp_path / file, line, new)
    with pytest.raises(CorpusError, match=what) as caught:
        read_all(tmp_path)
    assert where in str(caught.value)


def test_bad_line_of_a_gzipped_file(tmp_path):
    write_xmc(tmp_path, random_content(), gz=True)
    path = tmp_path / "trn.json.gz"
    lines = gzip.decompress(path.read_bytes()).split(b"\n")
    lines[6] = b"{"
    path.write_bytes(gzip.compress(b"\n".join(lines)))
    with pytest.raises(CorpusError, match=r"trn\.json\.gz:7: not valid JSON"):
        read_all(tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:-300], lambda data: b"plain text\n"])
def test_damaged_gzip(damage, tmp_path):
    write_xmc(tmp_path, random_content(num_train=2000), gz=True)
    path = tmp_path / "trn.json.gz"
    path.write_bytes(damage(path.read_bytes()))
    for read in (lambda: read_all(tmp_path), lambda: count_records(path)):
        with pytest.raises(CorpusError, match=r"trn\.json\.gz:\d+: the gzip file is damaged"):
            read()


def test_endless_line(tmp_path, monkeypatch):
    monkeypatch.setattr("unidec_ds.data.files.MAX_LINE_BYTES", 100)
    path = tmp_path / "lbl.json"
    path.write_bytes(b"short\n" + b"x" * 99 + b"\n" + b"x" * 100)
    with pytest.raises(CorpusError, match=r"lbl\.json:3: a line of more than 100 bytes"):
        list(read_lines(path))


def test_bad_npz(tmp_path):
    content = random_content()
    write_dexml(tmp_path, content)
    path = tmp_path / "Y.trn.npz"
    matrix = raw_corpora.csr(content.targets["train"], 23)
    for bad, what in [
        (matrix.tocoo(), "coo form, needed csr"),
        (matrix[:39], r"trn_X.txt:40: more rows than Y.trn.npz"),
        (raw_corpora.csr(content.targets["train"], 24), "24 columns, but there are 23 labels"),
    ]:
        scipy.sparse.save_npz(path, bad)
        with pytest.raises(CorpusError, match=what):
            read_all(tmp_path)
    matrix.indices[matrix.indptr[6]] = 99
    scipy.sparse.save_npz(path, matrix)
    with pytest.raises(CorpusError, match=r"Y.trn.npz:7: label id 99"):
        read_all(tmp_path)
    path.write_bytes(b"PK no")
    with pytest.raises(CorpusError, match="not a scipy sparse matrix"):
        read_all(tmp_path)


def test_sparse_matrix_files_equal_scipys_matrix(tmp_path):
    rng = np.random.default_rng(1)
    dense = rng.integers(1, 9, (9000, 50)) * (rng.random((9000, 50)) < 0.05)
    matrix = scipy.sparse.csr_matrix(dense.astype(np.float32))
    scipy.sparse.save_npz(tmp_path / "m.npz", matrix)
    rows = [" ".join(f"{c}:{r[c]}" for c in np.flatnonzero(r)) for r in dense]
    write(tmp_path / "m.txt", ["9000 50", *rows], gz=True)
    for name in ("m.npz", "m.txt.gz"):
        file = SparseMatrixFile(tmp_path / name)
        assert (file.num_rows, file.num_columns) == dense.shape
        read = np.zeros_like(dense)
        for i, row in enumerate(file):
            read[i, row.columns] = row.values
        np.testing.assert_array_equal(read, dense)


def test_missing_column_and_unreadable_parquet(tmp_path):
    raw_corpora.write_parquet(tmp_path, random_content())
    pa.parquet.write_table(pa.table({"id": ["1"], "text": ["a"]}), tmp_path / "queries.parquet")
    with pytest.raises(CorpusError, match=r"queries\.parquet:1: column labels missing; found id, "):
        read_all(tmp_path)
    (tmp_path / "queries.parquet").write_bytes(b"no")
    with pytest.raises(CorpusError, match="not a readable Parquet file"):
        read_all(tmp_path)


@pytest.mark.parametrize("layout", ["xmc", "renee", "dexml", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(layout, tmp_path, monkeypatch):
    monkeypatch.setattr("unidec_ds.data.files._ROWS_AT_ONCE", 512)
    monkeypatch.setattr("unidec_ds.data.matrices._ROWS_AT_ONCE", 512)

    def peak(num_train):
        folder = tmp_path / str(num_train)
        WRITERS[layout](folder, random_content(num_train=num_train))
        raw = recognise(folder)
        for _ in raw.queries("train", 23):  # what the readers load and cache once
            pass
        tracemalloc.start()
        for _ in raw.queries("train", 23):
            pass
        bytes_used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return bytes_used

    gc.disable()  # a collection between the two passes empties Python's stock of freed tuples
    try:
        assert peak(9000) < 1.2 * peak(4500) + 50_000
    finally:
        gc.enable()
