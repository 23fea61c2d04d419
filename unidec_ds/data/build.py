"""Writes a prepared corpus from a stream of records: batches, tokenizer, Arrow files, pairs.

`data.prepare` decides when and where; this module does it, in one pass over the labels, then the
train and the test queries. Memory: some 150 MB however large the files, plus 17 bytes a label and
24 bytes a query (digests of uids, counts) and 16 bytes a filter pair.

The tokens of a batch are made by the tokenizer of `tokenizers` on all cores (RAYON_NUM_THREADS);
one written in Python works too, on one core.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from unidec_ds.data.corpus import ARROW_FILE, MANIFEST, ODDITIES, PUT_ASIDE
from unidec_ds.data.files import LineError, OnFault, refuse
from unidec_ds.data.formats import RawCorpus
from unidec_ds.data.pairs import Ids, Pairs, distinct
from unidec_ds.data.quarantine import Quarantine
from unidec_ds.data.records import Record
from unidec_ds.data.uids import UidDigests
from unidec_ds.errors import CorpusError

_BATCH_ROWS, _BATCH_CHARS = 8192, 1 << 24  # what the tokenizer gets at once
_BATCH_TARGETS = 1 << 20  # Python integers: 40 bytes each
_CHUNK_ROWS, _CHUNK_BYTES = 131072, 1 << 27  # one Arrow record batch on disk
_FEATURES = datasets.Features(
    {
        "uid": datasets.Value("string"),
        "text": datasets.Value("string"),
        "tokens": datasets.Sequence(datasets.Value("int32")),
    }
)


def build(
    folder: Path,
    raw: RawCorpus,
    tokenizer: Any,
    manifest: dict[str, Any],
    show_progress: bool,
    quarantine: Quarantine | None = None,
) -> None:
    """Writes a whole prepared corpus into an empty folder, the manifest last.

    Args:
        folder: where to write.
        raw: the source.
        tokenizer: of `transformers`, fast or slow.
        manifest: what identifies the corpus: "name", "fingerprint", "max_length", "text", ...;
            written out with the counts added.
        show_progress: whether to draw a progress bar per table on stderr.
        quarantine: where bad lines go; None refuses the first.

    Raises:
        CorpusError: a fault in the source files.
    """
    builder = _Builder(folder, raw, tokenizer, manifest, show_progress, quarantine)
    labels = builder.labels()
    for split in raw.splits:
        builder.queries(split, labels)
    builder.finish()


def text_of(record: Record, option: str) -> str:
    """Returns a record's text under the option "title" or "title+content"; "" if it has none."""
    if option == "title":
        return record.title or record.content
    return f"{record.title} {record.content}".strip()


