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
from numpy.typing import NDArray
from pydantic import Field

from unidec_ds.assembly import LoadedRun, trained_views
from unidec_ds.data.corpus import Corpus
from unidec_ds.errors import UserError
from unidec_ds.evaluation import SearchView
from unidec_ds.export.folder import RECORD, new_folder
from unidec_ds.export.model_card import CORPUS_LICENCE, corpus_licence, model_card
from unidec_ds.export.sentence_encoder import write_sentence_encoder
from unidec_ds.index import IndexConfig, write_exact_index
from unidec_ds.run import write_json
from unidec_ds.search import fixed_blocks
from unidec_ds.serving.label_search import open_label_search
from unidec_ds.serving.label_vectors import (
    LabelVectors,
    choose_view,
    expected_record,
    label_vectors,
)
from unidec_ds.settings import Settings

FORMAT_VERSION = 1
QUERY_ENCODER = "query_encoder"

ExportFormat = Literal["sentence-transformers", "faiss", "vectors"]

_BLOCK = 16384  # labels read and written at once
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
    try:
        with new_folder(out, overwrite) as folder:
            if config.format == "sentence-transformers":
                _write_dual_encoder(run, folder, config)
            elif config.format == "faiss":
                _write_faiss(run, folder, config, view, show_progress)
            else:
                _write_vectors(run, folder, config, view, show_progress)
            if (licence := corpus_licence(run)) is not None:
                shutil.copyfile(licence, folder / CORPUS_LICENCE)
            record = {"format_version": FORMAT_VERSION, "unidec_ds": metadata.version("unidec_ds")}
            record |= {"format": config.format, "made_from": expected_record(run, view)}
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
        usage=_code(
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
    run: LoadedRun, folder: Path, config: ExportConfig, view: SearchView, show_progress: bool
) -> None:
    found = open_label_search(run, view, config.index, show_progress=show_progress)
    labels, path = found.vectors, folder / "index.faiss"
    if found.index is None:
        write_exact_index(labels.vectors_LV, path)
        kind, searched, deep = "exact", "It compares with every vector.", ""
    else:
        found.index.save(path, found.index.record)
        kind, knob = found.index.kind, _DEPTH[found.index.kind]
        searched = (
            f"It is approximate: {found.describe()}; `index.{knob}` trades time for recall. "
            "`index.json` says what it was made from."
        )
        deep = f", {knob.removeprefix('hnsw.')}=index.{knob}"
    search = "scores, ids = index.search(query_vectors(queries), 5)"
    if hidden := _hides_labels(run, view):
        search = (
            f"{_WITH_TEXT}\n"
            f"chosen = faiss.{_PARAMETERS[kind]}(sel=faiss.IDSelectorBatch(with_text){deep})\n"
            "scores, ids = index.search(query_vectors(queries), 5, params=chosen)"
        )
    _write_table(run.corpus, folder / "labels.parquet", show_progress)
    _write_query_side(
        run,
        folder,
        config,
        view,
        title=f"FAISS index of {run.corpus.name}",
        introduction=(
            f"`index.faiss` holds {_contents(labels, view)} {searched} Row i is label i of "
            f"`labels.parquet` (columns `id`, `uid`, `text`).{hidden}"
        ),
        imports="import faiss",
        opening=(
            'index = faiss.read_index("index.faiss")\nlabels = pq.read_table("labels.parquet")'
        ),
        search=search,
    )


