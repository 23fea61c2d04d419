"""Keyed random numbers: known values, independence of shape and order, uniformity."""

import subprocess
import sys

import numpy as np
import pytest

from unidec_ds.data.keyed import hash64, seed_of, uniform

MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """One output of SplitMix64, in Python's unbounded integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_a_key_costs_one_step_of_splitmix64() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the published first output for seed 0
    state = int(hash64(3, "rows", 7))
    assert int(hash64(3, "rows", 7, -5)) == splitmix64(state ^ (-5 & MASK))


def test_broadcast_equals_one_by_one() -> None:
    rows, columns = np.array([0, 5, 10**12]), np.array([3, -1], np.int32)
    table = hash64(1, "x", 9, rows[:, None], columns)
    assert table.shape == (3, 2)
    assert table.dtype == np.uint64
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            assert table[i, j] == hash64(1, "x", 9, int(row), int(column))


def test_shapes_follow_the_keys() -> None:
    assert hash64(1, "x").shape == ()
    assert hash64(1, "x", 2, 3).shape == ()
    assert hash64(1, "x", np.arange(0)).shape == (0,)
    assert hash64(1, "x", np.arange(4), 2).shape == (4,)
    assert uniform(1, "x", np.arange(6).reshape(2, 3)).shape == (2, 3)


def test_keys_are_not_overwritten() -> None:
    key = np.arange(5)
    hash64(1, "x", key, key)
    assert key.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "other",
    [
        hash64(2, "x", 3, np.arange(1000)),
        hash64(1, "y", 3, np.arange(1000)),
        hash64(1, "x", 4, np.arange(1000)),
        hash64(1, "x", np.arange(1000, 2000), 3),
        hash64(1, "x", np.arange(1000)),
    ],
    ids=["seed", "purpose", "key", "order of keys", "number of keys"],
)
def test_every_part_of_the_key_counts(other: np.ndarray) -> None:
    assert not np.isin(hash64(1, "x", 3, np.arange(1000)), other).any()


def test_no_collision_among_consecutive_keys() -> None:
    bits = hash64(0, "x", np.arange(300)[:, None], np.arange(300))
    assert len(set(bits.ravel().tolist())) == 90_000


def test_uniform_is_uniform_in_one_and_two_dimensions() -> None:
    share = uniform(0, "x", np.arange(400)[:, None], np.arange(400))
    assert share.min() >= 0
    assert share.max() < 1
    for pair in (share[:, ::2], share[:, 1::2]), (share[::2], share[1::2]):
        counts, _, _ = np.histogram2d(pair[0].ravel(), pair[1].ravel(), bins=10, range=[[0, 1]] * 2)
        expected = share.size / 2 / 100
        # Chi-square with 99 degrees of freedom: mean 99, standard deviation 14.
        assert 50 < ((counts - expected) ** 2 / expected).sum() < 170


def test_seed_of_fits_a_torch_generator() -> None:
    seeds = [seed_of(0, "head dropout", step) for step in range(1000)]
    assert len(set(seeds)) == 1000
    assert min(seeds) >= 0
    assert 2**62 < max(seeds) < 2**63


def test_same_numbers_in_another_process() -> None:
    code = "from unidec_ds.data.keyed import seed_of; print(seed_of(5, 'purpose', 1, 2))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert int(printed) == seed_of(5, "purpose", 1, 2)
