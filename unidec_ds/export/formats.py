"""Turns a trained run into files that others use without this package.

    sentence-transformers   OUT/ is the dual encoder; SentenceTransformer(OUT) loads it
    faiss                   OUT/index.faiss         the labels of a view, FAISS; row = label_id
                            OUT/labels.parquet      id, uid, text of every label
                            OUT/query_encoder/      see `sentence_encoder`
    vectors                 OUT/label_vectors.npy   the same labels as an array, fp32 or fp16
                            OUT/ids.parquet         as labels.parquet
                            OUT/query_encoder/

and in each README.md, a model card whose code makes query vectors and asks the first question;
export.json, from what it was made; and the corpus's licence, if it has one.

OUT appears when it is whole (`export.folder`).

Cost: an encoder pass over the labels unless the run has their vectors already (`label_vectors`);
memory of one block of them, and of the index.
"""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from unidec_ds.assembly import LoadedRun, trained_views
from unidec_ds.errors import UserError
from unidec_ds.evaluation import SearchView
from unidec_ds.export.folder import RECORD, new_folder
from unidec_ds.export.labels import ExportLabels
from unidec_ds.export.model_card import CORPUS_LICENCE, corpus_licence, model_card
from unidec_ds.export.query_side import code_block, contents_of, hides_labels, write_query_side
from unidec_ds.export.sentence_encoder import write_sentence_encoder
from unidec_ds.index import (
    ApproximateKind,
    IndexConfig,
    build_index,
    chosen_kind,
    is_approximate,
    write_exact_index,
)
from unidec_ds.run import write_json
from unidec_ds.serving.label_search import open_label_search
from unidec_ds.serving.label_vectors import choose_view, expected_record, label_vectors
from unidec_ds.serving.new_labels import open_new_labels
from unidec_ds.settings import Settings

FORMAT_VERSION = 1

ExportFormat = Literal["sentence-transformers", "faiss", "vectors"]

_TAGS = ["unidec", "extreme-classification", "feature-extraction"]


# Of the code in the cards: how deep FAISS searches, and how it leaves out labels without a text.
_DEPTH = {"ivf": "nprobe", "hnsw": "hnsw.efSearch"}
_PARAMETERS = {
    "exact": "SearchParameters", "ivf": "SearchParametersIVF", "hnsw": "SearchParametersHNSW",
}  # fmt: skip
_WITH_TEXT = 'with_text = np.flatnonzero(np.array(labels["text"].to_pylist()) != "")'


class ExportConfig(Settings):
    """What to export, and how."""

    format: ExportFormat
    """`sentence-transformers`, `faiss` or `vectors`; see the module's docstring."""
    view: Literal["de", "classifier", "unified"] | None = None
    """Which vectors; None takes the best that the run trained. Of sentence-transformers: `de`."""
    index: IndexConfig = IndexConfig()
    """Of faiss: the kind of index and its settings."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Of vectors: how the array holds them."""
    new_labels: Path | None = None
    """Of faiss and vectors: labels that the run was not trained on, to be exported after its own;
    see `serving.new_labels`."""
    license_id: str | None = Field(default=None, min_length=1)
    """Licence of the exported model, such as `apache-2.0`; the card says `unknown` if None."""


def export_run(
    run: LoadedRun,
    out: Path,
    config: ExportConfig,
    *,
    overwrite: bool = False,
    show_progress: bool = True,
) -> None:
    """Writes an export of a run into the new folder `out`.

    Args:
        run: the run.
        out: where; made with its parents. May exist if it is empty.
        config: what to export.
        overwrite: replace an earlier export.
        show_progress: draw bars on standard error.

    Raises:
        UserError: `out` holds something, or cannot be written; or the run was not trained for
            what is wanted.
    """
    view = _view(run, config)
    labels = None
    if config.format != "sentence-transformers":
        labels = _labels(run, config, view, show_progress)
    try:
        with new_folder(out, overwrite) as folder:
            if labels is None:
                _write_dual_encoder(run, folder, config)
            elif config.format == "faiss":
                _write_faiss(run, folder, config, view, labels, show_progress)
            else:
                _write_vectors(run, folder, config, view, labels, show_progress)
            if (licence := corpus_licence(run)) is not None:
                shutil.copyfile(licence, folder / CORPUS_LICENCE)
            record = {"format_version": FORMAT_VERSION, "unidec_ds": metadata.version("unidec_ds")}
            record |= {"format": config.format, "made_from": expected_record(run, view)}
            record |= {"new_labels": labels.num_new if labels else 0}
            write_json(folder / RECORD, record)
    except OSError as error:
        raise UserError(
            f"--out: {out} cannot be written ({error}); choose another folder"
        ) from error


