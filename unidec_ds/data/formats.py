"""Reads corpora as they are published: every table as one stream of records.

The first stage of a corpus: `recognise` finds the layout by the files present, `RawCorpus` streams
its tables, `data.prepare` turns the records into memory-mapped tables. One record is held at a
time, so memory does not grow with the files. Every fault is a `CorpusError` that starts with
`file:line` (for npz and Parquet files and saved datasets: the row, from 1).

Layouts (text files gzipped or not):

* XMC repository: `lbl.json trn.json tst.json`, one object a line with `uid`, `title`, optionally
  `content`, and in queries `target_ind` (label rows from 0) and optionally `target_rel`.
* Renee: `Y.txt trn_X.txt tst_X.txt`, a text a line; `trn_X_Y.txt tst_X_Y.txt`, the positives as
  sparse text (see `data.matrices`).
* DEXML: the same texts under `raw/`, beside it the positives as `Y.trn.npz Y.tst.npz`.
* tables: `labels` with `id, text` and `queries` with `id, text, labels` (a list of label ids), each
  as `.jsonl`, as `.parquet` or as a folder written by `Dataset.save_to_disk` (so that a
  `DatasetDict` of these names serves too). `queries` is the train set; the test set is
  `queries_test`, which may be absent.

Each may have filter files, `filter_labels_{train,test}.txt` or `{trn,tst}_filter_labels.txt`:
lines of `query_row label_row`, from 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unidec_ds.data.files import (
    count_records,
    read_columns,
    read_json_objects,
    read_lines,
    shorten,
    valid_unicode,
)
from unidec_ds.data.matrices import SparseMatrixFile, check_range, read_pairs
from unidec_ds.data.pairs import Ids
from unidec_ds.errors import CorpusError

LAYOUTS_WITHOUT_UIDS = ("Renee", "DEXML")
"""Their texts have no identifier: the row number takes its place as uid."""


class Record(NamedTuple):
    """One query or label.

    Args:
        line: where it stands in its file, from 1.
        uid: the source's identifier; the row number, from 0, where a layout has none.
        title: stripped; the whole text where a layout has one text only. May be empty.
        content: stripped; may be empty.
        targets: the labels relevant to a query, by row, or by uid if
            `RawCorpus.targets_are_uids`. May repeat.
        num_irrelevant: labels left out of `targets` because the source gives them relevance 0.
    """

    line: int
    uid: str
    title: str
    content: str = ""
    targets: tuple[int, ...] | tuple[str, ...] = ()
    num_irrelevant: int = 0


@dataclass(frozen=True)
class Layout:
    """One way of publishing a corpus: for each role, the file names accepted for it."""

    name: str
    files: dict[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()


def _text_file(*names: str) -> tuple[str, ...]:
    return tuple(name + suffix for name in names for suffix in ("", ".gz"))


def _table(name: str) -> tuple[str, ...]:
    return (*_text_file(f"{name}.jsonl"), f"{name}.parquet", name)


LAYOUTS = (
    Layout(
        "XMC repository",
        {
            "labels": _text_file("lbl.json"),
            "train": _text_file("trn.json"),
            "test": _text_file("tst.json"),
        },
    ),
    Layout(
        "Renee",
        {
            "labels": _text_file("Y.txt"),
            "train": _text_file("trn_X.txt"),
            "test": _text_file("tst_X.txt"),
            "train positives": _text_file("trn_X_Y.txt"),
            "test positives": _text_file("tst_X_Y.txt"),
        },
    ),
    Layout(
        "DEXML",
        {
            "labels": _text_file("raw/Y.txt"),
            "train": _text_file("raw/trn_X.txt"),
            "test": _text_file("raw/tst_X.txt"),
            "train positives": ("Y.trn.npz",),
            "test positives": ("Y.tst.npz",),
        },
    ),
    Layout(
        "tables",
        {
            "labels": _table("labels"),
            "train": _table("queries"),
            "test": _table("queries_test"),
        },
        optional=("test",),
    ),
)

_FILTER_FILES = {
    "train": _text_file("filter_labels_train.txt", "trn_filter_labels.txt"),
    "test": _text_file("filter_labels_test.txt", "tst_filter_labels.txt"),
}


@dataclass(frozen=True)
class RawCorpus:
    """A folder in one of the layouts; its files were found, not yet read.

    Args:
        folder: the folder.
        layout: the layout's name.
        files: the file of each role: "labels", "train", maybe "test", and where the positives
            have files of their own, "train positives" and "test positives".
        filter_files: the filter file of each split that has one.
    """

    folder: Path
    layout: str
    files: dict[str, Path]
    filter_files: dict[str, Path]

    @property
    def splits(self) -> tuple[str, ...]:
        """The query tables: ("train", "test") or ("train",)."""
        return tuple(split for split in ("train", "test") if split in self.files)

    @property
    def targets_are_uids(self) -> bool:
        """Whether queries name their labels by uid (tables) or by row (the other layouts)."""
        return self.layout == "tables"

    @property
    def has_content(self) -> bool:
        """Whether the layout tells titles from contents."""
        return self.layout == "XMC repository"

    def source_files(self) -> list[Path]:
        """Returns every file that the corpus is made of."""
        paths = [*self.files.values(), *self.filter_files.values()]
        return [file for path in paths for file in _files_under(path)]

    def count(self, table: str) -> int:
        """Returns how many records "labels", "train" or "test" has, about: for progress bars."""
        return count_records(self.files[table])

    def labels(self) -> Iterator[Record]:
        """Yields the labels in row order. Labels without a text are legitimate."""
        return _read_table(self.files["labels"], queries=False)

    def queries(self, split: str, num_labels: int) -> Iterator[Record]:
        """Yields the queries of "train" or "test" in row order.

        Raises:
            CorpusError: while iterating, at a malformed line, a query without text, a label row
                outside 0..num_labels-1, or where the files of a split disagree in length.
        """
        path = self.files[split]
        records = _read_table(path, queries=True)
        if f"{split} positives" in self.files:
            matrix = SparseMatrixFile(self.files[f"{split} positives"])
            records = _with_positives(records, path, matrix, num_labels)
        for record in records:
            if not record.title and not record.content:
                raise CorpusError(
                    f"{path}:{record.line}: a query without text; every query needs one. "
                    "Give it a text, or remove it (from the positives and filter files too)."
                )
            if self.layout == "XMC repository":
                check_range(record.targets, num_labels, path, record.line)  # type: ignore[arg-type]
            yield record

    def filter_pairs(self, split: str, num_queries: int, num_labels: int) -> tuple[Ids, Ids]:
        """Returns the filter pairs of a split as (query rows, label rows); none without a file."""
        if split not in self.filter_files:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return read_pairs(self.filter_files[split], num_queries, num_labels)


def read_labels(path: Path) -> Iterator[Record]:
    """Yields the labels of one file with uids: `labels` of tables, or `lbl.json`, gzipped or not.

    Raises:
        CorpusError: there is none, it is of another kind, or (while iterating) a malformed line.
    """
    kinds = (".jsonl", ".parquet", ".json")
    is_dataset = (path / "state.json").is_file()
    if not is_dataset and not path.is_file():
        raise CorpusError(f"{path}: there is no such file; a file of labels was needed.")
    if not is_dataset and not path.name.removesuffix(".gz").endswith(kinds):
        raise CorpusError(
            f"{path}: not a kind of file that names its labels; needed `id, text` as .jsonl or "
            ".parquet or a saved dataset, or `uid, title, content` as .json (text files gzipped or "
            "not)."
        )
    return _read_table(path, queries=False)


def recognise(folder: Path) -> RawCorpus:
    """Returns the raw corpus that `folder` holds, told by the files present.

    Where a folder holds several layouts, the first in the order of `LAYOUTS` is taken; where a
    file is there both plain and gzipped, the plain one.

    Raises:
        CorpusError: not a folder, or no layout is complete; lists what was found and accepted.
    """
    if not folder.is_dir():
        raise CorpusError(f"{folder}: not a folder; a folder that holds a corpus was needed.")
    for layout in LAYOUTS:
        found = {role: _first_present(folder, names) for role, names in layout.files.items()}
        if all(found[role] or role in layout.optional for role in found):
            files = {role: path for role, path in found.items() if path}
            filters = {
                split: path
                for split, names in _FILTER_FILES.items()
                if split in files and (path := _first_present(folder, names))
            }
            return RawCorpus(folder, layout.name, files, filters)
    present = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(present) - 20} more" if len(present) > 20 else ""
    raise CorpusError(
        f"{folder}: holds no complete corpus.\n"
        f"  found: {', '.join(present[:20]) or 'nothing'}{more}\n"
        "  needed, in one of these layouts (text files gzipped or not):\n"
        + "\n".join(f"    {_requirements(folder, layout)}" for layout in LAYOUTS)
        + "\n  Add what is missing, or name the folder that holds these files."
    )


def _requirements(folder: Path, layout: Layout) -> str:
    """Returns a layout's required files and, if some are there, which are not."""
    needed, missing = [], []
    for role, names in layout.files.items():
        if role in layout.optional:
            continue
        tabular = names[0].endswith(".jsonl")
        needed.append(f"{names[-1]}.jsonl, .parquet or saved dataset" if tabular else names[0])
        if not _first_present(folder, names):
            missing.append(names[-1] if tabular else names[0])
    note = f"  <- missing here: {', '.join(missing)}" if len(missing) < len(needed) else ""
    return f"{layout.name}: {'; '.join(needed)}{note}"


