"""What `fuzz.py` and tests/test_fuzz.py throw broken input at, and what must hold then.

A target is one kind of file. Its `check` writes the bytes into a folder beside whole files of the
other kinds, lets the package read them, and reads them once more in the slowest, most obvious way.
What must hold:

- the package and the slow reader agree on what is accepted, and on every value and count in it;
- what is not accepted raises a `UserError` that names the file, and the line where there is one;
- of a corpus file, the lines put aside are exactly those that the slow reader calls bad.

`check` returns whether the input was accepted; an AssertionError or any other exception is a fault
of the package. The slow readers share no code with it.
"""

# ruff: noqa: PT017  (an error that names the wrong line is a finding, no test's expectation)

from __future__ import annotations

import gzip
import hashlib
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
import scipy.sparse
import torch
from ruamel.yaml import YAML
from safetensors.numpy import save as safetensors_bytes

from unidec_ds import checkpoint
from unidec_ds.config import load_recipe, write_recipe
from unidec_ds.data.files import LineError, refuse
from unidec_ds.data.formats import recognise
from unidec_ds.data.matrices import SparseMatrixFile, read_pairs
from unidec_ds.data.predictions import read_predictions, score_files
from unidec_ds.data.records import Record
from unidec_ds.ds_config import load_ds_config
from unidec_ds.errors import ConfigError, CorpusError, UserError
from unidec_ds.mining.mined import open_mined

BAD = "bad"
NUM_LABELS = 4
_QUERIES = 3


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


# ---------------------------------------------------------------------------- whole files


def _json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _xmc_queries() -> bytes:
    rows = [
        {"uid": "a", "title": "red car", "target_ind": [0, 3], "target_rel": [1.0, 0]},
        {"uid": 7, "title": "", "content": "blue", "target_ind": [1, 1]},
        {"uid": "café", "title": "東京", "target_ind": [], "target_rel": []},
    ]  # fmt: skip
    return _json_lines(rows)


def _xmc_labels() -> bytes:
    rows = [{"uid": str(n), "title": title} for n, title in enumerate(["red", "blue", "", "a b"])]
    rows[1]["content"] = "small house"
    return _json_lines(rows)


def _table_queries() -> list[dict[str, Any]]:
    return [
        {"id": "q1", "text": "red car", "labels": ["x", "7"]},
        {"id": "q2", "text": "blue", "labels": []},
        {"id": "q3", "text": "old house", "labels": ["y", "x", "x"]},
    ]


def _table_labels() -> list[dict[str, Any]]:
    return [{"id": i, "text": t} for i, t in (("x", "red"), ("7", None), ("y", "a b"), ("z", ""))]


_TEXTS = "red car\nblue \n東京 old\n".encode()
_LABEL_TEXTS = b"red\n\nblue\nsmall old house\n"
_SPARSE = b"3 4\n0:1.0 3:2.5\n\n2:1 1:0 2:1\n"
_SPARSE_ROWS = [[0, 3], [], [2, 1, 2]]
_FILTER = b"0 1\n2 3\n\n1 0\n"
_PREDICTIONS = b"3 4\n3:0.9 1:0.5 0:0.1\n0:1 1:1 2:0\n2:0.25 1:7.5e-1\n"
_TRAIN = b"5 4\n0:1\n1:1 2:1\n1:1\n1:1 3:1\n3:1\n"


def _npz() -> bytes:
    stream = io.BytesIO()
    matrix = scipy.sparse.csr_matrix(
        (np.array([1, 2.5, 1, 0, 1], np.float32), np.array([0, 3, 2, 1, 2]), [0, 2, 2, 5]), (3, 4)
    )
    scipy.sparse.save_npz(stream, matrix, compressed=False)
    return stream.getvalue()


def _parquet() -> bytes:
    stream = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(_table_queries()), stream)
    return stream.getvalue()


