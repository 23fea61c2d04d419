"""The vectors that queries are compared with: a run's labels in one view, kept on disk.

Score = inner product of a query's vector with a label's, in every view:

    de          g1(query) with g1(label text), [L, D]; both are unit vectors
    classifier  g2(query), a unit vector, with the label's row, [L, D]; the row is a unit vector
                where the loss made it one (objective.classifier_logits: cosine)
    unified     both, one after the other, [L, 2D], both of unit length: cos_DE + cos_classifier.
                A weight w of the two lies on the labels' side alone, so that the score is
                2 (w cos_DE + (1 - w) cos_classifier) and queries stay as they are

A label without a text has a zero dual-encoder part, as in `evaluation`.

    RUN/index/vectors-VIEW.npy    fp32, memory-mapped when opened
    RUN/index/vectors-VIEW.json   the checkpoint, corpus and settings they were made from

The array is made once, block by block, and again when the run has a newer checkpoint; beside it is
written last, so that what a killed process leaves is never taken for vectors.

Cost: one encoder pass over the label texts (none for `classifier`), then L·D·4 bytes of disk, twice
that for `unified`. Memory: one block. No communication: one process makes them, others wait.

Shape legend: n labels of a call, L labels, D head width, V width of the view's vectors.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from unidec_ds.assembly import LoadedRun, trained_views
from unidec_ds.checkpoint import manifest_digest
from unidec_ds.data.pairs import Ids
from unidec_ds.embedding import BLOCK, embed
from unidec_ds.errors import UserError
from unidec_ds.evaluation import SearchView
from unidec_ds.model import UniDEC
from unidec_ds.run import write_json
from unidec_ds.search import fixed_blocks

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LabelVectors:
    """A run's label vectors in one view, memory-mapped."""

    path: Path
    """The .npy file; its record lies beside it."""
    record: dict[str, Any]
    """What they were made from; see `expected_record`."""
    vectors_LV: NDArray[np.float32]
    """Read-only; row = label_id."""


def choose_view(run: LoadedRun, view: SearchView | None) -> SearchView:
    """Returns `view`, or the best one the run was trained for.

    Raises:
        UserError: the run was not trained for `view`.
    """
    views = trained_views(run.recipe)
    if view is not None and view not in views:
        raise UserError(f"view: this run trained {', '.join(views)}, not {view}")
    return view or views[-1]


def expected_record(run: LoadedRun, view: SearchView, weight_de: float = 0.5) -> dict[str, Any]:
    """Returns the record that vectors of this run, view and weight carry; plain data.

    The checkpoint is told by its name and by the hash of its manifest, which names the hash of
    every file of it: two runs never share one.
    """
    return {
        "format_version": FORMAT_VERSION,
        "checkpoint": run.checkpoint.name,
        "checkpoint_sha256": manifest_digest(run.checkpoint),
        "corpus_fingerprint": run.corpus.fingerprint,
        "view": view,
        "weight_de": weight_de if view == "unified" else None,
        "num_labels": run.corpus.num_labels,
        "width": run.model.width * (2 if view == "unified" else 1),
    }


def label_vectors(
    run: LoadedRun, view: SearchView, *, weight_de: float = 0.5, show_progress: bool = True
) -> LabelVectors:
    """Returns the run's own label vectors, made now unless RUN/index holds the right ones.

    Args:
        run: the run.
        view: one it was trained for.
        weight_de: w in 0..1, for `unified` alone; see the module's docstring.
        show_progress: draw a bar on standard error while they are made.

    Raises:
        UserError: the run directory cannot be written to.
    """
    path = run.folder / "index" / f"vectors-{view}.npy"
    record = expected_record(run, view, weight_de)
    if _mismatch(path, record) is not None:
        try:
            path.parent.mkdir(exist_ok=True)
            with _locked(path):
                if _mismatch(path, record) is not None:
                    write_label_vectors(
                        run, view, path, weight_de=weight_de, show_progress=show_progress
                    )
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}): the label vectors are kept in the "
                "run directory; make room or make it writable, or copy the run to where it is"
            ) from error
    return LabelVectors(path, record, np.load(path, mmap_mode="r"))


def open_label_vectors(
    path: Path, run: LoadedRun, view: SearchView, *, weight_de: float = 0.5
) -> LabelVectors:
    """Returns the label vectors of a file that the user named; never rewrites it.

    Args:
        path: the .npy file.
        run: the run they have to belong to.
        view: the view they have to be of.
        weight_de: the weight they have to be made with.

    Raises:
        UserError: there are none, they are damaged, or they were made from something else.
    """
    record = expected_record(run, view, weight_de)
    if (fault := _mismatch(path, record)) is not None:
        raise UserError(
            f"{path} does not hold the label vectors of {run.folder} for view {view}: {fault}. "
            "Leave the file out, and the run makes its own"
        )
    return LabelVectors(path, record, np.load(path, mmap_mode="r"))


