"""What `fuzz.py` and tests/test_fuzz.py throw broken input at, and what must hold then.

A target is one kind of file. Its `check` writes the bytes into a folder beside whole files of the
other kinds, lets the package read them, and reads them once more in the slowest, most obvious way.
What must hold:

- the package and the slow reader agree on what is accepted, and on every value and count in it;
- what is not accepted raises a `UserError` that names the file, and the line where there is one;
- of a corpus file, the lines put aside are exactly those that the slow reader calls bad.

`check` returns whether the input was accepted; an AssertionError or any other exception is a fault
of the package. The whole files are in `fuzz_files.py`, the slow readers in `fuzz_readers.py`.
"""

# ruff: noqa: PT017  (an error that names the wrong line is a finding, no test's expectation)

from __future__ import annotations

import gzip
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from fuzz_files import (
    FILTER,
    LABEL_TEXTS,
    MINED,
    PREDICTIONS,
    SAFETENSORS,
    SPARSE,
    SPARSE_ROWS,
    TENSORS,
    TEXTS,
    TRAIN,
    ds_config_file,
    json_lines,
    label_rows,
    manifest_file,
    npz_file,
    parquet_file,
    query_rows,
    recipe_file,
    shortlists_file,
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
    slow_npz,
    slow_row,
    slow_sparse,
    slow_text,
    slow_xmc,
)
from ruamel.yaml import YAML