def _recipe() -> bytes:
    return b"""\
corpus: {path: raw, validation_fraction: 0.1}
encoder: {name: tiny, max_length: 8}
pool:
  size: 24
  num_positives: 2
objective: {de: decoupled, classifier: bce, l2q: true}
optimizer: {encoder_lr: 1e-3, weight_decay: 0.01}
evaluation:
  propensity: [0.55, 1.5]
train:
  batch_size: 12  # global
  epochs: 3
"""


def _ds_config() -> bytes:
    content = {
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "train_batch_size": "auto",
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "nvme", "nvme_path": "/d"},
        },
        "aio": {"block_size": 1048576},
    }  # fmt: skip
    return json.dumps(content, indent=2).encode()


_TENSORS = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float16)}
_SAFETENSORS = {
    checkpoint.ENCODER_FILE: safetensors_bytes(_TENSORS),
    checkpoint.rows_file(0, 1): safetensors_bytes({"rows": np.ones((4, 2), np.float32)}),
}


def _manifest(files: dict[str, bytes]) -> bytes:
    manifest = {
        "format_version": 1,
        "step": 3,
        "world_size": 1,
        "num_labels": 4,
        "width": 2,
        "corpus_fingerprint": "ab",
        "total_steps": 9,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
    }
    return json.dumps(manifest, indent=2).encode()


def _shortlists() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([[0, 2], [1, -1]], np.int32))
    return stream.getvalue()


_MINED = {
    "clusters": False,
    "seconds": {"embed_s": 1.0, "search_s": 1.0, "cluster_s": 0.0},
    "texts": {"encoded": 3, "reused": 0},
    "recall": 1.0,
}


# ---------------------------------------------------------------------------- slow readers


def _lines(data: bytes) -> list[bytes]:
    """Every line, without its end and without a byte order mark."""
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    return [line.rstrip(b"\r\n") for line in lines]