def write_label_vectors(
    run: LoadedRun,
    view: SearchView,
    path: Path,
    *,
    weight_de: float = 0.5,
    show_progress: bool = True,
) -> None:
    """Makes the label vectors of `view` and puts them and their record at `path`.

    Args:
        run: see `label_vectors`.
        view: see `label_vectors`.
        path: the .npy file, in a folder that exists; replaced as a whole.
        weight_de: see `label_vectors`.
        show_progress: see `label_vectors`.
    """
    record = expected_record(run, view, weight_de)
    num_labels = record["num_labels"]
    beside = path.with_suffix(".new.npy")
    vectors_LV = np.lib.format.open_memmap(
        beside, "w+", np.float32, (num_labels, int(record["width"]))
    )
    title = "label vectors (once)" if view == "classifier" else "embedding labels (once)"
    bar = tqdm(total=num_labels, desc=title, unit=" labels", disable=not show_progress)
    with bar:
        for start, end in fixed_blocks(num_labels, BLOCK):
            made_nV = make_label_vectors(run, np.arange(start, end), view, weight_de)
            vectors_LV[start:end] = made_nV.cpu().numpy()
            bar.update(end - start)
    vectors_LV.flush()
    # Without its record the old array is nothing; the new one gets its record last.
    record_path(path).unlink(missing_ok=True)
    beside.replace(path)
    write_json(record_path(path), record)


def make_label_vectors(
    run: LoadedRun, label_ids: Ids, view: SearchView, weight_de: float = 0.5
) -> Tensor:
    """Returns the vectors of a block of labels, fp32 [n, V] on the model's device.

    Args:
        run: see `label_vectors`.
        label_ids: int64 [n], at most a block or so: their texts are encoded in one go.
        view: see `label_vectors`.
        weight_de: see `label_vectors`.
    """
    de_nD = rows_nD = None
    if view != "classifier":
        (de_nD,) = embed(run.model, run.corpus.labels, label_ids, ("de",), run.corpus.pad_token_id)
        de_nD[torch.from_numpy(~run.corpus.label_has_text[label_ids]).to(de_nD.device)] = 0.0
    if view != "de":
        rows_nD = run.rows.read(label_ids).to(next(run.model.parameters()).device)
    cosine = run.recipe.objective.classifier_logits == "cosine"
    return join_label_parts(de_nD, rows_nD, cosine_classifier=cosine, weight_de=weight_de)


def join_label_parts(
    de_nD: Tensor | None, rows_nD: Tensor | None, *, cosine_classifier: bool, weight_de: float = 0.5
) -> Tensor:
    """Returns the label vectors [n, V] that the parts a view has make up.

    Args:
        de_nD: dual-encoder embeddings of the label texts, zero for labels without one; None in
            the classifier view.
        rows_nD: classifier rows as stored; None in the dual encoder's view.
        cosine_classifier: whether the classifier view, alone, has unit rows.
        weight_de: w; without effect unless both parts are given.
    """
    if rows_nD is None:
        assert de_nD is not None
        return de_nD
    if de_nD is None:
        return normalize(rows_nD, dim=-1) if cosine_classifier else rows_nD
    parts = (2 * weight_de * de_nD, 2 * (1 - weight_de) * normalize(rows_nD, dim=-1))
    return torch.cat(parts, dim=1)


def query_vectors(model: UniDEC, pooled_nH: Tensor, view: SearchView) -> Tensor:
    """Returns what is compared with the label vectors, fp32 [n, V], from pooled query texts."""
    parts = []
    if view != "classifier":
        parts.append(model.embed(pooled_nH))
    if view != "de":
        parts.append(normalize(model.classify(pooled_nH), dim=-1))
    return torch.cat(parts, dim=1)


def record_path(path: Path) -> Path:
    """Returns where the record of a file of vectors lies."""
    return path.with_suffix(".json")


def _mismatch(path: Path, record: dict[str, Any]) -> str | None:
    """Returns how the vectors at `path` differ from those of `record`; None if they are they."""
    if not path.is_file():
        return "there is no such file"
    try:
        found = json.loads(record_path(path).read_text(encoding="utf-8"))
        shape = np.load(path, mmap_mode="r").shape
    except (OSError, ValueError) as error:
        return f"it or its record beside it cannot be read ({error})"
    if not isinstance(found, dict):
        return "its record is not a JSON object"
    faults = [
        f"{key} is {_short(found.get(key))}, needed {_short(value)}"
        for key, value in record.items()
        if found.get(key) != value
    ]
    if not faults and shape != (record["num_labels"], record["width"]):
        faults.append(f"its shape is {shape}")
    return "; ".join(faults) or None


def _short(value: object) -> object:
    return value[:24] if isinstance(value, str) else value


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file of vectors; says so if another process has it."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("waiting for another process that is making %s", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
