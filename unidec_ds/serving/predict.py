"""Predicts labels for texts with a trained run.

    predictor = unidec_ds.load("runs/quickstart")
    predictor.predict(["cut grass with a machine"], k=3)

The labels' vectors, and over many labels an index, are made once and kept in the run directory
(`label_search`); a text then costs one encoder call and one search.

Shape legend: n texts, L labels, V width of the view's vectors, K labels per text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unidec_ds.assembly import LoadedRun, load_run
from unidec_ds.data.corpus import RaggedTokens
from unidec_ds.data.pairs import Ids
from unidec_ds.embedding import pool_tokens
from unidec_ds.encoders import load_tokenizer
from unidec_ds.errors import UserError
from unidec_ds.evaluation import SearchView
from unidec_ds.index import IndexConfig
from unidec_ds.search import fixed_blocks
from unidec_ds.serving.label_search import LabelSearch, open_label_search
from unidec_ds.serving.label_vectors import choose_view, query_vectors
from unidec_ds.serving.new_labels import NewLabels, open_new_labels

BATCH_SIZE = 256
"""Texts that are encoded and searched at once."""


class Label(NamedTuple):
    """One predicted label."""

    label_id: int
    """Its number in the corpus, 0..L-1."""
    uid: str
    """Its identifier in the corpus's source."""
    text: str
    """Its text; empty for a label without one."""
    score: float
    """Its score in the view; higher is better."""


class Predictor:
    """A trained run that answers texts. Made by `load`.

    Args:
        run: the run.
        view: what to rank by.
        labels: the run's labels in that view.
        new_labels: others to be found among them.
    """

    def __init__(
        self,
        run: LoadedRun,
        view: SearchView,
        labels: LabelSearch,
        new_labels: NewLabels | None = None,
    ) -> None:
        self.view = view
        self._run, self._labels, self._new_labels = run, labels, new_labels
        self._tokenizer: Any = load_tokenizer(run.recipe.encoder.name)

    @torch.no_grad()
    def predict(
        self, texts: Sequence[str], k: int = 5, *, batch_size: int = BATCH_SIZE
    ) -> list[list[Label]]:
        """Returns the `k` best labels of each text, best first; fewer if there are fewer labels.

        A text without a visible character gets an empty list. Texts are cut to the run's
        `encoder.max_length`.

        Args:
            texts: any number.
            k: labels per text.
            batch_size: texts at once: memory grows with it.

        Raises:
            UserError: `texts` is not a sequence of texts, or a number is below 1.
        """
        _check_texts(texts)
        for name, value in (("k", k), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name}: found {value}; needs at least 1")
        answers: list[list[Label]] = [[] for _ in texts]
        asked = [place for place, text in enumerate(texts) if text.strip()]
        for start, end in fixed_blocks(len(asked), batch_size):
            places = asked[start:end]
            vectors_nV = self._query_vectors([texts[place].strip() for place in places])
            scores_nK, ids_nK = self._labels.search(vectors_nV, k)
            if self._new_labels is not None:
                scores_nK, ids_nK = self._new_labels.merge(vectors_nV, scores_nK, ids_nK, k)
            described = self._describe(ids_nK.cpu().numpy(), scores_nK.tolist())
            for place, labels in zip(places, described, strict=True):
                answers[place] = labels
        return answers

    def describe(self) -> str:
        """Returns one line about what answers: run, view, labels, search."""
        return (
            f"{self._run.folder} at {self._run.checkpoint.name}, view {self.view}, "
            f"{self._run.corpus.num_labels:,} labels, {self._labels.describe()}"
            + (f", {self._new_labels.describe()}" if self._new_labels is not None else "")
        )

    def _describe(self, ids_nK: Ids, scores_nK: list[list[float]]) -> list[list[Label]]:
        table, new = self._run.corpus.labels, self._new_labels
        there = ids_nK.ravel()[ids_nK.ravel() >= 0]
        if new is None:
            columns = (table.uids(there), table.texts(there))
        else:
            columns = new.names(there, table)
        names = iter(zip(there.tolist(), *columns, strict=True))
        return [
            [Label(*next(names), score) for label_id, score in zip(ids, scores, strict=True)
             if label_id >= 0]
            for ids, scores in zip(ids_nK, scores_nK, strict=True)
        ]  # fmt: skip

    def _query_vectors(self, texts: list[str]) -> Tensor:
        model = self._run.model
        encoded = self._tokenizer(
            texts, truncation=True, max_length=self._run.recipe.encoder.max_length
        )["input_ids"]
        offsets = np.cumsum([0, *map(len, encoded)])
        tokens = RaggedTokens(np.concatenate(encoded).astype(np.int32), offsets)
        pooled_nH = pool_tokens(model, tokens, self._run.corpus.pad_token_id)
        return query_vectors(model, pooled_nH, self.view)


def load(
    run: Path | str,
    *,
    device: torch.device | str | None = None,
    corpus: Path | str | None = None,
    view: SearchView | None = None,
    index: IndexConfig | Path | None = None,
    new_labels: Path | str | Mapping[str, str] | None = None,
    weight_de: float = 0.5,
    checkpoint: str = "latest",
    show_progress: bool = True,
) -> Predictor:
    """Returns a predictor for a checkpoint of a run directory.

    The first call for a checkpoint embeds all labels, which takes as long as encoding their texts.

    Args:
        run: the run directory.
        device: where texts are encoded; None takes the GPU if there is one.
        corpus: where the corpus is now; None: where the recipe says.
        view: what to rank by; None takes the best of those the run was trained for.
        index: how labels are searched, or the file of an index that belongs to the run; None is
            exact up to some 200,000 labels and approximate above.
        new_labels: labels that the run was not trained on, to be found among its own: a file of
            `id, text` (.jsonl, .parquet) or of the XMC repository (lbl.json.gz), or texts by id.
            Their label ids follow the run's. The first call calibrates their scores.
        weight_de: w of the score 2·(w·cos_DE + (1-w)·cos_classifier) in the view "unified".
        checkpoint: "latest", "best" (on validation) or the checkpoint's folder.
        show_progress: draw bars on standard error while something is made.

    Raises:
        CheckpointError: no usable checkpoint.
        UserError: the run was not trained for `view`, the index does not belong to the run, there
            is no such device, or the run directory cannot be written to.
    """
    if not 0 <= weight_de <= 1:
        raise UserError(f"weight_de: found {weight_de}; needs a number from 0 to 1")
    loaded = load_run(Path(run), _device(device), Path(corpus) if corpus else None, checkpoint)
    chosen = choose_view(loaded, view)
    labels = open_label_search(
        loaded, chosen, index or IndexConfig(), weight_de=weight_de, show_progress=show_progress
    )
    new = None
    if new_labels is not None:
        source = Path(new_labels) if isinstance(new_labels, str) else new_labels
        new = open_new_labels(
            loaded, chosen, source, weight_de=weight_de, show_progress=show_progress
        )
    return Predictor(loaded, chosen, labels, new)


def _device(name: torch.device | str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        first_line = str(error).split("\n")[0]
        raise UserError(f"device: {name!r} cannot be used ({first_line}); try cpu") from error
    return device


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise UserError("texts: found one text; needs a list of texts, such as [text]")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"texts[{place}]: found {type(text).__name__}; needs a text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"texts[{place}]: holds {text[error.start]!r}, half of a surrogate pair, which is "
                "no character; remove it"
            ) from None