class _Builder:
    """The state of one build: what was written and counted so far."""

    def __init__(
        self,
        folder: Path,
        raw: RawCorpus,
        tokenizer: Any,
        manifest: dict[str, Any],
        bar: bool,
        quarantine: Quarantine | None,
    ) -> None:
        self._folder, self._raw, self._tokenizer, self._bar = folder, raw, tokenizer, bar
        self._quarantine = quarantine
        self._on_fault: OnFault = quarantine or refuse
        self._put_aside = Counter(dict.fromkeys(PUT_ASIDE, 0))
        self._counted = 0
        pad_token_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._manifest = {
            **manifest,
            "layout": raw.layout,
            "pad_token_id": next(token for token in pad_token_ids if token is not None),
        }
        self._tables: dict[str, dict[str, int]] = {}
        self._lengths: dict[str, dict[str, float]] = {}
        self._oddities = Counter(dict.fromkeys(ODDITIES, 0))

    def labels(self) -> UidDigests:
        """Writes the label texts; returns the labels' uids."""
        uids = UidDigests()
        has_text: list[NDArray[np.bool_]] = [np.zeros(0, np.bool_)]
        for batch in self._write_table("labels", _batches(self._raw.labels(self._on_fault))):
            uids.add(record.uid for record in batch)
            has_text.append(np.array([r.title + r.content != "" for r in batch], np.bool_))
        has_text_L = np.concatenate(has_text)
        if len(has_text_L) == 0:
            raise CorpusError(f"{self._raw.files['labels']}:1: an empty file, needed labels.")
        np.save(self._folder / "labels.has_text.npy", has_text_L)
        self._oddities["labels_without_text"] = int((~has_text_L).sum())
        self._oddities["duplicate_label_uids"] = uids.num_repeated()
        self._tables["labels"] = {"labels": len(has_text_L)}
        self._put_aside["labels"] = self._num_put_aside()
        return uids

    def queries(self, split: str, labels: UidDigests) -> None:
        """Writes a split's texts, positives and filter pairs."""
        num_labels = self._tables["labels"]["labels"]
        uids, pairs = UidDigests(), _PairsWriter(self._folder / f"{split}.spool", num_labels)
        left_out: list[int] = []
        for batch in self._write_table(split, self._query_batches(split, labels, left_out)):
            uids.add(record.uid for record in batch)
            counts = np.array([len(record.targets) for record in batch])
            targets: list[Any] = list(chain.from_iterable(record.targets for record in batch))
            pairs.add(counts, np.array(targets, np.int64))
            self._oddities["irrelevant_targets"] += sum(record.num_irrelevant for record in batch)
        positives = pairs.finish(self._folder, f"{split}.positives")
        self._put_aside[f"{split}_queries"] = len(left_out)
        self._num_put_aside()
        filter_pairs = self._filter_pairs(split, positives, np.array(left_out, np.int64))
        filter_pairs.save(self._folder, f"{split}.filter")

        self._tables[split] = {
            "queries": positives.num_rows,
            "positive_pairs": positives.num_pairs,
            "filter_pairs": filter_pairs.num_pairs,
        }
        self._oddities["repeated_targets"] += pairs.num_repeated
        self._oddities[f"duplicate_{split}_uids"] = uids.num_repeated()
        without = int((positives.row_counts() == 0).sum())
        self._oddities[f"{split}_queries_without_positive"] = without
        if split == "train":
            self._oddities["labels_without_train_positive"] = int((~pairs.seen_L).sum())
            if positives.num_pairs == 0:
                raise CorpusError(
                    f"{self._raw.files['train']}:1: no train query has a positive; there is "
                    "nothing to train on. Are these the right files?"
                )

    def _query_batches(
        self, split: str, labels: UidDigests, left_out: list[int]
    ) -> Iterator[list[Record]]:
        """Yields a split's queries, their targets as label rows.

        The rows of those that were put aside are added to `left_out`.
        """
        num_labels = self._tables["labels"]["labels"]
        records = self._raw.queries(split, num_labels, self._on_fault)
        for batch in _batches(_present(records, left_out)):
            if self._raw.targets_are_uids:
                batch = self._resolve(split, batch, labels, left_out)
            if batch:  # all of it may have been put aside
                yield batch

    def _resolve(
        self, split: str, batch: list[Record], labels: UidDigests, left_out: list[int]
    ) -> list[Record]:
        """Returns the records with targets as rows; those with a target that is no label go."""
        rows = iter(labels.rows(str(t) for record in batch for t in record.targets).tolist())
        resolved = []
        for record in batch:
            targets = tuple(islice(rows, len(record.targets)))
            if -1 in targets:
                left_out.append(record.row)
                self._on_fault(self._unknown_label(split, record, targets))
            else:
                resolved.append(record._replace(targets=targets))
        return resolved

    def _unknown_label(self, split: str, record: Record, rows: tuple[int, ...]) -> LineError:
        """Returns the fault of a query with a target that is no label."""
        unknown = record.targets[rows.index(-1)]
        reason = (
            f"label id {unknown!r} is not an id in {self._raw.files['labels'].name}. Add the label "
            "there, or remove it here."
        )
        text = json.dumps({"id": record.uid, "text": record.title, "labels": record.targets})
        return LineError(self._raw.files[split], record.line, reason, text)

    def _filter_pairs(self, split: str, positives: Pairs, left_out: Ids) -> Pairs:
        """Reads a split's filter pairs; those of queries that were left out go with them."""
        num_queries, num_labels = positives.num_rows, positives.num_columns
        num_rows = num_queries + len(left_out)
        rows, columns = self._raw.filter_pairs(split, num_rows, num_labels, self._on_fault)
        self._put_aside["filter_pairs"] += self._num_put_aside()
        if len(left_out):
            kept = np.ones(num_rows, np.bool_)
            kept[left_out] = False
            columns = columns[kept[rows]]
            rows = (np.cumsum(kept) - 1)[rows[kept[rows]]]
        return Pairs.from_pairs(rows, columns, num_queries, num_labels)

    def _num_put_aside(self) -> int:
        """Returns how many lines went into quarantine since the last call."""
        before, self._counted = self._counted, self._quarantine.num_lines if self._quarantine else 0
        return self._counted - before

    def finish(self) -> None:
        """Writes the manifest."""
        if self._quarantine is not None:
            self._put_aside["lines"] = self._quarantine.num_lines
            self._manifest["put_aside"] = dict(self._put_aside)
        self._manifest |= {
            "tables": self._tables,
            "token_lengths": self._lengths,
            "oddities": dict(self._oddities),
            "files": {
                path.relative_to(self._folder).as_posix(): path.stat().st_size
                for path in sorted(self._folder.rglob("*"))
                if path.is_file()
            },
        }
        text = json.dumps(self._manifest, indent=2) + "\n"
        (self._folder / MANIFEST).write_text(text, encoding="utf-8")

    def _write_table(self, name: str, batches: Iterator[list[Record]]) -> Iterator[list[Record]]:
        """Tokenises and writes a table; yields its records, batch by batch, on the way."""
        limit, option = self._manifest["max_length"], self._manifest["text"]
        length_counts = np.zeros(limit + 1, np.int64)
        progress = tqdm(
            desc=f"{self._manifest['name']} {name}",
            total=self._raw.count(name) if self._bar else None,
            unit=" texts",
            disable=not self._bar,
            mininterval=0.5,
        )
        seed = f"{self._manifest['fingerprint']} {name}"
        with progress, TextTableWriter(self._folder / name, seed) as table:
            for batch, texts, tokens in self._tokenised(batches):
                table.add([record.uid for record in batch], texts, tokens)
                length_counts += np.bincount([len(t) for t in tokens], minlength=limit + 1)
                if self._raw.has_content:
                    self._count_empty_parts(batch, option)
                progress.update(len(batch))
                yield batch
        self._lengths[name] = _length_statistics(length_counts)

    def _tokenised(
        self, batches: Iterator[list[Record]]
    ) -> Iterator[tuple[list[Record], list[str], list[list[int]]]]:
        """Yields the batches with texts and tokens; reads ahead while tokenising."""
        with ThreadPoolExecutor(1) as tokenising:
            current: tuple[list[Record], list[str], Future[list[list[int]]]] | None = None
            for batch in batches:
                texts = [text_of(record, self._manifest["text"]) for record in batch]
                last, current = current, (batch, texts, tokenising.submit(self._tokenise, texts))
                if last is not None:
                    yield last[0], last[1], last[2].result()
            if current is not None:
                yield current[0], current[1], current[2].result()

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        """Returns the tokens of each text, never none: a padding token where there is no other."""
        limit = self._manifest["max_length"]
        if self._tokenizer.is_fast:  # the call below does the same, at 1.6 times the cost
            backend = self._tokenizer.backend_tokenizer
            backend.no_padding()
            backend.enable_truncation(limit, direction=self._tokenizer.truncation_side)
            ids = (encoding.ids for encoding in backend.encode_batch_fast(texts))
        else:
            ids = self._tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        return [tokens or [self._manifest["pad_token_id"]] for tokens in ids]

    def _count_empty_parts(self, batch: list[Record], option: str) -> None:
        self._oddities["empty_titles"] += sum(not r.title and bool(r.content) for r in batch)
        if option != "title":
            self._oddities["empty_contents"] += sum(bool(r.title) and not r.content for r in batch)


