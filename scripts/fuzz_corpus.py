"""What must hold of the files of a corpus, and of those that `unidec-ds score` reads."""

# ruff: noqa: PT017  (an error that names the wrong line is a finding, no test's expectation)

from __future__ import annotations

import gzip
import io
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from fuzz_files import (
    FILTER,
    LABEL_TEXTS,
    PREDICTIONS,
    SPARSE,
    SPARSE_ROWS,
    TEXTS,
    TRAIN,
    json_lines,
    label_rows,
    put,
    query_rows,
    xmc_labels_file,
    xmc_queries_file,
)
from fuzz_readers import (
    BAD,
    NUM_LABELS,
    QUERIES,
    slow_integer,
    slow_json,
    slow_lines,
    slow_row,
    slow_sparse,
    slow_text,
    slow_xmc,
)

from unidec_ds.data.files import LineError, refuse
from unidec_ds.data.formats import recognise
from unidec_ds.data.matrices import SparseMatrixFile, read_pairs
from unidec_ds.data.predictions import read_predictions, score_files
from unidec_ds.data.records import Record
from unidec_ds.errors import CorpusError, UserError


def _require_named(error: UserError, path: Path) -> None:
    """The message says which file, and which line of it."""
    assert re.search(re.escape(str(path)) + r":\d+: ", str(error)), str(error)


def _hold_records(
    read: Callable[[Any], Iterator[Record | None]],
    path: Path,
    expected: list[tuple[int, Any]],
    is_query: bool,
) -> bool:
    """Records that were put aside, kept or refused are those of the slow reader."""
    faults: list[LineError] = []
    records = list(read(faults.append))
    bad_lines = {fault.line for fault in faults}
    found = []
    for record in records:
        if record is None or record.line in bad_lines:
            found.append(BAD)
            assert record is None or record.title + record.content == ""
        elif is_query:
            found.append((*record[1:5], record.num_irrelevant))
        else:
            found.append(record[1:4])
    assert found == [value for _, value in expected]
    assert sorted(bad_lines) == [line for line, value in expected if value == BAD]
    assert [r.row for r in records if r] == [n for n, r in enumerate(records) if r]
    for fault in faults:
        _require_named(fault, path)
    try:
        strict = list(read(refuse))
    except LineError as error:
        assert error.line == min(bad_lines)
        return False
    assert not bad_lines
    assert strict == records
    return True


def check_xmc(data: bytes, folder: Path, is_query: bool) -> bool:
    """Checks `trn.json` or `lbl.json`."""
    files = {
        "lbl.json": xmc_labels_file(),
        "trn.json": xmc_queries_file(),
        "tst.json": xmc_queries_file(),
    }
    name = "trn.json" if is_query else "lbl.json"
    put(folder, {**files, name: data})
    raw = recognise(folder)
    expected = [
        (line, slow_xmc(text, is_query))
        for line, text in enumerate(slow_lines(data), start=1)
        if text.strip()
    ]

    def read(on_fault: Any) -> Iterator[Record | None]:
        return raw.queries("train", NUM_LABELS, on_fault) if is_query else raw.labels(on_fault)

    return _hold_records(read, folder / name, expected, is_query)


def check_jsonl(data: bytes, folder: Path, is_query: bool) -> bool:
    """Checks `queries.jsonl` or `labels.jsonl`."""
    files = {
        "labels.jsonl": json_lines(label_rows()),
        "queries.jsonl": json_lines(query_rows()),
    }
    name = "queries.jsonl" if is_query else "labels.jsonl"
    put(folder, {**files, name: data})
    raw = recognise(folder)
    expected = [
        (line, slow_row(slow_json(text), is_query))
        for line, text in enumerate(slow_lines(data), start=1)
        if text.strip()
    ]

    def read(on_fault: Any) -> Iterator[Record | None]:
        return raw.queries("train", NUM_LABELS, on_fault) if is_query else raw.labels(on_fault)

    return _hold_records(read, folder / name, expected, is_query)


