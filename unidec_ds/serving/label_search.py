"""A run's labels, ready to be searched in one view: their vectors and, over many, an index.

    RUN/index/vectors-VIEW.npy      see `label_vectors`
    RUN/index/KIND-VIEW.faiss       see `index`; only for ivf and hnsw

Both are made when first wanted and kept; both carry the record of the vectors, and what does not
belong to the run's newest checkpoint is made again. An index that the user names is never made
again but refused.

Shape legend: Q queries, L labels, V width of the view's vectors, K labels kept.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import cast, get_args

import numpy as np
import torch
from torch import Tensor

from unidec_ds import stamp
from unidec_ds.assembly import LoadedRun
from unidec_ds.data.pairs import Ids
from unidec_ds.embedding import View, embed
from unidec_ds.errors import UserError
from unidec_ds.evaluation import SearchView
from unidec_ds.index import (
    ApproximateIndex,
    ApproximateKind,
    IndexChoice,
    IndexConfig,
    build_index,
    chosen_kind,
    is_approximate,
    open_index,
    recall,
    recorded_config,
)
from unidec_ds.search import exact_search
from unidec_ds.serving.label_vectors import LabelVectors, label_vectors

logger = logging.getLogger(__name__)

RECALL_K, _RECALL_QUERIES = 10, 256


class LabelSearch:
    """Finds the best labels for query vectors. Made by `open_label_search`.

    Args:
        vectors: the labels' vectors.
        index: an index over them, or None to compare with all.
        hidden_L: bool [L], labels that no query may find.
        device: where exact search runs.
    """

    def __init__(
        self,
        vectors: LabelVectors,
        index: ApproximateIndex | None,
        hidden_L: Tensor,
        device: torch.device,
    ) -> None:
        self.vectors, self.index = vectors, index
        self.hidden_L = hidden_L
        self._some_hidden = bool(hidden_L.any())
        self._labels_LV = vectors.as_tensor()
        if index is None and device.type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(device)
            if self._labels_LV.nbytes < free_bytes / 2:
                self._labels_LV = self._labels_LV.to(device)  # else it streams past every search

    def search(self, queries_QV: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Returns (scores [Q, K], label ids [Q, K]) as `exact_search` does, K = min(k, L)."""
        k = min(k, len(self._labels_LV))
        if self.index is None:
            return exact_search(queries_QV, self._labels_LV, k, hidden_L=self.hidden_L)
        if not self._some_hidden:
            return self.index.search(queries_QV, k, self.vectors.vectors_LV)
        depth = min(2 * k, len(self._labels_LV))
        scores_QC, ids_QC = self.index.search(queries_QV, depth, self.vectors.vectors_LV)
        is_hidden_QC = self.hidden_L[ids_QC.cpu()].to(ids_QC.device) & (ids_QC >= 0)
        last_first = is_hidden_QC.sort(dim=1, stable=True).indices[:, :k]
        scores_QC.masked_fill_(is_hidden_QC, -torch.inf)
        ids_QC.masked_fill_(is_hidden_QC, -1)
        return scores_QC.gather(1, last_first), ids_QC.gather(1, last_first)

    def describe(self) -> str:
        """Returns how labels are searched, in a few words."""
        if self.index is None:
            return "exact search"
        found = self.index.record.get(f"recall@{RECALL_K}")
        measured = "" if found is None else f", finds {found:.1%} of the exact {RECALL_K} best"
        return f"{self.index.kind} index{measured}"


def parse_index(text: str) -> IndexConfig | Path:
    """Returns what `--index` names: a way to search, or the file of an index.

    Raises:
        UserError: it is neither.
    """
    if Path(text).is_file():
        return Path(text)
    if text not in get_args(IndexChoice):
        raise UserError(
            f"--index: found {text}; needs {', '.join(get_args(IndexChoice))} or an index file"
        )
    return IndexConfig(kind=cast(IndexChoice, text))


def open_label_search(
    run: LoadedRun,
    view: SearchView,
    index: IndexConfig | Path,
    *,
    weight_de: float = 0.5,
    show_progress: bool = True,
) -> LabelSearch:
    """Returns the run's labels ready to be searched; makes vectors and index unless they are there.

    Args:
        run: the run.
        view: one it was trained for.
        index: how to search, or the file of an index, which has to belong to the run.
        weight_de: of the dual encoder in the unified view, see `label_vectors`.
        show_progress: draw bars on standard error while something is made.

    Raises:
        UserError: the index named does not belong to the run, or its folder cannot be written to.
    """
    vectors = label_vectors(run, view, weight_de=weight_de, show_progress=show_progress)
    hidden_L = torch.zeros(run.corpus.num_labels, dtype=torch.bool)
    if view == "de":
        hidden_L = ~torch.from_numpy(np.array(run.corpus.label_has_text))
    device = next(run.model.parameters()).device
    if isinstance(index, Path):
        opened = open_index(index, *recorded_config(index), vectors.record)
        return LabelSearch(vectors, opened, hidden_L, device)
    kind = chosen_kind(index, run.corpus.num_labels)
    found = None
    if is_approximate(kind):
        found = _run_index(run, vectors, view, kind, index, hidden_L, show_progress)
    return LabelSearch(vectors, found, hidden_L, device)


def _run_index(
    run: LoadedRun,
    vectors: LabelVectors,
    view: SearchView,
    kind: ApproximateKind,
    config: IndexConfig,
    hidden_L: Tensor,
    show_progress: bool,
) -> ApproximateIndex:
    """Returns the run's own index, built now unless the right one is there."""
    path = run.folder / "index" / f"{kind}-{view}.faiss"
    try:
        return open_index(path, kind, config, vectors.record)
    except UserError as error:
        if path.exists():
            logger.warning("building it again: %s", error)
    try:
        with stamp.locked(path):
            with contextlib.suppress(UserError):  # another process built it meanwhile
                return open_index(path, kind, config, vectors.record)
            built = build_index(vectors.vectors_LV, kind, config, show_progress=show_progress)
            search = LabelSearch(vectors, built, hidden_L, torch.device("cpu"))
            built.save(path, {**vectors.record, f"recall@{RECALL_K}": _recall(run, search, view)})
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); make room there") from error
    return open_index(path, kind, config, vectors.record)


def _recall(run: LoadedRun, search: LabelSearch, view: SearchView) -> float:
    """Returns the recall@10 of an index against exact search, for some of the corpus's queries."""
    queries = run.corpus.queries["test" if "test" in run.corpus.queries else "train"]
    count = min(_RECALL_QUERIES, len(queries))
    ids: Ids = np.linspace(0, len(queries) - 1, count).astype(np.int64)
    heads: dict[SearchView, tuple[View, ...]] = {
        "de": ("de",), "classifier": ("classifier",), "unified": ("de", "classifier"),
    }  # fmt: skip
    parts = embed(run.model, queries, ids, heads[view], run.corpus.pad_token_id)
    asked_QV = torch.cat(parts, dim=1).cpu()
    exact = LabelSearch(search.vectors, None, search.hidden_L, asked_QV.device)
    _, found_QK = search.search(asked_QV, RECALL_K)
    _, exact_QK = exact.search(asked_QV, RECALL_K)
    return round(recall(found_QK, exact_QK), 4)
