"""A prepared corpus: tokenised texts and positives, memory-mapped.

`data.prepare` writes what this module opens. A prepared corpus is a folder:

    corpus.json                      the manifest, written last: fingerprint, counts, oddities
    labels/  train/  test/           text tables, each a dataset that `datasets` loads from disk
    labels.has_text.npy              bool [L]
    {train,test}.positives.*.npy     positives and filter pairs as `Pairs`
    {train,test}.filter.*.npy

Everything is mapped, nothing is read whole: resident memory does not grow with the corpus, and the
operating system may drop every page of it. A step's tokens are gathered from the mapped Arrow
buffers by offsets, without a Python loop over rows.

Letters in names: n rows asked for, T their tokens, L labels, N queries.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from unidec_ds.data.files import shorten
from unidec_ds.data.keyed import hash64
from unidec_ds.data.pairs import Ids, Pairs
from unidec_ds.errors import CorpusError
from unidec_ds.settings import Settings

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "corpus.json"
ARROW_FILE = "data-00000-of-00001.arrow"
MAX_VALIDATION_QUERIES = 5000


class CorpusConfig(Settings):
    """Where the queries and labels come from."""

    path: str
    """A raw folder in one of the accepted layouts, a prepared corpus, or the name of an embedded
    corpus: `lf-wordnet-verbs-9k`, `lf-wordnet-84k`."""
    text: Literal["title", "title+content"] = "title+content"
    """What a text is made of. A record with an empty title is read by its content either way."""
    validation_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Share of the train queries set aside to select models on; at most 5,000 queries. Never takes
    a label's last positive, so it may be less. 0 trains on all."""
    prepared_dir: str = "prepared"
    """Folder under which raw corpora are prepared, one folder per corpus and tokenizer."""
    quarantine: str = ""
    """File for the bad lines of a raw corpus, which is then prepared without them. Empty: the first
    bad line is an error. No effect on a prepared corpus."""


class RaggedTokens(NamedTuple):
    """The tokens of several texts without padding.

    Args:
        values: int32 [T], the texts' tokens one after the other.
        offsets: int64 [n + 1]; text i holds `values[offsets[i]:offsets[i + 1]]`, never
            empty.
    """

    values: NDArray[np.int32]
    offsets: Ids


