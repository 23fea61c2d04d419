import numpy as np
import pytest

from unidec_ds.data import pairs as pairs_module
from unidec_ds.data.corpus import Corpus, split_validation
from unidec_ds.data.pairs import Pairs, distinct


def random_pairs(seed: int, num_pairs: int, num_rows: int = 60, num_columns: int = 25) -> Pairs:
    rng = np.random.default_rng(seed)
    rows, columns = rng.integers(0, num_rows, num_pairs), rng.integers(0, num_columns, num_pairs)
    return Pairs.from_pairs(rows, columns, num_rows, num_columns)


def as_set(pairs: Pairs) -> set[tuple[int, int]]:
    return set(zip(pairs.rows_of_pairs().tolist(), pairs.indices.tolist(), strict=True))


@pytest.fixture(params=[1, 7, 1 << 20])
def block_pairs(request, monkeypatch):
    monkeypatch.setattr(pairs_module, "_BLOCK_PAIRS", request.param)


@pytest.mark.parametrize("values", [[], [3], [3, 3, 1, 2**62, -5, 1]])
def test_distinct_is_a_sorted_set(values):
    assert distinct(np.array(values, np.int64)).tolist() == sorted(set(values))


@pytest.mark.usefixtures("block_pairs")
@pytest.mark.parametrize("num_pairs", [0, 1, 400])
def test_row_blocks_hold_every_row_once(num_pairs):
    pairs = random_pairs(0, num_pairs)
    assert np.concatenate(list(pairs.row_blocks())).tolist() == list(range(pairs.num_rows))


@pytest.mark.usefixtures("block_pairs")
@pytest.mark.parametrize(("mine", "theirs"), [(400, 300), (400, 3), (400, 0), (0, 300), (0, 0)])
def test_counts_in_blocks_equal_counts_of_sets(mine, theirs):
    pairs, other = random_pairs(0, mine), random_pairs(1, theirs)
    left = as_set(pairs) - as_set(other)
    rows = [row for row, _ in left]
    assert pairs.row_counts_without(other).tolist() == [rows.count(i) for i in range(60)]
    columns = [column for _, column in as_set(pairs)]
    assert pairs.column_counts().tolist() == [columns.count(i) for i in range(25)]


def test_the_validation_split_does_not_depend_on_the_blocks(monkeypatch):
    positives = random_pairs(3, 200)
    corpus = Corpus(None, "", "", {}, [None] * 25, {}, {"train": positives}, {}, None, 0)
    whole = split_validation(corpus, 0.3, 5)
    monkeypatch.setattr(pairs_module, "_BLOCK_PAIRS", 9)
    in_blocks = split_validation(corpus, 0.3, 5)
    assert len(whole[1]) > 3
    assert [part.tolist() for part in in_blocks] == [part.tolist() for part in whole]
