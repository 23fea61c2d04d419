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

The array is made once, block by block, and again when the run has a newer checkpoint (`stamp`).

Cost: one encoder pass over the label texts (none for `classifier`), then L·D·4 bytes of disk, twice
that for `unified`. Memory: one block. No communication: one process makes them, others wait.

Shape legend: n labels of a call, L labels, D head width, V width of the view's vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from unidec_ds import stamp
from unidec_ds.assembly import LoadedRun, trained_views
from unidec_ds.data.pairs import Ids
from unidec_ds.embedding import BLOCK, embed
from unidec_ds.errors import UserError
from unidec_ds.evaluation import SearchView
from unidec_ds.manifest import manifest_digest
from unidec_ds.model import UniDEC
from unidec_ds.search import fixed_blocks

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

    def as_tensor(self) -> Tensor:
        """Returns the same vectors as a tensor, mapped; never write to it."""
        # Mapped copy-on-write: torch would warn of memory that it could not write to.
        return torch.from_numpy(np.load(self.path, mmap_mode="c"))


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
    if stamp.mismatch(path, record) is not None:
        try:
            with stamp.locked(path):
                if stamp.mismatch(path, record) is not None:
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
    if (fault := stamp.mismatch(path, record)) is not None:
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
            if not made_nV.isfinite().all():
                raise UserError(
                    f"{run.checkpoint}: vectors of labels {start}..{end - 1} are not finite; the "
                    "training diverged before it; use a run with a lower learning rate"
                )
            vectors_LV[start:end] = made_nV.cpu().numpy()
            bar.update(end - start)
    vectors_LV.flush()
    stamp.put(beside, path, record)


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