class TextTable:
    """The texts of one table: memory-mapped columns `uid`, `text` and `tokens`.

    Ids are row numbers; every method takes them in any order, repeated or not. Opening costs one
    read of the file's index (some 100 bytes per 131,072 rows).

    Args:
        folder: the table's folder; `datasets.load_from_disk` opens it too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        mapped = pa.memory_map(str(folder / ARROW_FILE)).read_buffer()
        self._table = pa.ipc.open_stream(mapped).read_all()
        # One int32 view of the whole file, with the place in it where each record batch's token
        # offsets and token values begin: a gather is then pure index arithmetic over all batches.
        self._words = np.frombuffer(mapped, np.int32, count=mapped.size // 4)
        batches = self._table.column("tokens").chunks
        self._first_row = np.cumsum([0] + [len(batch) for batch in batches])
        buffers = [batch.buffers() for batch in batches]
        self._offsets_at = np.array([b[1].address - mapped.address for b in buffers], np.int64) // 4
        self._values_at = np.array([b[3].address - mapped.address for b in buffers], np.int64) // 4

    def __reduce__(self) -> tuple[type[TextTable], tuple[Path]]:
        """Sends the folder, not the data, to another process."""
        return TextTable, (self.folder,)

    def __len__(self) -> int:
        return int(self._first_row[-1])

    @cached_property
    def dataset(self) -> Any:
        """The table as a `datasets.Dataset`."""
        import datasets

        return datasets.load_from_disk(str(self.folder))

    def token_counts(self, ids: Ids) -> NDArray[np.int32]:
        """Returns the number of tokens of each text, int32 [n]."""
        _, begins_n, ends_n = self._bounds(ids)
        return ends_n - begins_n

    def tokens(self, ids: Ids) -> RaggedTokens:
        """Returns the tokens of the texts, special tokens included.

        Cost: about 6 ns a token when the pages are in memory; touches those texts' pages only.
        """
        batch_n, begins_n, ends_n = self._bounds(ids)
        counts_n = ends_n - begins_n
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(counts_n, out=offsets[1:])
        shift_n = self._values_at[batch_n] + begins_n - offsets[:-1]
        where_T = np.repeat(shift_n, counts_n)
        where_T += np.arange(offsets[-1])
        return RaggedTokens(self._words[where_T], offsets)

    def texts(self, ids: Ids) -> list[str]:
        """Returns the texts, for people to read: copies only the rows asked for."""
        return self._strings("text", ids)

    def uids(self, ids: Ids) -> list[str]:
        """Returns the source's identifiers."""
        return self._strings("uid", ids)

    def _batch_of(self, ids: Ids) -> Ids:
        """Returns the record batch of each id."""
        assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < len(self)), "id out of range"
        return np.searchsorted(self._first_row, ids, side="right") - 1

    def _bounds(self, ids: Ids) -> tuple[Ids, NDArray[np.int32], NDArray[np.int32]]:
        """Returns each id's record batch and its tokens' begin and end within the batch."""
        batch_n = self._batch_of(ids)
        at_n = self._offsets_at[batch_n] + ids - self._first_row[batch_n]
        return batch_n, self._words[at_n], self._words[at_n + 1]

    def _strings(self, column: str, ids: Ids) -> list[str]:
        """Takes strings batch by batch; Arrow's own `take` would first join all batches."""
        batch_n = self._batch_of(ids)
        order = np.argsort(batch_n, kind="stable")
        taken: list[str] = []
        for batch in np.unique(batch_n):
            rows = ids[order[batch_n[order] == batch]] - self._first_row[batch]
            taken += self._table.column(column).chunk(int(batch)).take(pa.array(rows)).to_pylist()
        strings = np.empty(len(ids), object)
        strings[order] = taken
        return list(strings)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, opened.

    Query ids are per split, 0..N-1 in file order; label ids are 0..L-1.

    Args:
        path: its folder.
        name: what to call it in logs and recipes.
        fingerprint: hash of the sources, the tokenizer, the length and the text option.
        manifest: what corpus.json holds.
        labels: the label texts.
        queries: the query texts of "train" and, unless the source has no test set, of "test".
        positives: of each split, [N, L]; binary, repeated targets once. With its N and the counts
            of its columns, `positives["train"]` is what propensities are computed from.
        filter_pairs: of each split, [N, L]; empty where the source has no filter file.
        label_has_text: bool [L]. Labels without are for the classifier only; the tokens stored for
            them are those of the empty text.
        pad_token_id: with which to pad; never stored.
    """

    path: Path
    name: str
    fingerprint: str
    manifest: dict[str, Any]
    labels: TextTable
    queries: dict[str, TextTable]
    positives: dict[str, Pairs]
    filter_pairs: dict[str, Pairs]
    label_has_text: NDArray[np.bool_]
    pad_token_id: int

    @property
    def num_labels(self) -> int:
        """L."""
        return len(self.labels)

    def train_query_ids(self) -> Ids:
        """Returns the train queries that have a positive, ascending: those to train on."""
        return np.flatnonzero(self.positives["train"].row_counts())

    def describe(self) -> str:
        """Returns a page about the corpus for people: sizes, token lengths, oddities."""
        lines = [f"{self.name} ({self.manifest['layout']} layout), {self.path}"]
        lines.append(f"fingerprint {self.fingerprint[:16]}, text: {self.manifest['text']}")
        for table, counts in self.manifest["tables"].items():
            sizes = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items())
            lines.append(f"  {table}: {sizes}")
        for table, length in self.manifest["token_lengths"].items():
            lines.append(
                f"  {table} tokens: mean {length['mean']:.1f}, median {length['median']}, "
                f"p90 {length['p90']}, max {length['max']}; {length['share_at_limit']:.1%} reach "
                f"the limit of {self.manifest['max_length']}"
            )
        lines += describe_oddities(self.manifest["oddities"])
        lines += self.describe_put_aside()
        return "\n".join(lines)

    @property
    def num_lines_put_aside(self) -> int:
        """Bad lines of the source that were left out when it was prepared."""
        return int(self.manifest.get("put_aside", {}).get("lines", 0))

    def describe_put_aside(self) -> list[str]:
        """Returns a line about what was put aside, and one for each kind; none if nothing was."""
        counts = self.manifest.get("put_aside", {})
        return [
            f"  {text.format(counts[key])}" for key, text in PUT_ASIDE.items() if counts.get(key)
        ]


def describe_oddities(oddities: dict[str, int]) -> list[str]:
    """Returns a line for each kind of oddity that occurred."""
    return [f"  {text.format(oddities[key])}" for key, text in ODDITIES.items() if oddities[key]]


ODDITIES = {
    "train_queries_without_positive": "{:,} train queries without a positive: not trained on",
    "test_queries_without_positive": "{:,} test queries without a positive: kept, they score 0",
    "labels_without_text": "{:,} labels without text: scored by the classifier only",
    "labels_without_train_positive": "{:,} labels without a train positive: kept",
    "duplicate_label_uids": "{:,} labels repeat a uid: kept as labels of their own, targets given "
    "by uid mean the first",
    "duplicate_train_uids": "{:,} train queries repeat a uid: kept",
    "duplicate_test_uids": "{:,} test queries repeat a uid: kept",
    "empty_titles": "{:,} records with an empty title: read by their content",
    "empty_contents": "{:,} records with an empty content: read by their title",
    "repeated_targets": "{:,} targets listed twice for a query: counted once",
    "irrelevant_targets": "{:,} targets with relevance 0: left out",
}
"""What real data legitimately hold: how it is counted in the manifest, and what is done."""

PUT_ASIDE = {
    "lines": "{:,} bad lines put aside; because of them:",
    "labels": "  {:,} labels without a text: kept, so that no label changes its row",
    "train_queries": "  {:,} train queries left out, with their positives and filter pairs",
    "test_queries": "  {:,} test queries left out, with their positives and filter pairs",
    "filter_pairs": "  {:,} filter pairs left out",
}
"""What a quarantine took from a corpus, counted in the manifest."""


def open_corpus(path: Path) -> Corpus:
    """Opens a prepared corpus.

    Cost: milliseconds; maps the files, reads only their indexes.

    Raises:
        CorpusError: not a prepared corpus, of another version, or a file missing or of the wrong
            size.
    """
    advice = "Prepare it again from the raw files: `unidec-ds prepare RAW_DIR --out CORPUS_DIR`."
    if not (path / MANIFEST).is_file():
        raise CorpusError(f"{path}: not a prepared corpus, it has no {MANIFEST}. {advice}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorpusError(f"{path / MANIFEST}:1: not valid JSON ({error}). {advice}") from None
    except RecursionError:
        raise CorpusError(f"{path / MANIFEST}:1: JSON nested too deeply. {advice}") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CorpusError(
            f"{path / MANIFEST}:1: format version {shorten(version)}, needed "
            f"{FORMAT_VERSION}: another version of unidec_ds wrote it. {advice}"
        )
    try:
        _check_files(path, manifest["files"], advice)
        corpus = _open(path, manifest)
        _check_counts(corpus)
        corpus.describe()  # reads whatever else the manifest must hold
    except CorpusError:
        raise
    except Exception as error:  # a manifest or file of another shape: any kind, from any library
        raise CorpusError(
            f"{path / MANIFEST}:1: the manifest or a file it names is damaged "
            f"({type(error).__name__}: {error}). {advice}"
        ) from error
    return corpus


def _check_files(path: Path, files: dict[str, int], advice: str) -> None:
    """Raises unless every file of the manifest is in the corpus's folder, of its size."""
    for name, size in files.items():
        if not (path / name).resolve().is_relative_to(path.resolve()):
            raise CorpusError(
                f"{path / name}: a link to, or the name of, a file outside the corpus. {advice}"
            )
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            raise CorpusError(
                f"{path / name}: {'missing' if found is None else f'{found} bytes'}, needed "
                f"{size} bytes: the copy is not complete. {advice}"
            )


