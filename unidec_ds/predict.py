"""Predicts labels for texts with a trained run.

Label texts are embedded once per checkpoint and kept in the run directory as a memory-mapped
array; a query then costs one encoder call and one exact search over the labels.

Shape legend: n texts, L labels, D width, K labels per text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unidec_ds.assembly import LoadedRun, load_run
from unidec_ds.batch import make_chunks
from unidec_ds.data.corpus import RaggedTokens
from unidec_ds.data.pairs import Ids
from unidec_ds.embedding import chunk_size
from unidec_ds.encoders import load_tokenizer
from unidec_ds.errors import UserError
from unidec_ds.evaluation import SearchView
from unidec_ds.label_vectors import choose_view, label_vectors, query_vectors
from unidec_ds.model import Chunk
from unidec_ds.search import exact_search, fixed_blocks

_BATCH = 256


class Label(NamedTuple):
    """One predicted label."""

    label_id: int
    uid: str
    text: str
    score: float


class Predictor:
    """A trained run that answers texts. Make it with `Predictor.load`.

    Args:
        run: the run.
        view: what to rank by; default the last of the views it was trained for.
    """

    def __init__(self, run: LoadedRun, view: SearchView | None = None) -> None:
        self.view = choose_view(run, view)
        self._run = run
        self._device = next(run.model.parameters()).device
        self._tokenizer: Any = load_tokenizer(run.recipe.encoder.name)
        self._labels_LV = torch.from_numpy(label_vectors(run, self.view).vectors_LV)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        device: torch.device | str = "cpu",
        corpus: Path | None = None,
        view: SearchView | None = None,
    ) -> Predictor:
        """Returns a predictor for the newest checkpoint of a run directory.

        Raises:
            CheckpointError: no usable checkpoint.
            UserError: the run was not trained for `view`.
        """
        return cls(load_run(Path(folder), torch.device(device), corpus), view)

    @torch.no_grad()
    def predict(self, texts: list[str], k: int = 5) -> list[list[Label]]:
        """Returns the `k` best labels of each text, best first; fewer if there are fewer labels.

        A text without any word gets an empty list.
        """
        answers: list[list[Label]] = []
        for start, end in fixed_blocks(len(texts), _BATCH):
            scores, ids = exact_search(self._query_vectors(texts[start:end]), self._labels_LV, k)
            for text, row_scores, row_ids in zip(
                texts[start:end], scores.tolist(), ids.cpu().numpy(), strict=True
            ):
                found = row_ids[row_ids >= 0] if text.strip() else row_ids[:0]
                answers.append(self._describe(found, row_scores))
        return answers

    def predict_lines(self, source: str, *, k: int, as_json: bool) -> Iterator[str]:
        """Yields one block of output for each line of a file, or of standard input for "-".

        Raises:
            UserError: the file is not there or not UTF-8.
        """
        for texts in _batches_of_lines(source):
            for text, labels in zip(texts, self.predict(texts, k), strict=True):
                if as_json:
                    found = [label._asdict() for label in labels]
                    yield json.dumps({"text": text, "labels": found}, ensure_ascii=False)
                else:
                    yield text
                    yield from (f"  {x.score:6.3f}  {x.uid}  {x.text}" for x in labels)

    def _describe(self, label_ids: Ids, scores: list[float]) -> list[Label]:
        labels = self._run.corpus.labels
        columns = (labels.uids(label_ids), labels.texts(label_ids), scores)
        return [
            Label(int(i), *rest)
            for i, rest in zip(label_ids, zip(*columns, strict=False), strict=False)
        ]

    def _query_vectors(self, texts: list[str]) -> Tensor:
        model = self._run.model
        encoded = self._tokenizer(
            texts, truncation=True, max_length=self._run.recipe.encoder.max_length
        )["input_ids"]
        offsets = np.cumsum([0, *map(len, encoded)])
        tokens = RaggedTokens(np.concatenate(encoded).astype(np.int32), offsets)
        chunks, order = make_chunks(tokens, chunk_size(self._device), self._run.corpus.pad_token_id)
        pooled = torch.cat([model.pool(Chunk(*(p.to(self._device) for p in c))) for c in chunks])
        pooled = pooled.index_select(0, order.to(self._device))
        return query_vectors(model, pooled, self.view)


def _batches_of_lines(source: str) -> Iterator[list[str]]:
    try:
        stream = sys.stdin if source == "-" else open(source, encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--input: {source} cannot be read: {error.strerror}") from error
    with stream:
        batch: list[str] = []
        try:
            for line in stream:
                batch.append(line.rstrip("\n"))
                if len(batch) == _BATCH or (source == "-" and sys.stdin.isatty()):
                    yield batch
                    batch = []
        except UnicodeDecodeError as error:
            raise UserError(f"--input: {source} is not UTF-8: {error}") from error
        if batch:
            yield batch