def _slow_json(raw: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(raw.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _is_text(value: object) -> bool:
    if not isinstance(value, str):
        return False
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in value)


def _is_uid(value: object) -> bool:
    return _is_text(value) or (isinstance(value, int) and not isinstance(value, bool))


def _slow_texts(row: dict[str, Any], keys: tuple[str, ...]) -> list[str] | None:
    texts = ["" if row.get(key) is None else row[key] for key in keys]
    return [text.strip() for text in texts] if all(map(_is_text, texts)) else None


def _slow_xmc(raw: bytes, is_query: bool) -> Any:
    row = _slow_json(raw)
    if row is None or "title" not in row or not _is_uid(row.get("uid")):
        return BAD
    texts = _slow_texts(row, ("title", "content"))
    if texts is None:
        return BAD
    if not is_query:
        return (str(row["uid"]), *texts)
    targets, relevances = row.get("target_ind"), row.get("target_rel")
    if texts == ["", ""] or not isinstance(targets, list):
        return BAD
    if relevances is None:
        relevances = [1] * len(targets)
    if not isinstance(relevances, list) or len(relevances) != len(targets):
        return BAD
    kept = []
    for target, relevance in zip(targets, relevances, strict=True):
        if type(relevance) not in (int, float) or relevance != relevance:
            return BAD
        if type(target) is not int:
            return BAD
        if relevance != 0:
            kept.append(target)
    # A label of relevance 0 is left out, whatever its row.
    if not all(0 <= target < NUM_LABELS for target in kept):
        return BAD
    return (str(row["uid"]), *texts, tuple(kept), len(targets) - len(kept))


def _slow_row(row: dict[str, Any] | None, is_query: bool) -> Any:
    if row is None or not _is_uid(row.get("id")):
        return BAD
    if is_query and ("text" not in row or not isinstance(row.get("labels"), list)):
        return BAD
    texts = _slow_texts(row, ("text",))
    if texts is None or (is_query and texts == [""]):
        return BAD
    if not is_query:
        return (str(row["id"]), texts[0], "")
    if not all(map(_is_uid, row["labels"])):
        return BAD
    return (str(row["id"]), texts[0], "", tuple(map(str, row["labels"])), 0)


def _slow_text(raw: bytes, row: int, targets: list[list[int]] | None) -> Any:
    try:
        text = raw.decode().strip()
    except UnicodeDecodeError:
        return BAD
    if targets is None:
        return (str(row), text, "")
    if not text:
        return BAD
    entries = [{0: 1.0, 3: 2.5}, {}, {2: 1, 1: 0}][row] if row < _QUERIES else {}
    kept = tuple(t for t in targets[row] if entries[t]) if row < _QUERIES else ()
    return (str(row), text, "", kept, len(targets[row]) - len(kept) if row < _QUERIES else 0)


_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(inf|infinity)", re.I)


def _slow_integer(text: str) -> int | None:
    return int(text) if _INTEGER.fullmatch(text) and len(text) < 4300 else None


def _slow_sparse(data: bytes) -> Any:
    """(rows, columns, [(line, [(label, value)] or BAD)]), or BAD for the file as a whole."""
    lines = _lines(data)
    try:
        header = [_slow_integer(f) for f in lines[0].decode("ascii").split()] if lines else []
    except UnicodeDecodeError:
        return BAD
    if len(header) != 2 or None in header or min(header) < 0 or header[1] >= 2**31:
        return BAD
    num_rows, num_columns = header
    while len(lines) - 1 > num_rows and not lines[-1].strip():
        lines.pop()
    if len(lines) - 1 != num_rows:
        return BAD
    rows: list[tuple[int, Any]] = []
    for line, raw in enumerate(lines[1:], start=2):
        row: Any = []
        try:
            entries = raw.decode("ascii").split()
        except UnicodeDecodeError:
            entries = [BAD]
        for entry in entries:
            label, colon, value = entry.partition(":")
            column = _slow_integer(label)
            if (
                not colon
                or column is None
                or not 0 <= column < num_columns
                or not _NUMBER.fullmatch(value)
            ):
                row = BAD
            if row == BAD:
                break
            row.append((column, float(value)))
        rows.append((line, row))
    return num_rows, num_columns, rows


def _slow_npz(data: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            matrix = scipy.sparse.load_npz(io.BytesIO(data))
        except Exception:  # scipy, zipfile and NumPy each have their own
            return BAD
    if matrix.format != "csr" or matrix.indptr.dtype.kind not in "iu":
        return BAD
    columns, values = matrix.indices.tolist(), matrix.data.tolist()
    bounds = matrix.indptr.tolist()
    rows: list[tuple[int, Any]] = []
    for row in range(matrix.shape[0]):
        part = slice(bounds[row], bounds[row + 1])
        row_entries = list(zip(columns[part], values[part], strict=True))
        bad = any(not 0 <= c < matrix.shape[1] or v != v for c, v in row_entries)
        rows.append((row + 1, BAD if bad else row_entries))
    return (*matrix.shape, rows)


# ---------------------------------------------------------------------------- what must hold


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
    files = {"lbl.json": _xmc_labels(), "trn.json": _xmc_queries(), "tst.json": _xmc_queries()}
    name = "trn.json" if is_query else "lbl.json"
    _put(folder, {**files, name: data})
    raw = recognise(folder)
    expected = [
        (line, _slow_xmc(text, is_query))
        for line, text in enumerate(_lines(data), start=1)
        if text.strip()
    ]

    def read(on_fault: Any) -> Iterator[Record | None]:
        return raw.queries("train", NUM_LABELS, on_fault) if is_query else raw.labels(on_fault)

    return _hold_records(read, folder / name, expected, is_query)


def _check_jsonl(data: bytes, folder: Path, is_query: bool) -> bool:
    files = {
        "labels.jsonl": _json_lines(_table_labels()),
        "queries.jsonl": _json_lines(_table_queries()),
    }
    name = "queries.jsonl" if is_query else "labels.jsonl"
    _put(folder, {**files, name: data})
    raw = recognise(folder)
    expected = [
        (line, _slow_row(_slow_json(text), is_query))
        for line, text in enumerate(_lines(data), start=1)
        if text.strip()
    ]

    def read(on_fault: Any) -> Iterator[Record | None]:
        return raw.queries("train", NUM_LABELS, on_fault) if is_query else raw.labels(on_fault)

    return _hold_records(read, folder / name, expected, is_query)


def _check_parquet(data: bytes, folder: Path) -> bool:
    _put(folder, {"labels.jsonl": _json_lines(_table_labels()), "queries.parquet": data})
    raw = recognise(folder)
    faults: list[LineError] = []
    try:
        rows = pa.parquet.read_table(io.BytesIO(data), columns=["id", "text", "labels"]).to_pylist()
        expected = [(n, _slow_row(row, True)) for n, row in enumerate(rows, start=1)]
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
        "Y.txt": _LABEL_TEXTS,
        "trn_X.txt": _TEXTS,
        "tst_X.txt": _TEXTS,
        "trn_X_Y.txt": _SPARSE,
        "tst_X_Y.txt": _SPARSE,
    }
    name = "trn_X.txt" if is_query else "Y.txt"
    _put(folder, {**files, name: data})
    raw = recognise(folder)
    expected = [
        (n + 1, _slow_text(text, n, _SPARSE_ROWS if is_query else None))
        for n, text in enumerate(_lines(data))
    ]

    def read(on_fault: Any) -> Iterator[Record | None]:
        return raw.queries("train", NUM_LABELS, on_fault) if is_query else raw.labels(on_fault)

    if is_query and len(expected) != _QUERIES:
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
    _put(folder, {"trn.json": _xmc_queries(), "tst.json": _xmc_queries(), "lbl.json.gz": data})
    raw = recognise(folder)
    try:
        unpacked = gzip.decompress(data) if data else None
    except Exception:  # gzip and zlib each have their own
        unpacked = None
    if unpacked is not None:
        lines = enumerate(_lines(unpacked), start=1)
        expected = [(line, _slow_xmc(text, False)) for line, text in lines if text.strip()]
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
    for line, raw in enumerate(_lines(data), start=1):
        try:
            pair = [_slow_integer(field) for field in raw.decode("ascii").split()]
        except UnicodeDecodeError:
            pair = [None]
        if not raw.strip():
            continue
        if (
            len(pair) == 2
            and None not in pair
            and 0 <= pair[0] < _QUERIES
            and 0 <= pair[1] < NUM_LABELS
        ):
            expected.append(tuple(pair))
        else:
            bad_lines.append(line)
    faults: list[LineError] = []
    rows, columns = read_pairs(path, _QUERIES, NUM_LABELS, faults.append)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
    assert [fault.line for fault in faults] == bad_lines
    try:
        read_pairs(path, _QUERIES, NUM_LABELS)
    except LineError as error:
        assert error.line == bad_lines[0]
        _require_named(error, path)
        return False
    assert not bad_lines
    return True


def _check_predictions(data: bytes, folder: Path) -> bool:
    _put(folder, {"truth.txt": _SPARSE, "train.txt": _TRAIN, "filter.txt": _FILTER})
    path = folder / "predictions.txt"
    path.write_bytes(data)
    expected = _slow_sparse(data)
    good = expected != BAD and expected[:2] == (_QUERIES, NUM_LABELS)
    good = good and all(
        row != BAD and len({label for label, _ in row}) == len(row) for _, row in expected[2]
    )
    try:
        found = read_predictions(path, 2, num_queries=_QUERIES, num_labels=NUM_LABELS)
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
    assert math.isclose(scores["P@2"], 100 * hits / (2 * _QUERIES)), scores
    return True


def _check_truth(data: bytes, folder: Path) -> bool:
    """Any truth that is accepted can be scored."""
    _put(folder, {"predictions.txt": _PREDICTIONS, "train.txt": _TRAIN, "truth.txt": data})
    expected = _slow_sparse(data)
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
    first = [3, 0, 1]  # the best of _PREDICTIONS
    hits = sum(
        any(label == first[query] and value != 0 for label, value in row)
        for query, (_, row) in enumerate(expected[2])
    )
    assert math.isclose(scores["P@1"], 100 * hits / _QUERIES), scores
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
    _put(folder, {**_SAFETENSORS, "manifest.json": data})
    try:
        manifest = checkpoint.read_manifest(folder)
        ranks = range(manifest["world_size"])
        names = [checkpoint.ENCODER_FILE, *(checkpoint.rows_file(r, len(ranks)) for r in ranks)]
        tensors = [checkpoint.load_tensors(folder, manifest, name) for name in names]
    except UserError as error:
        assert str(folder) in str(error)
        return False
    assert manifest == json.loads(data)
    assert sorted(tensors[0]) == sorted(_TENSORS)
    assert all((tensors[0][name].numpy() == array).all() for name, array in _TENSORS.items())
    return True


def _check_safetensors(data: bytes, folder: Path) -> bool:
    """A damaged file whose manifest says that it is right."""
    files = {**_SAFETENSORS, checkpoint.ENCODER_FILE: data}
    _put(folder, {**files, "manifest.json": _manifest(files)})
    try:
        manifest = checkpoint.read_manifest(folder)
        tensors = checkpoint.load_tensors(folder, manifest, checkpoint.ENCODER_FILE)
    except UserError as error:
        assert str(folder / checkpoint.ENCODER_FILE) in str(error)
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
    _put(place, {"shortlists.npy": data, "mined.json": json.dumps(_MINED).encode()})
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
    _put(place, {"shortlists.npy": _shortlists(), "mined.json": data})
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
        Target("xmc-queries", lambda: [_xmc_queries()], lambda d, f: _check_xmc(d, f, True)),
        Target("xmc-labels", lambda: [_xmc_labels()], lambda d, f: _check_xmc(d, f, False)),
        Target("gzip", lambda: [gzip.compress(_xmc_labels(), mtime=0)], _check_gzip),
        Target("text-queries", lambda: [_TEXTS], lambda d, f: _check_texts(d, f, True)),
        Target("text-labels", lambda: [_LABEL_TEXTS], lambda d, f: _check_texts(d, f, False)),
        Target(
            "sparse-text",
            lambda: [_SPARSE, _TRAIN],
            lambda d, f: _check_matrix(d, f / "trn_X_Y.txt", _slow_sparse(d)),
        ),
        Target(
            "npz",
            lambda: [_npz()],
            lambda d, f: _check_matrix(d, f / "Y.trn.npz", _slow_npz(d)),
        ),
        Target("filter", lambda: [_FILTER], _check_filter),
        Target(
            "jsonl-queries",
            lambda: [_json_lines(_table_queries())],
            lambda d, f: _check_jsonl(d, f, True),
        ),
        Target(
            "jsonl-labels",
            lambda: [_json_lines(_table_labels())],
            lambda d, f: _check_jsonl(d, f, False),
        ),
        Target("parquet", lambda: [_parquet()], _check_parquet),
        Target("predictions", lambda: [_PREDICTIONS], _check_predictions),
        Target("truth", lambda: [_SPARSE], _check_truth),
        Target("recipe", lambda: [_recipe()], _check_recipe),
        Target("ds-config", lambda: [_ds_config()], _check_ds_config),
        Target("manifest", lambda: [_manifest(_SAFETENSORS)], _check_manifest),
        Target("safetensors", lambda: [_SAFETENSORS[checkpoint.ENCODER_FILE]], _check_safetensors),
        Target("shortlists", lambda: [_shortlists()], _check_shortlists),
        Target("mined", lambda: [json.dumps(_MINED).encode()], _check_mined_record),
    )
}