def check_parquet(data: bytes, folder: Path) -> bool:
    """Checks `queries.parquet`."""
    put(folder, {"labels.jsonl": json_lines(label_rows()), "queries.parquet": data})
    raw = recognise(folder)
    faults: list[LineError] = []
    try:
        rows = pa.parquet.read_table(io.BytesIO(data), columns=["id", "text", "labels"]).to_pylist()
        expected = [(n, slow_row(row, True)) for n, row in enumerate(rows, start=1)]
    except Exception:  # Arrow's, of many kinds
        expected = None
    try:
        list(raw.queries("train", NUM_LABELS, faults.append))
    except CorpusError as error:
        _require_named(error, folder / "queries.parquet")
        return False
    assert expected is not None

    def read(on_fault: Any) -> Iterator[Record | None]:
        return raw.queries("train", NUM_LABELS, on_fault)

    return _hold_records(read, folder / "queries.parquet", expected, True)


def check_texts(data: bytes, folder: Path, is_query: bool) -> bool:
    """Checks `trn_X.txt` or `Y.txt`."""
    files = {
        "Y.txt": LABEL_TEXTS,
        "trn_X.txt": TEXTS,
        "tst_X.txt": TEXTS,
        "trn_X_Y.txt": SPARSE,
        "tst_X_Y.txt": SPARSE,
    }
    name = "trn_X.txt" if is_query else "Y.txt"
    put(folder, {**files, name: data})
    raw = recognise(folder)
    expected = [
        (n + 1, slow_text(text, n, SPARSE_ROWS if is_query else None))
        for n, text in enumerate(slow_lines(data))
    ]

    def read(on_fault: Any) -> Iterator[Record | None]:
        return raw.queries("train", NUM_LABELS, on_fault) if is_query else raw.labels(on_fault)

    if is_query and len(expected) != QUERIES:
        try:
            list(read(lambda fault: None))
        except CorpusError as error:
            assert "more rows than" in str(error), error
            assert re.search(r"trn_X(_Y)?\.txt:\d+: ", str(error)), error
            return False
        raise AssertionError("files of different lengths were accepted")
    return _hold_records(read, folder / name, expected, is_query)


def check_gzip(data: bytes, folder: Path) -> bool:
    """Checks `lbl.json.gz`."""
    path = folder / "lbl.json.gz"
    put(
        folder,
        {"trn.json": xmc_queries_file(), "tst.json": xmc_queries_file(), "lbl.json.gz": data},
    )
    raw = recognise(folder)
    try:
        unpacked = gzip.decompress(data) if data else None
    except Exception:  # gzip and zlib each have their own
        unpacked = None
    if unpacked is not None:
        lines = enumerate(slow_lines(unpacked), start=1)
        expected = [(line, slow_xmc(text, False)) for line, text in lines if text.strip()]
        return _hold_records(raw.labels, path, expected, False)
    _require_refused(lambda: list(raw.labels(lambda fault: None)), path)
    _require_refused(lambda: raw.count("labels"), path)
    return False


def _require_refused(read: Callable[[], object], path: Path) -> None:
    try:
        read()
    except CorpusError as error:
        _require_named(error, path)
    else:
        raise AssertionError("a damaged gzip file was accepted")


def check_matrix(data: bytes, path: Path, expected: Any) -> bool:
    """Checks positives against what a slow reader found in them."""
    path.write_bytes(data)
    faults: list[LineError] = []
    try:
        matrix = SparseMatrixFile(path)
        rows = list(matrix.rows(faults.append))
    except CorpusError as error:
        _require_named(error, path)
        assert expected == BAD or path.suffix == ".npz", error
        return False
    assert expected != BAD
    assert (matrix.num_rows, matrix.num_columns) == expected[:2]
    found = [
        BAD if row is None else list(zip(row.columns, row.values, strict=True)) for row in rows
    ]
    assert found == [row for _, row in expected[2]]
    assert [fault.line for fault in faults] == [line for line, row in expected[2] if row == BAD]
    try:
        assert list(matrix) == rows
    except LineError as error:
        assert error.line == faults[0].line
        return False
    assert not faults
    return True


