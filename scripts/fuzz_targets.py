"""What `fuzz.py` and tests/test_fuzz.py throw broken input at, and what must hold then.

A target is one kind of file. Its `check` writes the bytes into a folder beside whole files of the
other kinds, lets the package read them, and reads them once more in the slowest, most obvious way.
What must hold:

- the package and the slow reader agree on what is accepted, and on every value and count in it;
- what is not accepted raises a `UserError` that names the file, and the line where there is one;
- of a corpus file, the lines put aside are exactly those that the slow reader calls bad.

`check` returns whether the input was accepted; an AssertionError or any other exception is a fault
of the package. The checks are in `fuzz_corpus.py` and
`fuzz_run.py`, the whole files in `fuzz_files.py`, the slow readers in `fuzz_readers.py`. Of Parquet
and npz, what is refused is not compared: their libraries refuse more than a plain reader does.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz_corpus import (
    check_filter,
    check_gzip,
    check_jsonl,
    check_matrix,
    check_parquet,
    check_predictions,
    check_texts,
    check_truth,
    check_xmc,
)
from fuzz_files import (
    FILTER,
    LABEL_TEXTS,
    MINED,
    PREDICTIONS,
    SAFETENSORS,
    SPARSE,
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
    slow_npz,
    slow_sparse,
)
from fuzz_run import (
    check_ds_config,
    check_manifest,
    check_mined_record,
    check_recipe,
    check_safetensors,
    check_shortlists,
)

from unidec_ds.manifest import ENCODER_FILE


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


TARGETS = {
    target.name: target
    for target in (
        Target("xmc-queries", lambda: [xmc_queries_file()], lambda d, f: check_xmc(d, f, True)),
        Target("xmc-labels", lambda: [xmc_labels_file()], lambda d, f: check_xmc(d, f, False)),
        Target("gzip", lambda: [gzip.compress(xmc_labels_file(), mtime=0)], check_gzip),
        Target("text-queries", lambda: [TEXTS], lambda d, f: check_texts(d, f, True)),
        Target("text-labels", lambda: [LABEL_TEXTS], lambda d, f: check_texts(d, f, False)),
        Target(
            "sparse-text",
            lambda: [SPARSE, TRAIN],
            lambda d, f: check_matrix(d, f / "trn_X_Y.txt", slow_sparse(d)),
        ),
        Target(
            "npz",
            lambda: [npz_file()],
            lambda d, f: check_matrix(d, f / "Y.trn.npz", slow_npz(d)),
        ),
        Target("filter", lambda: [FILTER], check_filter),
        Target(
            "jsonl-queries",
            lambda: [json_lines(query_rows())],
            lambda d, f: check_jsonl(d, f, True),
        ),
        Target(
            "jsonl-labels",
            lambda: [json_lines(label_rows())],
            lambda d, f: check_jsonl(d, f, False),
        ),
        Target("parquet", lambda: [parquet_file()], check_parquet),
        Target("predictions", lambda: [PREDICTIONS], check_predictions),
        Target("truth", lambda: [SPARSE], check_truth),
        Target("recipe", lambda: [recipe_file()], check_recipe),
        Target("ds-config", lambda: [ds_config_file()], check_ds_config),
        Target("manifest", lambda: [manifest_file(SAFETENSORS)], check_manifest),
        Target("safetensors", lambda: [SAFETENSORS[ENCODER_FILE]], check_safetensors),
        Target("shortlists", lambda: [shortlists_file()], check_shortlists),
        Target("mined", lambda: [json.dumps(MINED).encode()], check_mined_record),
    )
}
