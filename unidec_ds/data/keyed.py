"""Random numbers that are pure functions of their key.

Every random number of the system is keyed by (seed, purpose, step or epoch, id), never drawn from
a running stream, so that it is the same at any number of ranks, in any order of calls and after a
resume. Vectorised: about 10 ns per number and array key on one core.

Source: the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), applied once per key.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns the finaliser of SplitMix64, a bijection of 64 bits; overwrites `state`."""
    state += np.uint64(_GOLDEN)
    scratch = state >> np.uint64(30)
    state ^= scratch
    state *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(state, np.uint64(27), out=scratch)
    state ^= scratch
    state *= np.uint64(0x94D049BB133111EB)
    np.right_shift(state, np.uint64(31), out=scratch)
    state ^= scratch
    return state


@lru_cache(maxsize=256)
def _purpose_bits(purpose: str) -> int:
    """Returns 64 bits that are the same in every process, unlike Python's own `hash`."""
    return int.from_bytes(blake2b(purpose.encode(), digest_size=8).digest(), "little")


def _bits(key: int | NDArray[np.integer]) -> NDArray[np.uint64]:
    """Returns a key modulo 2^64 as an array of at least one dimension."""
    if isinstance(key, np.ndarray):
        return np.atleast_1d(key).astype(np.int64, copy=False).view(np.uint64)
    return np.array([int(key) & _MASK], np.uint64)


def hash64(seed: int, purpose: str, *keys: int | NDArray[np.integer]) -> NDArray[np.uint64]:
    """Returns 64 uniform bits for every element of the broadcast keys.

    Put the keys that are plain integers or small arrays first: each key costs one mixing at the
    shape broadcast so far.

    Args:
        seed: the run's seed, any integer (taken modulo 2^64).
        purpose: what the numbers are for; two purposes give unrelated numbers.
        keys: integers or integer arrays that broadcast together; their order matters.

    Returns:
        uint64 of the keys' broadcast shape (0-dimensional if all are plain integers).
    """
    shape = np.broadcast_shapes(*(np.shape(key) for key in keys))
    state = _mix(_bits(seed) ^ np.uint64(_purpose_bits(purpose)))
    for key in keys:
        state = _mix(state ^ _bits(key))
    return state.reshape(shape)


def uniform(seed: int, purpose: str, *keys: int | NDArray[np.integer]) -> NDArray[np.float64]:
    """Returns float64 in [0, 1), multiples of 2^-53, keyed like `hash64`."""
    shares: NDArray[np.float64] = (hash64(seed, purpose, *keys) >> np.uint64(11)) * 0.5**53
    return shares


def seed_of(seed: int, purpose: str, *keys: int) -> int:
    """Returns an integer in [0, 2^63) with which to seed a generator, keyed like `hash64`."""
    return int(hash64(seed, purpose, *keys)) >> 1