def _write_vectors(
    run: LoadedRun, folder: Path, config: ExportConfig, view: SearchView, show_progress: bool
) -> None:
    labels = label_vectors(run, view, show_progress=show_progress)
    hidden = _hides_labels(run, view)
    masking = (
        f"{_WITH_TEXT}\nproducts[:, np.setdiff1d(np.arange(len(labels)), with_text)] = -np.inf\n"
    )
    dtype: type[np.floating[Any]] = np.float16 if config.dtype == "fp16" else np.float32
    _copy_vectors(labels.vectors_LV, folder / "label_vectors.npy", dtype)
    _write_table(run.corpus, folder / "ids.parquet", show_progress)
    _write_query_side(
        run,
        folder,
        config,
        view,
        title=f"Label vectors of {run.corpus.name}",
        introduction=(
            f"`label_vectors.npy` holds {_contents(labels, view)} They are {config.dtype}; "
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


def _hides_labels(run: LoadedRun, view: SearchView) -> str:
    """Returns a sentence on the labels that no query may find, empty if there are none."""
    if view != "de" or run.corpus.label_has_text.all():
        return ""
    return " Labels without a text have a vector of zeros: leave them out, as below."


def _contents(labels: LabelVectors, view: SearchView) -> str:
    num_labels, width = labels.vectors_LV.shape
    meaning = {
        "de": "of the dual encoder (score: cosine of query and label text)",
        "classifier": "of the classifier (score: its unit query vector times the label's row)",
        "unified": "of dual encoder and classifier together (score: the sum of both cosines)",
    }[view]
    return f"{num_labels:,} label vectors of width {width}, {meaning}."


def _write_query_side(
    run: LoadedRun,
    folder: Path,
    config: ExportConfig,
    view: SearchView,
    *,
    title: str,
    introduction: str,
    imports: str,
    opening: str,
    search: str,
) -> None:
    """Writes the query encoder and the card whose code goes from texts to labels."""
    write_sentence_encoder(run.model, run.recipe.encoder, folder / QUERY_ENCODER, view)
    lines = [
        *([imports] if imports else []),
        "import numpy as np",
        "import pyarrow.parquet as pq",
        "from sentence_transformers import SentenceTransformer",
        "",
        opening,
        f'encoder = SentenceTransformer("{QUERY_ENCODER}")',
        "",
        "",
        *_query_vectors(run, view),
        "",
        "",
        'queries = ["a query", "another"]',
        search,
        "for query, row_ids, row_scores in zip(queries, ids, scores):",
        "    print(query)",
        "    for i, score in zip(row_ids, row_scores):",
        *(["        if i < 0:  # fewer found", "            break"] if "faiss" in imports else []),
        '        print(f"  {score:.3f}", labels["uid"][int(i)], labels["text"][int(i)])',
    ]
    usage = f"In this folder:\n\n{_code(chr(10).join(lines))}"
    if view == "unified":
        usage += (
            "\n\nEach half of a query vector has a norm of its own. sentence-transformers has no "
            "module for that, so the folder yields the outputs of both heads and `query_vectors` "
            "does the rest."
        )
    header = {
        "library_name": "unidec_ds",
        "pipeline_tag": "feature-extraction",
        "tags": [*_TAGS, config.format],
    }
    card = model_card(
        run,
        title=title,
        introduction=introduction,
        usage=usage,
        header=header,
        license_id=config.license_id,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _query_vectors(run: LoadedRun, view: SearchView) -> list[str]:
    """Returns the lines of a function that does what `label_vectors.query_vectors` does."""
    if view != "unified":
        return ["def query_vectors(texts):", "    return encoder.encode(texts)"]
    tanh = run.recipe.model.de_activation == "tanh"
    return [
        "def query_vectors(texts):",
        "    heads = encoder.encode(texts).reshape(len(texts), 2, -1)  # dual encoder, classifier",
        *(["    heads[:, 0] = np.tanh(heads[:, 0])"] if tanh else []),
        "    heads /= np.maximum(np.linalg.norm(heads, axis=2, keepdims=True), 1e-12)",
        "    return heads.reshape(len(texts), -1)",
    ]


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _copy_vectors(
    vectors_LV: NDArray[np.float32], path: Path, dtype: type[np.floating[Any]]
) -> None:
    copy_LV = np.lib.format.open_memmap(path, "w+", dtype, vectors_LV.shape)
    largest = float(np.finfo(dtype).max)
    for start, end in fixed_blocks(len(vectors_LV), _BLOCK):
        if np.abs(vectors_LV[start:end]).max() > largest:
            raise UserError(
                f"--dtype: a vector of labels {start}..{end - 1} has an entry above {largest:g}, "
                "the most that fp16 holds; use fp32"
            )
        copy_LV[start:end] = vectors_LV[start:end]
    copy_LV.flush()


def _write_table(corpus: Corpus, path: Path, show_progress: bool) -> None:
    """Writes id, uid and text of every label, Parquet."""
    import pyarrow as pa
    import pyarrow.parquet
    from tqdm import tqdm

    schema = pa.schema([("id", pa.int64()), ("uid", pa.string()), ("text", pa.string())])
    with (
        pyarrow.parquet.ParquetWriter(path, schema) as writer,
        tqdm(
            total=corpus.num_labels,
            desc="label texts",
            unit=" labels",
            disable=not show_progress,
            leave=False,
        ) as bar,
    ):
        for start, end in fixed_blocks(corpus.num_labels, _BLOCK):
            ids = np.arange(start, end)
            columns = [ids, corpus.labels.uids(ids), corpus.labels.texts(ids)]
            writer.write_table(pa.Table.from_arrays([pa.array(c) for c in columns], schema=schema))
            bar.update(end - start)