def _view(run: LoadedRun, config: ExportConfig) -> SearchView:
    if config.format != "sentence-transformers":
        return choose_view(run, config.view)
    if config.view not in (None, "de"):
        raise UserError(
            f"--view: {config.view} with --format sentence-transformers, which is the dual "
            "encoder; leave --view out, or use --format faiss or vectors: they hold the query "
            "encoder of the view"
        )
    if "de" not in trained_views(run.recipe):
        raise UserError(
            f"--format: {run.folder} trained a classifier only (objective.de: none), and "
            "sentence-transformers is for the dual encoder; use --format faiss or vectors"
        )
    return "de"


def _labels(
    run: LoadedRun, config: ExportConfig, view: SearchView, show_progress: bool
) -> ExportLabels:
    own = label_vectors(run, view, show_progress=show_progress)
    new = None
    if config.new_labels is not None:
        new = open_new_labels(run, view, config.new_labels, show_progress=show_progress)
    return ExportLabels(run.corpus, own, new)


def _write_dual_encoder(run: LoadedRun, folder: Path, config: ExportConfig) -> None:
    write_sentence_encoder(run.model, run.recipe.encoder, folder, "de")
    name = run.corpus.name
    card = model_card(
        run,
        title=f"Dual encoder for {name}",
        introduction=(
            f"Maps texts to vectors of width {run.model.width} and length 1. A query is close to "
            "the labels that are right for it. Queries and labels are encoded alike."
        ),
        usage=code_block(
            "from sentence_transformers import SentenceTransformer\n"
            "\n"
            'model = SentenceTransformer("PATH_OF_THIS_FOLDER")\n'
            'queries = model.encode(["a query"])\n'
            'labels = model.encode(["the text of a label", "another"])\n'
            "print(model.similarity(queries, labels))"
        ),
        header={
            "library_name": "sentence-transformers",
            "pipeline_tag": "sentence-similarity",
            "tags": ["sentence-transformers", "sentence-similarity", *_TAGS],
        },
        license_id=config.license_id,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_faiss(
    run: LoadedRun,
    folder: Path,
    config: ExportConfig,
    view: SearchView,
    labels: ExportLabels,
    show_progress: bool,
) -> None:
    path = folder / "index.faiss"
    kind = chosen_kind(config.index, labels.shape[0])
    searched, deep = "It compares with every vector.", ""
    if is_approximate(kind):
        found = _write_approximate(run, path, config.index, kind, view, labels, show_progress)
        knob = _DEPTH[kind]
        searched = (
            f"It is approximate: {found}; `index.{knob}` trades time for recall. "
            "`index.json` says what it was made from."
        )
        deep = f", {knob.removeprefix('hnsw.')}=index.{knob}"
    else:
        scratch = folder / "vectors.npy"
        write_exact_index(labels.array(scratch), path)
        scratch.unlink(missing_ok=True)
    search = "scores, ids = index.search(query_vectors(queries), 5)"
    if hidden := hides_labels(run, view):
        search = (
            f"{_WITH_TEXT}\n"
            f"chosen = faiss.{_PARAMETERS[kind]}(sel=faiss.IDSelectorBatch(with_text){deep})\n"
            "scores, ids = index.search(query_vectors(queries), 5, params=chosen)"
        )
    _write_table(labels, folder / "labels.parquet", show_progress)
    write_query_side(
        run,
        folder,
        view,
        labels,
        tags=[*_TAGS, config.format],
        license_id=config.license_id,
        title=f"FAISS index of {run.corpus.name}",
        introduction=(
            f"`index.faiss` holds {contents_of(labels, view)} {searched} Row i is label i of "
            f"`labels.parquet` (columns `id`, `uid`, `text`).{hidden}"
        ),
        imports="import faiss",
        opening=(
            'index = faiss.read_index("index.faiss")\nlabels = pq.read_table("labels.parquet")'
        ),
        search=search,
    )


def _write_approximate(
    run: LoadedRun,
    path: Path,
    config: IndexConfig,
    kind: ApproximateKind,
    view: SearchView,
    labels: ExportLabels,
    show_progress: bool,
) -> str:
    """Writes the run's own index or, with new labels, one built for them; describes it."""
    if not labels.num_new:
        found = open_label_search(run, view, config, show_progress=show_progress)
        assert found.index is not None
        found.index.save(path, found.index.record)
        return found.describe()
    scratch = path.with_name("vectors.npy")
    built = build_index(labels.array(scratch), kind, config, show_progress=show_progress)
    built.save(path, {**labels.own.record, "new_labels": labels.num_new})
    scratch.unlink()
    return f"{kind} index"


def _write_vectors(
    run: LoadedRun,
    folder: Path,
    config: ExportConfig,
    view: SearchView,
    labels: ExportLabels,
    show_progress: bool,
) -> None:
    hidden = hides_labels(run, view)
    masking = (
        f"{_WITH_TEXT}\nproducts[:, np.setdiff1d(np.arange(len(labels)), with_text)] = -np.inf\n"
    )
    dtype: type[np.floating[Any]] = np.float16 if config.dtype == "fp16" else np.float32
    _copy_vectors(labels, folder / "label_vectors.npy", dtype)
    _write_table(labels, folder / "ids.parquet", show_progress)
    write_query_side(
        run,
        folder,
        view,
        labels,
        tags=[*_TAGS, config.format],
        license_id=config.license_id,
        title=f"Label vectors of {run.corpus.name}",
        introduction=(
            f"`label_vectors.npy` holds {contents_of(labels, view)} They are {config.dtype}; "
            "`np.load` maps them into memory. Row i is label i of `ids.parquet` (columns `id`, "
            f"`uid`, `text`). The score of a query and a label is the inner product.{hidden}"
        ),
        imports="",
        opening=(
            'vectors = np.load("label_vectors.npy", mmap_mode="r")\n'
            'labels = pq.read_table("ids.parquet")'
        ),
        search=(
            "products = query_vectors(queries) @ vectors.T\n"
            f"{masking if hidden else ''}"
            'ids = np.argsort(-products, axis=1, kind="stable")[:, :5]\n'
            "scores = np.take_along_axis(products, ids, axis=1)"
        ),
    )


def _copy_vectors(labels: ExportLabels, path: Path, dtype: type[np.floating[Any]]) -> None:
    copy_LV = np.lib.format.open_memmap(path, "w+", dtype, labels.shape)
    largest = float(np.finfo(dtype).max)
    start = 0
    for block_nV in labels.blocks():
        end = start + len(block_nV)
        if np.abs(block_nV).max() > largest:
            raise UserError(
                f"--dtype: a vector of labels {start}..{end - 1} has an entry above {largest:g}, "
                "the most that fp16 holds; use fp32"
            )
        copy_LV[start:end] = block_nV
        start = end
    copy_LV.flush()


def _write_table(labels: ExportLabels, path: Path, show_progress: bool) -> None:
    """Writes id, uid and text of every label, Parquet."""
    import pyarrow as pa
    import pyarrow.parquet
    from tqdm import tqdm

    schema = pa.schema([("id", pa.int64()), ("uid", pa.string()), ("text", pa.string())])
    with (
        pyarrow.parquet.ParquetWriter(path, schema) as writer,
        tqdm(
            total=labels.shape[0],
            desc="label texts",
            unit=" labels",
            disable=not show_progress,
            leave=False,
        ) as bar,
    ):
        for columns in labels.names():
            writer.write_table(pa.Table.from_arrays([pa.array(c) for c in columns], schema=schema))
            bar.update(len(columns[0]))