def _open(path: Path, manifest: dict[str, Any]) -> Corpus:
    splits = [split for split in ("train", "test") if split in manifest["tables"]]
    num_labels = manifest["tables"]["labels"]["labels"]
    return Corpus(
        path=path,
        name=manifest["name"],
        fingerprint=manifest["fingerprint"],
        manifest=manifest,
        labels=TextTable(path / "labels"),
        queries={split: TextTable(path / split) for split in splits},
        positives={split: Pairs.open(path, f"{split}.positives", num_labels) for split in splits},
        filter_pairs={split: Pairs.open(path, f"{split}.filter", num_labels) for split in splits},
        label_has_text=np.load(path / "labels.has_text.npy", mmap_mode="r"),
        pad_token_id=manifest["pad_token_id"],
    )


def _check_counts(corpus: Corpus) -> None:
    """Raises ValueError unless tables, pairs and manifest agree; reads no row."""
    num_labels, has_text = corpus.num_labels, corpus.label_has_text
    found: dict[str, Any] = {"labels.has_text.npy": (has_text.shape, has_text.dtype)}
    needed: dict[str, Any] = {"labels.has_text.npy": ((num_labels,), np.bool_)}
    sizes = {"labels": {"labels": num_labels}}
    for split, table in corpus.queries.items():
        sizes[split] = {"queries": len(table)}
        for kind, pairs in (("positive", corpus.positives), ("filter", corpus.filter_pairs)):
            indptr, indices = pairs[split].indptr, pairs[split].indices
            sizes[split][f"{kind}_pairs"] = len(indices)
            name = f"{split}.{kind}s"
            found[name] = (indptr.shape, indptr.dtype, *indptr[[0, -1]].tolist(), indices.dtype)
            needed[name] = ((len(table) + 1,), np.int64, 0, len(indices), np.int32)
    if found != needed or corpus.manifest["tables"] != sizes:
        raise ValueError(f"found {found} and {corpus.manifest['tables']}, needed {needed}, {sizes}")
    if not isinstance(corpus.fingerprint, str) or corpus.pad_token_id < 0:
        raise ValueError("fingerprint or pad_token_id is of another type")


