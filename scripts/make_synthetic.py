"""Writes a made-up corpus of any size, in the layout of the XMC repository.

    python scripts/make_synthetic.py --shape 1.3m --out DIR
    python scripts/make_synthetic.py --train-queries 5000 --test-queries 500 --labels 3000 --out DIR

For measuring speed and memory at sizes that cannot be shipped, never for accuracy. What it keeps of
the real corpora: the counts, short titles, log-normal positives per query, popular labels (weights
with a Pareto tail; one positive in twenty drawn from all labels), and that texts tell something:
labels stand on a line, a query has a place on it, and its positives are labels nearby, popular ones
more often. The words of a text name its place at four scales (4,096 labels, 256, 16, its own), so
an encoder can learn the relation; one word in ten is noise.

The files are a function of the sizes and the seed. Memory: 12 bytes a label and some 250 MB for
the block of queries in hand, however many there are.
"""

from __future__ import annotations

import argparse
import gzip
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from unidec_ds.data.keyed import hash64, uniform
from unidec_ds.data.pairs import distinct
from unidec_ds.errors import UserError
from unidec_ds.exits import exit_with_message

BLOCK = 32_768  # records made at once
SPREAD = 8  # a query's positives lie within this many labels for each positive it has
MAX_POSITIVES = 1_500
GLOBAL_SHARE = 0.05  # of the positives, drawn from all labels
NOISE_SHARE = 0.1  # of the words
PARETO = 1.5  # tail exponent of the labels' weights
MIN_WORDS, MAX_WORDS = 4, 7
SPLITS = ("train", "test")
SYLLABLES = [c + v for c in "bdfghjklmnprstvz" for v in "aeiou"]

Array = NDArray[np.int64]


class Sizes(NamedTuple):
    """How much to make."""

    train_queries: int
    test_queries: int
    labels: int
    positives: float
    """Mean positives per query."""


SHAPES = {
    "131k": Sizes(294_805, 134_835, 131_073, 2.29),  # LF-AmazonTitles-131K
    "1.3m": Sizes(2_248_619, 970_237, 1_305_265, 22.20),  # LF-AmazonTitles-1.3M
    "10m": Sizes(10_000_000, 100_000, 10_000_000, 10.0),
}