class TextTableWriter:
    """Writes one text table as a folder that `datasets.load_from_disk` maps.

    Rows are gathered into record batches of 131,072 (fewer if their texts pass 128 MB), so that a
    table has few of them.

    Args:
        folder: the table's folder, created here.
        seed: from which the dataset's own fingerprint is made, so that it is reproducible.
    """

    def __init__(self, folder: Path, seed: str) -> None:
        self._folder, self._seed = folder, seed
        folder.mkdir()
        self._schema = _FEATURES.arrow_schema
        self._stream = pa.ipc.new_stream(str(folder / ARROW_FILE), self._schema)
        self._waiting: list[pa.RecordBatch] = []

    def __enter__(self) -> TextTableWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self._stream.close()
            return
        self._flush()
        self._stream.close()
        state: dict[str, Any] = {
            "_data_files": [{"filename": ARROW_FILE}],
            "_fingerprint": sha256(self._seed.encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (self._folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        datasets.DatasetInfo(features=_FEATURES).write_to_directory(str(self._folder))

    def add(self, uids: list[str], texts: list[str], tokens: list[list[int]]) -> None:
        """Appends rows; `tokens` holds at least one token for each."""
        types = self._schema.types
        columns = [pa.array(c, t) for c, t in zip((uids, texts, tokens), types, strict=True)]
        self._waiting.append(pa.record_batch(columns, schema=self._schema))
        if (
            sum(batch.num_rows for batch in self._waiting) >= _CHUNK_ROWS
            or sum(batch.nbytes for batch in self._waiting) >= _CHUNK_BYTES
        ):
            self._flush()

    def _flush(self) -> None:
        table = pa.Table.from_batches(self._waiting, self._schema).combine_chunks()
        for batch in table.to_batches():
            self._stream.write_batch(batch)
        self._waiting = []


class _PairsWriter:
    """Collects a split's positives row by row on disk, then saves them as `Pairs`.

    Attributes:
        num_repeated: how many targets were listed more than once for their query.
        seen_L: bool [L], the labels that occurred.
    """

    def __init__(self, spool: Path, num_labels: int) -> None:
        self._spool = spool
        self._counts: list[Ids] = []
        self.num_repeated = 0
        self.seen_L = np.zeros(num_labels, np.bool_)

    def add(self, counts: Ids, columns: Ids) -> None:
        """Appends rows: row i has the next `counts[i]` of `columns`, which may repeat."""
        num_labels = len(self.seen_L)
        keys = distinct(np.repeat(np.arange(len(counts)), counts) * num_labels + columns)
        self.num_repeated += len(columns) - len(keys)
        self._counts.append(np.bincount(keys // num_labels, minlength=len(counts)))
        with self._spool.open("ab") as stream:
            (keys % num_labels).astype(np.int32).tofile(stream)
        self.seen_L[columns] = True

    def finish(self, folder: Path, name: str) -> Pairs:
        """Saves the pairs under `name`, removes the spool and returns them memory-mapped."""
        num_labels = len(self.seen_L)
        indptr = np.zeros(1 + sum(map(len, self._counts)), np.int64)
        np.cumsum(np.concatenate([indptr[:0], *self._counts]), out=indptr[1:])
        indices = np.memmap(self._spool, np.int32, "r") if indptr[-1] else np.zeros(0, np.int32)
        Pairs(indptr, indices, num_labels).save(folder, name)
        self._spool.unlink(missing_ok=True)
        return Pairs.open(folder, name, num_labels)


def _present(records: Iterator[Record | None], left_out: list[int]) -> Iterator[Record]:
    """Yields the records that are there; adds the rows of the others to `left_out`."""
    for row, record in enumerate(records):
        if record is None:
            left_out.append(row)
        else:
            yield record


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Yields the records in lists that are large enough to tokenise in parallel."""
    batch: list[Record] = []
    num_chars = num_targets = 0
    for record in records:
        batch.append(record)
        num_chars += len(record.title) + len(record.content)
        num_targets += len(record.targets)
        if len(batch) == _BATCH_ROWS or num_chars >= _BATCH_CHARS or num_targets >= _BATCH_TARGETS:
            yield batch
            batch, num_chars, num_targets = [], 0, 0
    if batch:
        yield batch


def _length_statistics(counts: Ids) -> dict[str, float]:
    """Returns statistics of lengths 0, 1, ... that occur `counts` times."""
    total = max(int(counts.sum()), 1)
    shares = np.cumsum(counts) / total
    return {
        "mean": round(float(counts @ np.arange(len(counts))) / total, 3),
        "median": int(np.searchsorted(shares, 0.5)),
        "p90": int(np.searchsorted(shares, 0.9)),
        "max": int(np.flatnonzero(counts)[-1]) if counts.any() else 0,
        "share_at_limit": round(float(counts[-1]) / total, 5),
    }