from unidec_ds.config import load_recipe, write_recipe
from unidec_ds.data.files import LineError, refuse
from unidec_ds.data.formats import recognise
from unidec_ds.data.matrices import SparseMatrixFile, read_pairs
from unidec_ds.data.predictions import read_predictions, score_files
from unidec_ds.data.records import Record
from unidec_ds.ds_config import load_ds_config
from unidec_ds.errors import ConfigError, CorpusError, UserError
from unidec_ds.manifest import ENCODER_FILE, load_tensors, read_manifest, rows_file
from unidec_ds.mining.mined import open_mined


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Args:
        name: what to call it.
        seeds: whole, accepted files.
        check: takes the bytes and an existing folder; see the module.
    """

    name: str
    seeds: Callable[[], list[bytes]]
    check: Callable[[bytes, Path], bool]


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


def _put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _check_xmc(data: bytes, folder: Path, is_query: bool) -> bool:
    files = {
        "lbl.json": xmc_labels_file(),
        "trn.json": xmc_queries_file(),
        "tst.json": xmc_queries_file(),
    }
    name = "trn.json" if is_query else "lbl.json"
    _put(folder, {**files, name: data})
    raw = recognise(folder)
    expected = [
        (line, slow_xmc(text, is_query))
        for line, text in enumerate(slow_lines(data), start=1)
        if text.strip()
    ]

    def read(on_fault: Any) -> Iterator[Record | None]:
        return raw.queries("train", NUM_LABELS, on_fault) if is_query else raw.labels(on_fault)

    return _hold_records(read, folder / name, expected, is_query)


def _check_jsonl(data: bytes, folder: Path, is_query: bool) -> bool:
    files = {
        "labels.jsonl": json_lines(label_rows()),
        "queries.jsonl": json_lines(query_rows()),
    }
    name = "queries.jsonl" if is_query else "labels.jsonl"
    _put(folder, {**files, name: data})
    raw = recognise(folder)
    expected = [
        (line, slow_row(slow_json(text), is_query))
        for line, text in enumerate(slow_lines(data), start=1)
        if text.strip()
    ]

    def read(on_fault: Any) -> Iterator[Record | None]:
        return raw.queries("train", NUM_LABELS, on_fault) if is_query else raw.labels(on_fault)

    return _hold_records(read, folder / name, expected, is_query)


def _check_parquet(data: bytes, folder: Path) -> bool:
    _put(folder, {"labels.jsonl": json_lines(label_rows()), "queries.parquet": data})
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


def _check_texts(data: bytes, folder: Path, is_query: bool) -> bool:
    files = {
        "Y.txt": LABEL_TEXTS,
        "trn_X.txt": TEXTS,
        "tst_X.txt": TEXTS,
        "trn_X_Y.txt": SPARSE,
        "tst_X_Y.txt": SPARSE,
    }
    name = "trn_X.txt" if is_query else "Y.txt"
    _put(folder, {**files, name: data})
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


def _check_gzip(data: bytes, folder: Path) -> bool:
    path = folder / "lbl.json.gz"
    _put(
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


def _check_matrix(data: bytes, path: Path, expected: Any) -> bool:
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


def _check_filter(data: bytes, folder: Path) -> bool:
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


def _check_predictions(data: bytes, folder: Path) -> bool:
    _put(folder, {"truth.txt": SPARSE, "train.txt": TRAIN, "filter.txt": FILTER})
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


def _check_truth(data: bytes, folder: Path) -> bool:
    """Any truth that is accepted can be scored."""
    _put(folder, {"predictions.txt": PREDICTIONS, "train.txt": TRAIN, "truth.txt": data})
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


def _check_recipe(data: bytes, folder: Path) -> bool:
    path = folder / "recipe.yaml"
    path.write_bytes(data)
    try:
        recipe = load_recipe(str(path))
    except UserError as error:
        assert str(path) in str(error)
        assert not isinstance(error, ConfigError) or error.faults
        return False
    values = recipe.as_yaml_object()
    for section, keys in YAML(typ="safe", pure=True).load(data.decode().lstrip("\ufeff")).items():
        for key, value in keys.items():
            assert values[section][key] == value, (section, key)
    write_recipe(recipe, folder / "again.yaml")
    assert load_recipe(str(folder / "again.yaml")) == recipe
    return True


def _check_ds_config(data: bytes, folder: Path) -> bool:
    path = folder / "ds_config.json"
    path.write_bytes(data)
    try:
        config = load_ds_config(path, batch_size=12, world_size=2)
    except UserError as error:
        assert str(path) in str(error)
        return False
    assert config.content == json.loads(data)
    assert config.zero_stage in (0, 1, 2)
    assert config.dtype in ("bf16", "fp32")
    assert config.offload.get("device", "none") in ("none", "cpu", "nvme")
    assert config.gradient_clipping >= 0
    assert config.for_engine(12, 2)["train_batch_size"] == 12
    return True


def _check_manifest(data: bytes, folder: Path) -> bool:
    _put(folder, {**SAFETENSORS, "manifest.json": data})
    try:
        manifest = read_manifest(folder)
        ranks = range(manifest["world_size"])
        names = [ENCODER_FILE, *(rows_file(r, len(ranks)) for r in ranks)]
        tensors = [load_tensors(folder, manifest, name) for name in names]
    except UserError as error:
        assert str(folder) in str(error)
        return False
    assert manifest == json.loads(data)
    assert sorted(tensors[0]) == sorted(TENSORS)
    assert all((tensors[0][name].numpy() == array).all() for name, array in TENSORS.items())
    return True


def _check_safetensors(data: bytes, folder: Path) -> bool:
    """A damaged file whose manifest says that it is right."""
    files = {**SAFETENSORS, ENCODER_FILE: data}
    _put(folder, {**files, "manifest.json": manifest_file(files)})
    try:
        manifest = read_manifest(folder)
        tensors = load_tensors(folder, manifest, ENCODER_FILE)
    except UserError as error:
        assert str(folder / ENCODER_FILE) in str(error)
        return False
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    assert {n: list(t.shape) for n, t in tensors.items()} == {
        name: entry["shape"] for name, entry in header.items()
    }
    for name, entry in header.items():
        begin, end = (8 + size + at for at in entry["data_offsets"])
        assert (
            tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
            == (data[begin:end])
        )
    return True


def _check_shortlists(data: bytes, folder: Path) -> bool:
    place = folder / "epoch-0001"
    place.mkdir(exist_ok=True)
    _put(place, {"shortlists.npy": data, "mined.json": json.dumps(MINED).encode()})
    try:
        mined = open_mined(folder, 1)
    except UserError as error:
        assert str(place) in str(error)
        return False
    assert mined.shortlists.dtype == np.int32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a header that Python 2 would have written
        assert np.array_equal(mined.shortlists, np.load(io.BytesIO(data)))
    return True


def _check_mined_record(data: bytes, folder: Path) -> bool:
    place = folder / "epoch-0001"
    place.mkdir(exist_ok=True)
    _put(place, {"shortlists.npy": shortlists_file(), "mined.json": data})
    try:
        mined = open_mined(folder, 1)
    except UserError as error:
        assert str(place) in str(error)
        return False
    figures = mined.figures()
    assert all(isinstance(value, (int, float)) for value in figures.values()), figures
    return True


TARGETS = {
    target.name: target
    for target in (
        Target("xmc-queries", lambda: [xmc_queries_file()], lambda d, f: _check_xmc(d, f, True)),
        Target("xmc-labels", lambda: [xmc_labels_file()], lambda d, f: _check_xmc(d, f, False)),
        Target("gzip", lambda: [gzip.compress(xmc_labels_file(), mtime=0)], _check_gzip),
        Target("text-queries", lambda: [TEXTS], lambda d, f: _check_texts(d, f, True)),
        Target("text-labels", lambda: [LABEL_TEXTS], lambda d, f: _check_texts(d, f, False)),
        Target(
            "sparse-text",
            lambda: [SPARSE, TRAIN],
            lambda d, f: _check_matrix(d, f / "trn_X_Y.txt", slow_sparse(d)),
        ),
        Target(
            "npz",
            lambda: [npz_file()],
            lambda d, f: _check_matrix(d, f / "Y.trn.npz", slow_npz(d)),
        ),
        Target("filter", lambda: [FILTER], _check_filter),
        Target(
            "jsonl-queries",
            lambda: [json_lines(query_rows())],
            lambda d, f: _check_jsonl(d, f, True),
        ),
        Target(
            "jsonl-labels",
            lambda: [json_lines(label_rows())],
            lambda d, f: _check_jsonl(d, f, False),
        ),
        Target("parquet", lambda: [parquet_file()], _check_parquet),
        Target("predictions", lambda: [PREDICTIONS], _check_predictions),
        Target("truth", lambda: [SPARSE], _check_truth),
        Target("recipe", lambda: [recipe_file()], _check_recipe),
        Target("ds-config", lambda: [ds_config_file()], _check_ds_config),
        Target("manifest", lambda: [manifest_file(SAFETENSORS)], _check_manifest),
        Target("safetensors", lambda: [SAFETENSORS[ENCODER_FILE]], _check_safetensors),
        Target("shortlists", lambda: [shortlists_file()], _check_shortlists),
        Target("mined", lambda: [json.dumps(MINED).encode()], _check_mined_record),
    )
}
