"""Labels that a run never saw, among those it was trained on: found at once, without training.

The dual encoder takes any text. In the classifier a new label has no row; its substitute is the
classifier head's own vector of its text. But a query is more alike to such a vector than to a
trained row, which negatives have pushed away: taken as it is, new labels crowd out the old ones.
Their cosines are therefore calibrated,

    cos_classifier(query, new label) = slope · cos(g2(query), g2(text)) + offset

with the (slope, offset) that gives the run's own labels, scored through their texts, the same mean
and spread of the best scores that are *no* positives as their rows have: then a new label has to be
as good as an old one to be found. It is fitted to a sample of the train queries and labels when
first wanted, and kept:

    RUN/index/calibration-VIEW.npy     slope and offset, fp64 [2]
    RUN/index/calibration-VIEW.json    what they were made from (`stamp`)

The slope lies in the new labels' vectors, the offset is added after the search: new labels are
searched on their own, exactly, and merged into the answer. Vectors and indexes of the run's labels
stay as they are. The calibration is this project's; `scripts/bench/new_labels.py` measured it
against others.

Cost: one encoder pass over the new labels' texts; fitting, once, over at most 17,408 texts. A
search, n·V multiplications a query for n new labels.

Shape legend: n new labels, Q queries, K labels kept, D head width, V width of the view's vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from unidec_ds import stamp
from unidec_ds.assembly import LoadedRun
from unidec_ds.data import label_digests as digests
from unidec_ds.data.build import text_of
from unidec_ds.data.corpus import RaggedTokens, TextTable
from unidec_ds.data.formats import read_labels
from unidec_ds.data.keyed import hash64
from unidec_ds.data.pairs import Ids, Pairs
from unidec_ds.data.records import Record
from unidec_ds.data.uids import UidDigests
from unidec_ds.embedding import embed_all, pool_tokens
from unidec_ds.encoders import load_tokenizer
from unidec_ds.errors import CorpusError, UserError
from unidec_ds.evaluation import SearchView
from unidec_ds.search import exact_search, fixed_blocks
from unidec_ds.serving.label_vectors import expected_record, join_label_parts

SAMPLE_QUERIES, SAMPLE_LABELS = 1024, 16_384
"""What a calibration is fitted to, at most."""

_BEST = 100  # best labels of a query that are no positives, or a tenth of the labels if fewer
_TEXTS_AT_ONCE = 2048


class Calibration(NamedTuple):
    """How the cosine with a substitute becomes one as with a trained row."""

    slope: float
    offset: float


@dataclass(frozen=True)
class NewLabels:
    """New labels ready to be searched in one view. Made by `open_new_labels`."""

    uids: list[str]
    texts: list[str]
    num_known: int
    """Labels that were given but are the run's own, and were passed over."""
    first_id: int
    """The label id of the first; L, as the run's own labels are 0..L-1."""
    vectors_nV: Tensor
    """fp32, the slope in their classifier part."""
    offset: float
    """Added to every score."""

    def describe(self) -> str:
        """Returns how many there are, in a few words."""
        known = f" ({self.num_known:,} others are the run's own)" if self.num_known else ""
        return f"{len(self.uids):,} new labels{known}"

    def names(self, label_ids: Ids, table: TextTable) -> tuple[list[str], list[str]]:
        """Returns uids and texts of new labels and of the run's own, which `table` holds."""
        is_new = label_ids >= self.first_id
        columns = []
        for new, own in ((self.uids, table.uids), (self.texts, table.texts)):
            column = np.empty(len(label_ids), object)
            column[~is_new] = own(label_ids[~is_new])
            column[is_new] = [new[place] for place in label_ids[is_new] - self.first_id]
            columns.append(column.tolist())
        return columns[0], columns[1]

    def merge(
        self, queries_QV: Tensor, scores_QK: Tensor, ids_QK: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Returns the best k of what was found among the run's labels and of the new ones.

        Args:
            queries_QV: the queries' vectors.
            scores_QK: scores of the labels found, best first, -inf where there is none.
            ids_QK: their label ids, -1 where there is none.
            k: labels to keep per query.

        Returns:
            (scores, label ids), score descending, id ascending.
        """
        if not self.uids:
            return scores_QK, ids_QK
        more_QK, more_ids_QK = exact_search(queries_QV, self.vectors_nV, min(k, len(self.uids)))
        scores = torch.cat([scores_QK, more_QK + self.offset], dim=1)
        ids = torch.cat([ids_QK, more_ids_QK + self.first_id], dim=1)
        # Stable, and the new labels' ids are the highest: ties stay in the order of the ids.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return scores[:, :k], ids.gather(1, order)[:, :k]


def open_new_labels(
    run: LoadedRun,
    view: SearchView,
    source: Path | Mapping[str, str],
    *,
    weight_de: float = 0.5,
    show_progress: bool = True,
) -> NewLabels:
    """Returns new labels with their vectors, calibrated. Labels that the run has are passed over.

    Args:
        run: the run.
        view: one it was trained for.
        source: a file as `data.formats.read_labels` reads it, or texts by uid.
        weight_de: of the dual encoder in the unified view, see `label_vectors`.
        show_progress: draw bars on standard error.

    Raises:
        CorpusError: the file is not there or malformed, a label has no text, or a uid repeats.
        UserError: the run directory cannot be written to.
    """
    uids, texts = _read(source, run)
    known = _is_known(run, uids, texts)
    uids = [uid for uid, is_known in zip(uids, known, strict=True) if not is_known]
    texts = [text for text, is_known in zip(texts, known, strict=True) if not is_known]
    fitted = calibration(run, view, show_progress=show_progress) if uids else Calibration(1.0, 0.0)
    parts = [
        new_label_vectors(run, block, view, fitted.slope, weight_de)
        for block in _blocks(texts, show_progress)
    ]
    scale = 2 * (1 - weight_de) if view == "unified" else 1.0
    return NewLabels(
        uids,
        texts,
        num_known=int(known.sum()),
        first_id=run.corpus.num_labels,
        vectors_nV=torch.cat(parts) if parts else torch.empty(0, 0),
        offset=fitted.offset * scale,
    )


@torch.no_grad()
def new_label_vectors(
    run: LoadedRun, texts: list[str], view: SearchView, slope: float, weight_de: float = 0.5
) -> Tensor:
    """Returns the vectors of texts that stand for labels, fp32 [n, V], before the offset.

    Args:
        run: the run.
        texts: at most a block or so: all are encoded in one go.
        view: what to make.
        slope: of the classifier part.
        weight_de: see `label_vectors`.
    """
    tokenizer: Any = load_tokenizer(run.recipe.encoder.name)
    encoded = tokenizer(texts, truncation=True, max_length=run.recipe.encoder.max_length)
    tokens = RaggedTokens(
        np.concatenate(encoded["input_ids"]).astype(np.int32),
        np.cumsum([0, *map(len, encoded["input_ids"])]),
    )
    pooled_nH = pool_tokens(run.model, tokens, run.corpus.pad_token_id)
    de_nD = run.model.embed(pooled_nH)
    if view == "de":
        return de_nD
    substitutes_nD = slope * normalize(run.model.classify(pooled_nH), dim=-1)
    if view == "classifier":
        return substitutes_nD
    return torch.cat([2 * weight_de * de_nD, 2 * (1 - weight_de) * substitutes_nD], dim=1)


def calibration(run: LoadedRun, view: SearchView, *, show_progress: bool = True) -> Calibration:
    """Returns the run's calibration, fitted now unless RUN/index holds the right one.

    Raises:
        UserError: the run directory cannot be written to.
    """
    if view == "de":
        return Calibration(1.0, 0.0)  # a new label is as good as an old one there
    path = run.folder / "index" / f"calibration-{view}.npy"
    # The unified view's weight plays no part: it falls on trained rows and substitutes alike.
    record = {
        **expected_record(run, view),
        "best": _BEST,
        "sample": [SAMPLE_QUERIES, SAMPLE_LABELS],
    }
    try:
        with stamp.locked(path):
            if stamp.mismatch(path, record) is not None:
                fitted = fit_calibration(run, view, show_progress=show_progress)
                beside = path.with_suffix(".new.npy")
                np.save(beside, np.array(fitted))
                stamp.put(beside, path, record)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): the calibration of new labels is kept "
            "in the run directory; make room or make it writable, or copy the run to where it is"
        ) from error
    return Calibration(*np.load(path).tolist())


def fit_calibration(run: LoadedRun, view: SearchView, *, show_progress: bool = True) -> Calibration:
    """Returns the slope and offset that match the best non-positives' scores; see the module.

    Cost: encodes the sampled texts; SAMPLE_QUERIES · SAMPLE_LABELS · 2D multiplications.
    """
    corpus, seed = run.corpus, run.recipe.train.seed
    query_ids = _sample(corpus.train_query_ids(), SAMPLE_QUERIES, seed)
    label_ids = _sample(np.flatnonzero(corpus.label_has_text), SAMPLE_LABELS, seed)
    with tqdm(
        total=len(query_ids) + len(label_ids),
        desc="calibrating new labels (once)",
        unit=" texts",
        disable=not show_progress,
    ) as bar:
        queries_QD = _classifier_vectors(run, corpus.queries["train"], query_ids, bar)
        texts_ND = _classifier_vectors(run, corpus.labels, label_ids, bar)
    rows_ND = join_label_parts(
        None,
        run.rows.read(label_ids).to(texts_ND.device),
        cosine_classifier=view == "unified" or run.recipe.objective.classifier_logits == "cosine",
    )
    exclude = _pairs_of_sample(
        [corpus.positives["train"], corpus.filter_pairs["train"]], query_ids, label_ids
    )
    best = min(_BEST, -(-len(label_ids) // 10))
    by_row, _ = exact_search(queries_QD, rows_ND, best, exclude=exclude)
    by_text, _ = exact_search(queries_QD, texts_ND, best, exclude=exclude)
    by_row, by_text = (s[s.isfinite()].double() for s in (by_row, by_text))
    slope = float(by_row.std() / by_text.std())
    offset = float(by_row.mean() - slope * by_text.mean())
    if not np.isfinite([slope, offset]).all():
        raise UserError(
            f"{run.folder}: new labels cannot be calibrated on {len(query_ids)} train queries and "
            f"{len(label_ids)} labels with a text; use the view de, which needs no calibration"
        )
    return Calibration(slope, offset)


def _classifier_vectors(
    run: LoadedRun,
    table: TextTable,
    ids: Ids,
    bar: tqdm,  # type: ignore[type-arg]
) -> Tensor:
    """Returns the classifier head's unit vectors of the texts, fp32 [n, D]."""
    (vectors_nD,) = embed_all(
        run.model, table, ids, ("classifier",), run.corpus.pad_token_id, bar.update
    )
    return vectors_nD


def _read(source: Path | Mapping[str, str], run: LoadedRun) -> tuple[list[str], list[str]]:
    """Returns uids and texts, each label once and with a text."""
    records: Iterable[Record]
    if isinstance(source, Path):
        name, records = str(source), read_labels(source)
    else:
        name = "new_labels"
        records = (Record(n, uid, text) for n, (uid, text) in enumerate(source.items(), start=1))
    line_of: dict[str, int] = {}
    texts = []
    for record in records:
        text = text_of(record, run.corpus.manifest["text"]).strip()
        if not text:
            raise CorpusError(
                f"{name}:{record.line}: label {record.uid!r} has no text; a new label needs one, "
                "as there is nothing else to find it by"
            )
        if record.uid in line_of:
            raise CorpusError(
                f"{name}:{record.line}: label {record.uid!r} is there already, in line "
                f"{line_of[record.uid]}; each needs a uid of its own"
            )
        line_of[record.uid] = record.line
        texts.append(text)
    return list(line_of), texts


def _is_known(run: LoadedRun, uids: list[str], texts: list[str]) -> np.ndarray[Any, Any]:
    """Returns bool [n], which labels are the run's own."""
    path = run.folder / digests.FILE
    own = UidDigests.open(path) if path.is_file() else digests.label_digests(run.corpus)
    return own.rows(digests.names_to_digest(run.corpus, uids, texts)) >= 0


def _blocks(texts: list[str], show_progress: bool) -> Iterator[list[str]]:
    with tqdm(total=len(texts), desc="embedding new labels", unit=" labels",
              disable=not show_progress) as bar:  # fmt: skip
        for start, end in fixed_blocks(len(texts), _TEXTS_AT_ONCE):
            yield texts[start:end]
            bar.update(end - start)


def _sample(ids: Ids, size: int, seed: int) -> Ids:
    """Returns `size` of the ids, ascending, the same every time; all if there are fewer."""
    keys = hash64(seed, "calibration of new labels", ids)
    return np.sort(ids[np.argsort(keys, kind="stable")[:size]])


def _pairs_of_sample(sets: list[Pairs], query_ids: Ids, label_ids: Ids) -> Pairs:
    """Returns the pairs among the sampled queries and labels, by their places in the samples."""
    rows, columns = zip(*(pairs.take(query_ids) for pairs in sets), strict=True)
    row, label = np.concatenate(rows), np.concatenate(columns)
    place = np.minimum(np.searchsorted(label_ids, label), len(label_ids) - 1)
    inside = label_ids[place] == label
    return Pairs.from_pairs(row[inside], place[inside], len(query_ids), len(label_ids))
