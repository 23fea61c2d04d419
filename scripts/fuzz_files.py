"""Whole files of every kind that `fuzz.py` breaks: small, and accepted as they are."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import scipy.sparse
from safetensors.numpy import save as safetensors_bytes

from unidec_ds.manifest import ENCODER_FILE, rows_file


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    """Returns one JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def xmc_queries_file() -> bytes:
    """Returns a `trn.json`."""
    rows = [
        {"uid": "a", "title": "red car", "target_ind": [0, 3], "target_rel": [1.0, 0]},
        {"uid": 7, "title": "", "content": "blue", "target_ind": [1, 1]},
        {"uid": "café", "title": "東京", "target_ind": [], "target_rel": []},
    ]  # fmt: skip
    return json_lines(rows)


def xmc_labels_file() -> bytes:
    """Returns an `lbl.json`."""
    rows = [{"uid": str(n), "title": title} for n, title in enumerate(["red", "blue", "", "a b"])]
    rows[1]["content"] = "small house"
    return json_lines(rows)


def query_rows() -> list[dict[str, Any]]:
    """Returns the queries of the own layout."""
    return [
        {"id": "q1", "text": "red car", "labels": ["x", "7"]},
        {"id": "q2", "text": "blue", "labels": []},
        {"id": "q3", "text": "old house", "labels": ["y", "x", "x"]},
    ]


def label_rows() -> list[dict[str, Any]]:
    """Returns the labels of the own layout."""
    return [{"id": i, "text": t} for i, t in (("x", "red"), ("7", None), ("y", "a b"), ("z", ""))]


TEXTS = "red car\nblue \n東京 old\n".encode()
LABEL_TEXTS = b"red\n\nblue\nsmall old house\n"
SPARSE = b"3 4\n0:1.0 3:2.5\n\n2:1 1:0 2:1\n"
SPARSE_ROWS = [[0, 3], [], [2, 1, 2]]
FILTER = b"0 1\n2 3\n\n1 0\n"
PREDICTIONS = b"3 4\n3:0.9 1:0.5 0:0.1\n0:1 1:1 2:0\n2:0.25 1:7.5e-1\n"
TRAIN = b"5 4\n0:1\n1:1 2:1\n1:1\n1:1 3:1\n3:1\n"


def npz_file() -> bytes:
    """Returns a `Y.trn.npz`."""
    stream = io.BytesIO()
    matrix = scipy.sparse.csr_matrix(
        (np.array([1, 2.5, 1, 0, 1], np.float32), np.array([0, 3, 2, 1, 2]), [0, 2, 2, 5]), (3, 4)
    )
    scipy.sparse.save_npz(stream, matrix, compressed=False)
    return stream.getvalue()


def parquet_file() -> bytes:
    """Returns a `queries.parquet`."""
    stream = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(query_rows()), stream)
    return stream.getvalue()


def recipe_file() -> bytes:
    """Returns a recipe."""
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


def ds_config_file() -> bytes:
    """Returns a ds_config."""
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


TENSORS = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float16)}
SAFETENSORS = {
    ENCODER_FILE: safetensors_bytes(TENSORS),
    rows_file(0, 1): safetensors_bytes({"rows": np.ones((4, 2), np.float32)}),
}


def manifest_file(files: dict[str, bytes]) -> bytes:
    """Returns the manifest of a checkpoint with these files."""
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


def shortlists_file() -> bytes:
    """Returns shortlists of two queries."""
    stream = io.BytesIO()
    np.save(stream, np.array([[0, 2], [1, -1]], np.int32))
    return stream.getvalue()


MINED = {
    "clusters": False,
    "seconds": {"embed_s": 1.0, "search_s": 1.0, "cluster_s": 0.0},
    "texts": {"encoded": 3, "reused": 0},
    "recall": 1.0,
}


def put(folder: Path, files: dict[str, bytes]) -> None:
    """Writes files into a folder."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