class Synthetic:
    """A made-up corpus; its records are made block by block, each a function of its row.

    Args:
        sizes: how much.
        num_words: size of the vocabulary.
        seed: of every random number.
    """

    def __init__(self, sizes: Sizes, num_words: int, seed: int) -> None:
        self.sizes, self._seed = sizes, seed
        self._words = np.array([_word(i) for i in range(num_words)], object)
        labels = np.arange(sizes.labels)
        # The label at each place, and the labels' weights summed up to each place.
        self._label_at = np.argsort(hash64(seed, "place", labels)).astype(np.int32)
        weights = (1 - uniform(seed, "weight", labels)) ** (-1 / PARETO)
        self._weight_below = np.concatenate([[0.0], np.cumsum(weights)])

    def label_titles(self) -> Iterator[list[str]]:
        """Yields the labels' titles in row order, block by block."""
        place_of = np.empty(self.sizes.labels, np.int32)
        place_of[self._label_at] = np.arange(self.sizes.labels, dtype=np.int32)
        for rows in _blocks(self.sizes.labels):
            yield self._titles("label", rows, place_of[rows].astype(np.int64))

    def queries(self, split: str, num_queries: int) -> Iterator[tuple[list[str], list[Array]]]:
        """Yields the queries' titles and positives (label rows, ascending), block by block."""
        for rows in _blocks(num_queries):
            places = self.places(split, rows)
            yield self._titles(split, rows, places), self._positives(split, rows, places)

    def places(self, split: str, rows: Array) -> Array:
        """Returns the places of queries."""
        return (uniform(self._seed, f"{split} place", rows) * self.sizes.labels).astype(np.int64)

    def uniform(self, purpose: str, rows: Array) -> NDArray[np.float64]:
        """Returns a number in [0, 1) for each row."""
        return uniform(self._seed, purpose, rows)

    def labels_at(self, places: Array) -> Array:
        """Returns the labels that stand at `places`."""
        return self._label_at[places].astype(np.int64)

    def _titles(self, table: str, rows: Array, places: Array) -> list[str]:
        """Returns a text for each row: the words of its place, some exchanged for noise."""
        num_words = len(self._words)
        scales = (4_096, 256, 16, 16, 1, 256, 16)
        words = np.stack(
            [
                (hash64(self._seed, f"word {at}", places // scale) % num_words).astype(np.int64)
                for at, scale in enumerate(scales)
            ],
            axis=1,
        )
        at = np.arange(MAX_WORDS)
        noisy = uniform(self._seed, f"{table} noise", rows[:, None], at) < NOISE_SHARE
        noise = uniform(self._seed, f"{table} noise word", rows[:, None], at) ** 3 * num_words
        words = np.where(noisy, noise.astype(np.int64), words)
        spread = MAX_WORDS - MIN_WORDS + 1
        lengths = MIN_WORDS + hash64(self._seed, f"{table} length", rows) % spread
        texts = self._words[words].tolist()
        return [" ".join(t[:n]) for t, n in zip(texts, lengths.tolist(), strict=True)]

    def _positives(self, split: str, rows: Array, places: Array) -> list[Array]:
        """Returns each query's positives."""
        num_labels, num_rows = self.sizes.labels, len(rows)
        generator = np.random.default_rng([self._seed, SPLITS.index(split), int(rows[0])])
        mean = np.log(self.sizes.positives) - 0.5
        drawn = np.rint(generator.lognormal(mean, 1.0, num_rows)).astype(np.int64)
        wanted = np.clip(drawn, 1, min(MAX_POSITIVES, max(1, num_labels // 2)))
        width = np.minimum(SPREAD * wanted, num_labels)
        first = np.clip(places - width // 2, 0, num_labels - width)

        keys = np.zeros(0, np.int64)
        for attempt in range(3):  # labels drawn twice count once; then others take their places
            missing = wanted - np.bincount(keys // num_labels, minlength=num_rows)
            row = np.repeat(np.arange(num_rows), missing)
            if attempt == 0:
                anywhere = generator.random(len(row)) < GLOBAL_SHARE
                low = np.where(anywhere, 0, first[row])
                high = np.where(anywhere, num_labels, first[row] + width[row])
                low_weight, high_weight = self._weight_below[low], self._weight_below[high]
                mark = low_weight + (high_weight - low_weight) * generator.random(len(row))
                place = np.searchsorted(self._weight_below, mark, side="right") - 1
                place = np.clip(place, low, high - 1)
            else:
                place = first[row] + (width[row] * generator.random(len(row))).astype(np.int64)
            keys = distinct(np.concatenate([keys, row * num_labels + self._label_at[place]]))
        ends = np.cumsum(np.bincount(keys // num_labels, minlength=num_rows))
        return np.split(keys % num_labels, ends[:-1])


def _word(number: int) -> str:
    """Returns the made-up word of a number: its digits to the base 80, at least two."""
    digits = [number % 80, number // 80 % 80, number // 6_400]
    return "".join(SYLLABLES[digit] for digit in (digits if digits[2] else digits[:2]))


def _blocks(num_rows: int) -> Iterator[Array]:
    for start in range(0, num_rows, BLOCK):
        yield np.arange(start, min(start + BLOCK, num_rows))


def write(
    corpus: Synthetic, folder: Path, *, filter_share: float = 0.0, show_progress: bool = True
) -> None:
    """Writes the corpus.

    Args:
        corpus: what to write.
        folder: where; made if it is not there.
        filter_share: share of the queries that get a filter pair, with the label of their place;
            0 writes no filter files.
        show_progress: whether to draw progress bars on stderr.

    Raises:
        UserError: `folder` is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out: {folder} is not empty; name a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    sizes = corpus.sizes
    _write_lines(folder / "lbl.json.gz", _label_lines(corpus), sizes.labels, show_progress)
    for split, count in zip(SPLITS, (sizes.train_queries, sizes.test_queries), strict=True):
        path = folder / ("trn.json.gz" if split == "train" else "tst.json.gz")
        _write_lines(path, _query_lines(corpus, split, count), count, show_progress)
        if filter_share:
            with (folder / f"filter_labels_{split}.txt").open("w") as file:
                for rows in _blocks(count):
                    chosen = rows[corpus.uniform(f"{split} filter", rows) < filter_share]
                    labels = corpus.labels_at(corpus.places(split, chosen))
                    pairs = zip(chosen.tolist(), labels.tolist(), strict=True)
                    file.writelines(f"{row} {label}\n" for row, label in pairs)


def _label_lines(corpus: Synthetic) -> Iterator[list[str]]:
    start = 0
    for titles in corpus.label_titles():
        yield [f'{{"uid": "L{n}", "title": "{title}"}}\n' for n, title in enumerate(titles, start)]
        start += len(titles)


def _query_lines(corpus: Synthetic, split: str, count: int) -> Iterator[list[str]]:
    start = 0
    for titles, positives in corpus.queries(split, count):
        yield [
            f'{{"uid": "{split}{n}", "title": "{title}", "content": "", '
            f'"target_ind": {labels.tolist()}, "target_rel": {[1.0] * len(labels)}}}\n'
            for n, (title, labels) in enumerate(zip(titles, positives, strict=True), start)
        ]
        start += len(titles)


def _write_lines(path: Path, blocks: Iterator[list[str]], count: int, show_progress: bool) -> None:
    """Writes a gzipped file whose bytes do not tell when and where it was written."""
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as packed,
        tqdm(total=count, desc=path.name, unit=" lines", disable=not show_progress) as bar,
    ):
        for lines in blocks:
            packed.write("".join(lines).encode())
            bar.update(len(lines))


def parse_args() -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="a new or an empty folder")
    parser.add_argument(
        "--shape", choices=SHAPES, default="1.3m", help="the sizes of which corpus (default: 1.3m)"
    )
    for name in ("train-queries", "test-queries", "labels"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help="instead of the shape's")
    parser.add_argument(
        "--positives", type=float, metavar="MEAN", help="per query, instead of the shape's"
    )
    parser.add_argument("--words", type=int, default=20_000, help="vocabulary (default: 20,000)")
    parser.add_argument(
        "--filter-share", type=float, default=0.0, metavar="SHARE",
        help="of the queries that get a filter pair (default: 0, no filter files)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Checks the sizes and writes the corpus."""
    args = parse_args()
    given = {key: value for key in Sizes._fields if (value := getattr(args, key)) is not None}
    sizes = SHAPES[args.shape]._replace(**given)
    if args.seed < 0:
        raise UserError(f"--seed: {args.seed}, needed 0 or more")
    if min(sizes) < 1:
        raise UserError(f"{sizes}: every size must be 1 or more")
    if not 10 <= args.words <= 500_000:
        raise UserError(f"--words: {args.words:,}, needed 10 to 500,000")
    if not 0 <= args.filter_share <= 1:
        raise UserError(f"--filter-share: {args.filter_share}, needed 0 to 1")
    write(Synthetic(sizes, args.words, args.seed), args.out, filter_share=args.filter_share)


if __name__ == "__main__":
    sys.exit(exit_with_message(main))
