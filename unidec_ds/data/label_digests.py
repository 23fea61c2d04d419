"""Which labels a run's classifier rows stand for, told without its corpus.

A label is known by its uid; in a layout without uids, where the row number stands in for one, by
its text. A run directory keeps the digests of its labels (16 bytes each), so that its corpus may
grow in place and the run still be built upon.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from unidec_ds.data.corpus import Corpus
from unidec_ds.data.formats import LAYOUTS_WITHOUT_UIDS
from unidec_ds.data.uids import UidDigests

FILE = "label_digests.npy"

_ROWS_AT_ONCE = 65_536


def known_by(corpus: Corpus) -> str:
    """Returns what tells the corpus's labels apart: "uid" or "text"."""
    return "text" if corpus.manifest["layout"] in LAYOUTS_WITHOUT_UIDS else "uid"


def names_to_digest(corpus: Corpus, uids: Iterable[str], texts: Iterable[str]) -> list[str]:
    """Returns what stands for labels of the corpus or for others like them."""
    if known_by(corpus) == "uid":
        return list(uids)
    return [f"text\n{text}" for text in texts]  # never equal to another corpus's uid


def label_digests(corpus: Corpus) -> UidDigests:
    """Returns the digests of all labels; about 1.5 µs a label."""
    digests = UidDigests()
    for start in range(0, corpus.num_labels, _ROWS_AT_ONCE):
        ids = np.arange(start, min(start + _ROWS_AT_ONCE, corpus.num_labels))
        digests.add(names_to_digest(corpus, corpus.labels.uids(ids), corpus.labels.texts(ids)))
    return digests


def write_label_digests(run: Path, corpus: Corpus) -> None:
    """Writes the digests into a run directory, unless they are there."""
    if not (run / FILE).is_file():
        beside = run / f"new.{FILE}"
        label_digests(corpus).save(beside)
        beside.replace(run / FILE)