def check_filter(data: bytes, folder: Path) -> bool:
    """Checks filter pairs."""
    path = folder / "filter_labels_train.txt"
    path.write_bytes(data)
    expected, bad_lines = [], []
    for line, raw in enumerate(slow_lines(data), start=1):
        try:
            pair = [slow_integer(field) for field in raw.decode("ascii").split()]
        except UnicodeDecodeError:
            pair = [None]
        if not raw.strip():
            continue
        if (
            len(pair) == 2
            and None not in pair
            and 0 <= pair[0] < QUERIES
            and 0 <= pair[1] < NUM_LABELS
        ):
            expected.append(tuple(pair))
        else:
            bad_lines.append(line)
    faults: list[LineError] = []
    rows, columns = read_pairs(path, QUERIES, NUM_LABELS, faults.append)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
    assert [fault.line for fault in faults] == bad_lines
    try:
        read_pairs(path, QUERIES, NUM_LABELS)
    except LineError as error:
        assert error.line == bad_lines[0]
        _require_named(error, path)
        return False
    assert not bad_lines
    return True


def check_predictions(data: bytes, folder: Path) -> bool:
    """Checks the predictions of `unidec-ds score`."""
    put(folder, {"truth.txt": SPARSE, "train.txt": TRAIN, "filter.txt": FILTER})
    path = folder / "predictions.txt"
    path.write_bytes(data)
    expected = slow_sparse(data)
    good = expected != BAD and expected[:2] == (QUERIES, NUM_LABELS)
    good = good and all(
        row != BAD and len({label for label, _ in row}) == len(row) for _, row in expected[2]
    )
    try:
        found = read_predictions(path, 2, num_queries=QUERIES, num_labels=NUM_LABELS)
    except UserError as error:
        _require_named(error, path)
        assert not good, error
        return False
    assert good
    best = [
        [label for label, _ in sorted(row, key=lambda entry: (-entry[1], entry[0]))][:2]
        for _, row in expected[2]
    ]
    assert found.tolist() == [row + [-1] * (2 - len(row)) for row in best]
    scores = score_files(
        folder / "truth.txt",
        path,
        folder / "train.txt",
        filter_pairs=folder / "filter.txt",
        propensity=(0.55, 1.5),
        ks=(1, 2),
    )
    truth = [{0, 3}, set(), {2}]
    filtered = {(0, 1), (2, 3), (1, 0)}
    hits = 0
    for query, (_, row) in enumerate(expected[2]):
        ranked = sorted(row, key=lambda entry: (-entry[1], entry[0]))
        left = [label for label, _ in ranked if (query, label) not in filtered]
        hits += len(truth[query] & set(left[:2]))
    assert math.isclose(scores["P@2"], 100 * hits / (2 * QUERIES)), scores
    return True


def check_truth(data: bytes, folder: Path) -> bool:
    """Any truth that is accepted can be scored."""
    put(folder, {"predictions.txt": PREDICTIONS, "train.txt": TRAIN, "truth.txt": data})
    expected = slow_sparse(data)
    try:
        scores = score_files(
            *(folder / f"{name}.txt" for name in ("truth", "predictions", "train")),
            propensity=(0.55, 1.5),
            ks=(1,),
        )
    except UserError as error:
        assert re.search(r"\.txt(:\d+)?: ", str(error)), error
        return False
    assert scores["num_queries"] == expected[0]
    assert all(math.isfinite(value) for value in scores.values()), scores
    first = [3, 0, 1]  # the best of PREDICTIONS
    hits = sum(
        any(label == first[query] and value != 0 for label, value in row)
        for query, (_, row) in enumerate(expected[2])
    )
    assert math.isclose(scores["P@1"], 100 * hits / QUERIES), scores
    return True
