"""Reads corpora as they are published: every table as one stream of records.

The first stage of a corpus: `recognise` finds the layout by the files present, `RawCorpus` streams
its tables, `data.prepare` turns the records into memory-mapped tables. One record is held at a
time, so memory does not grow with the files. Every fault is a `CorpusError` that starts with
`file:line` (for npz and Parquet files and saved datasets: the row, from 1). Where one line is wrong
and not its file, a caller may take the fault (`OnFault`) and read on: the line's query is then left
out, its label stays, without a text, so that every other label keeps its row.

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

import numpy as np

from unidec_ds.data.files import OnFault, count_records, refuse
from unidec_ds.data.matrices import MatrixRow, SparseMatrixFile, read_pairs
from unidec_ds.data.pairs import Ids
from unidec_ds.data.records import (
    Record,
    read_label_records,
    read_query_records,
    with_relevant,
)
from unidec_ds.errors import CorpusError

LAYOUTS_WITHOUT_UIDS = ("Renee", "DEXML")
"""Their texts have no identifier: the row number takes its place as uid."""


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

    def labels(self, on_fault: OnFault = refuse) -> Iterator[Record]:
        """Yields the labels in row order. Labels without a text are legitimate.

        A malformed line that `on_fault` was told of is a label without text; it keeps its uid if
        that can be read.
        """
        return read_label_records(self.files["labels"], on_fault)

    def queries(
        self, split: str, num_labels: int, on_fault: OnFault = refuse
    ) -> Iterator[Record | None]:
        """Yields the queries of "train" or "test" in row order.

        Args:
            split: "train" or "test".
            num_labels: label rows are below it.
            on_fault: is told of a malformed line, a query without text or a label row out of range;
                in place of its query comes None.

        Raises:
            CorpusError: while iterating, where a file cannot be read on or those of a split
                disagree in length, or what `on_fault` raises.
        """
        path = self.files[split]
        records = read_query_records(path, num_labels, on_fault)
        if f"{split} positives" in self.files:
            matrix = SparseMatrixFile(self.files[f"{split} positives"])
            return _with_positives(records, path, matrix, num_labels, on_fault)
        return records

    def filter_pairs(
        self, split: str, num_queries: int, num_labels: int, on_fault: OnFault = refuse
    ) -> tuple[Ids, Ids]:
        """Returns the filter pairs of a split as (query rows, label rows); none without a file."""
        if split not in self.filter_files:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return read_pairs(self.filter_files[split], num_queries, num_labels, on_fault)


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
    return read_label_records(path, refuse)


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


def _with_positives(
    records: Iterator[Record | None],
    path: Path,
    matrix: SparseMatrixFile,
    num_labels: int,
    on_fault: OnFault,
) -> Iterator[Record | None]:
    """Joins texts with the rows of their positives; both must have the same number of rows."""
    if matrix.num_columns != num_labels:
        raise CorpusError(
            f"{matrix.path}:1: {matrix.num_columns} columns, but there are {num_labels} labels; "
            "both numbers must agree. Do the files belong to the same corpus?"
        )
    end = object()
    rows = matrix.rows(on_fault)
    for count, (record, row) in enumerate(itertools.zip_longest(records, rows, fillvalue=end)):
        if record is end or row is end:
            longer, shorter = (matrix.path, path) if record is end else (path, matrix.path)
            first_line = 2 if longer is matrix.path and matrix.has_header else 1
            raise CorpusError(
                f"{longer}:{count + first_line}: more rows than {shorter.name}, which ends after "
                f"{count}; both need one row per query. Is one of them cut short?"
            )
        if isinstance(record, Record) and isinstance(row, MatrixRow):
            yield with_relevant(record, row.columns, row.values)
        else:  # one of the two was put aside, and with it the query
            yield None