def _first_present(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Returns the first of `names` that is a file or a saved dataset."""
    paths = (folder / name for name in names)
    return next((p for p in paths if p.is_file() or (p / "state.json").is_file()), None)


def _files_under(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _read_table(path: Path, *, queries: bool) -> Iterator[Record]:
    """Yields the records of one table file, whatever its kind."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".txt"):
        return (Record(n, str(n - 1), text.strip()) for n, text in read_lines(path))
    return _read_xmc(path, queries) if name.endswith(".json") else _read_rows(path, queries)


def _read_xmc(path: Path, queries: bool) -> Iterator[Record]:
    """Yields the records of a file of the XMC repository."""
    required = ("uid", "title", "target_ind") if queries else ("uid", "title")
    for line, row in read_json_objects(path):
        _require(row, required, path, line)
        record = Record(
            line,
            _uid(row["uid"], "uid", path, line),
            _text(row, "title", path, line),
            _text(row, "content", path, line),
        )
        yield _with_targets(record, row, path) if queries else record


def _with_targets(record: Record, row: dict[str, Any], path: Path) -> Record:
    """Adds the labels of `target_ind` whose `target_rel`, if given, is not zero."""
    targets, relevances = row["target_ind"], row.get("target_rel")
    if not isinstance(targets, list) or any(type(label) is not int for label in targets):
        raise CorpusError(
            f"{path}:{record.line}: target_ind is {shorten(targets)}, needed a list of integers "
            "(label rows counted from 0)."
        )
    if relevances is None:
        return record._replace(targets=tuple(targets))
    if not isinstance(relevances, list) or len(relevances) != len(targets):
        raise CorpusError(
            f"{path}:{record.line}: target_rel is {shorten(relevances)}, needed a list of "
            f"{len(targets)} numbers, one for each entry of target_ind."
        )
    return _with_relevant(record, targets, relevances)


def _with_relevant(record: Record, targets: list[int], relevances: list[float]) -> Record:
    """Adds the targets whose relevance is not zero and counts the others."""
    relevant = tuple(itertools.compress(targets, relevances))
    return record._replace(targets=relevant, num_irrelevant=len(targets) - len(relevant))


def _read_rows(path: Path, queries: bool) -> Iterator[Record]:
    """Yields the records of a JSONL file, a Parquet file or a saved dataset."""
    columns = ("id", "text", "labels") if queries else ("id", "text")
    jsonl = path.name.endswith((".jsonl", ".jsonl.gz"))
    for line, row in read_json_objects(path) if jsonl else read_columns(path, columns):
        _require(row, columns if queries else ("id",), path, line)
        record = Record(line, _uid(row["id"], "id", path, line), _text(row, "text", path, line))
        if queries:
            labels = row["labels"]
            if not isinstance(labels, list):
                raise CorpusError(
                    f"{path}:{line}: labels is {shorten(labels)}, needed a list of label ids "
                    "(empty for none)."
                )
            targets = tuple(_uid(label, "an entry of labels", path, line) for label in labels)
            record = record._replace(targets=targets)
        yield record


def _with_positives(
    records: Iterator[Record], path: Path, matrix: SparseMatrixFile, num_labels: int
) -> Iterator[Record]:
    """Joins texts with the rows of their positives; both must have the same number of rows."""
    if matrix.num_columns != num_labels:
        raise CorpusError(
            f"{matrix.path}:1: {matrix.num_columns} columns, but there are {num_labels} labels; "
            "both numbers must agree. Do the files belong to the same corpus?"
        )
    count = 0
    for record, row in itertools.zip_longest(records, matrix):
        if record is None or row is None:
            longer, shorter = (matrix.path, path) if record is None else (path, matrix.path)
            raise CorpusError(
                f"{longer}:{(row or record).line}: more rows than {shorter.name}, which ends after "
                f"{count}; both need one row per query. Is one of them cut short?"
            )
        count += 1  # noqa: SIM113 (needed after the shorter one ends)
        yield _with_relevant(record, row.columns, row.values)


def _require(row: dict[str, Any], keys: tuple[str, ...], path: Path, line: int) -> None:
    missing = [key for key in keys if key not in row]
    if missing:
        raise CorpusError(
            f"{path}:{line}: {', '.join(missing)} missing; found {', '.join(row) or 'nothing'}, "
            f"needed {', '.join(keys)}."
        )


def _uid(value: object, key: str, path: Path, line: int) -> str:
    if type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise CorpusError(f"{path}:{line}: {key} is {shorten(value)}, needed text or an integer.")
    return valid_unicode(value, key, path, line)


def _text(row: dict[str, Any], key: str, path: Path, line: int) -> str:
    """Returns a text field, stripped; a missing or null one is empty."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorpusError(f"{path}:{line}: {key} is {shorten(value)}, needed text.")
    return valid_unicode(value, key, path, line).strip()