def split_validation(corpus: Corpus, fraction: float, seed: int) -> tuple[Ids, Ids]:
    """Splits the trainable train queries into (train ids, validation ids), both ascending.

    Takes min(fraction, 5,000 queries) at random, but never a label's last positive: each label
    names one of its queries as a guardian that stays in train (a query that must stay anyway where
    it has one, else the last in a random order), and validation is drawn from the others. A pure
    function of the corpus and the seed.

    Cost: O(pairs), about 0.1 s a million; 16 bytes a query, 17 a label and a block of the pairs.
    """
    positives, candidates = corpus.positives["train"], corpus.train_query_ids()
    wanted = min(int(fraction * len(candidates)), MAX_VALIDATION_QUERIES)
    if wanted == 0:
        return candidates, candidates[:0]
    order_N = hash64(seed, "validation", np.arange(positives.num_rows)).argsort(kind="stable")
    rank_N = np.empty_like(order_N)
    rank_N[order_N] = np.arange(len(order_N))
    only_once_L = positives.column_counts() == 1
    guardian_L = np.full(corpus.num_labels, -1)
    for block in positives.row_blocks():  # M pairs
        at_M, labels_M = positives.take(block)
        rank_N[block[at_M[only_once_L[labels_M]]]] += positives.num_rows
        np.maximum.at(guardian_L, labels_M, rank_N[block[at_M]])
    free = candidates[~np.isin(rank_N[candidates], guardian_L)]
    if len(free) < wanted:
        logger.warning(
            "validation gets %d queries instead of %d: the other %d train queries each hold a "
            "label's last positive",
            len(free),
            wanted,
            len(candidates) - len(free),
        )
    validation = np.sort(free[np.argsort(rank_N[free])[:wanted]])
    return np.setdiff1d(candidates, validation, assume_unique=True), validation
