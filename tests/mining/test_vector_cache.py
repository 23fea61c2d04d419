"""Kept vectors: the newest of each text, durable with a checkpoint, at any world size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch.nn.functional import normalize

from unidec_ds import comm
from unidec_ds.mining.vector_cache import VectorCache

SIZES, WIDTH = {"queries": 11, "labels": 7}, 6


def vectors_of(step, count):
    """Returns what a step of this number encodes."""
    return normalize(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(step)))


def open_cache(folder, first_step, **details):
    return VectorCache(Path(folder), SIZES, WIDTH, details, first_step)


def run_steps(cache, first, end):
    """Encodes and keeps three queries and two labels in each step."""
    for step in range(first, end):
        for kind, count in (("queries", 3), ("labels", 2)):
            ids = np.sort((step * 2 + np.arange(count)) % SIZES[kind])
            cache.keep(kind, ids, vectors_of(step, count), step)


def everything(cache, step, max_age_steps=100):
    """Returns what may be used at a step, by kind: (ids, vectors)."""
    fresh = cache.fresh(step, max_age_steps)
    found = {}
    for kind in SIZES:
        ids = np.flatnonzero(fresh.is_fresh[kind])
        found[kind] = ids, fresh.read(kind, ids)
    return found


def assert_same(one, other):
    for kind in SIZES:
        np.testing.assert_array_equal(one[kind][0], other[kind][0])
        assert torch.equal(one[kind][1], other[kind][1])


def test_the_newest_vector_of_each_text_is_kept_within_its_age(tmp_path):
    cache = open_cache(tmp_path / "v", 0)
    assert cache.note is None
    assert not len(everything(cache, 5)["queries"][0])
    first, second = vectors_of(0, 3), vectors_of(1, 2)
    cache.keep("queries", np.array([2, 5, 9]), first, 3)
    cache.keep("queries", np.array([5, 10]), second, 4)
    expected = torch.stack([first[0], second[0], first[2], second[1]]).half().float()
    ids, vectors = everything(cache, 5)["queries"]
    assert ids.tolist() == [2, 5, 9, 10]
    assert torch.equal(vectors, expected)
    assert everything(cache, 5, max_age_steps=1)["queries"][0].tolist() == [5, 10]
    assert everything(cache, 4)["queries"][0].tolist() == [2, 9]  # nothing from the future
    assert not len(everything(cache, 5)["labels"][0])


def test_what_was_synced_is_there_after_a_resume_and_repeated_steps_change_nothing(tmp_path):
    cache = open_cache(tmp_path / "v", 0, corpus="x")
    run_steps(cache, 0, 4)
    cache.sync(4)
    run_steps(cache, 4, 6)  # steps that a crash made vain
    undisturbed = everything(cache, 6)
    resumed = open_cache(tmp_path / "v", 4, corpus="x")
    assert resumed.note is None
    run_steps(resumed, 4, 6)
    assert_same(everything(resumed, 6), undisturbed)
    anew = open_cache(tmp_path / "v", 0, corpus="x")
    assert anew.note is None
    assert not len(everything(anew, 6)["queries"][0])


@pytest.mark.parametrize("fault", ["other corpus", "later step", "missing file", "no record"])
def test_vectors_that_cannot_serve_are_dropped_with_a_note(tmp_path, fault):
    folder = tmp_path / "v"
    cache = open_cache(folder, 0, corpus="x")
    run_steps(cache, 0, 4)
    if fault != "no record":
        cache.sync(4)
    if fault == "missing file":
        (folder / "labels-00000-of-00001.npy").unlink()
    again = open_cache(
        folder, 5 if fault == "later step" else 4, corpus="y" if fault == "other corpus" else "x"
    )
    assert str(folder) in again.note
    assert "may differ" in again.note
    assert not len(everything(again, 6)["queries"][0])
    run_steps(again, 4, 6)
    assert len(everything(again, 6)["queries"][0])


def write_and_sync(folder):
    cache = open_cache(folder, 0)
    run_steps(cache, 0, 4)
    cache.sync(4)
    return everything(cache, 4)


def reopen_and_go_on(folder):
    cache = open_cache(folder, 4)
    assert cache.note is None
    found = everything(cache, 4)
    comm.barrier()  # as at the end of mining: nobody keeps before all have read
    run_steps(cache, 4, 6)
    return found, everything(cache, 6)


@pytest.mark.parametrize(("kept_by", "read_by"), [(1, 2), (3, 1)])
def test_vectors_kept_by_some_ranks_are_dealt_out_to_others(tmp_path, kept_by, read_by):
    alone = open_cache(tmp_path / "alone", 0)
    run_steps(alone, 0, 4)
    at_four = everything(alone, 4)
    run_steps(alone, 4, 6)
    for found in run_ranks(kept_by, write_and_sync, str(tmp_path / "v")):
        assert_same(found, at_four)
    for before, after in run_ranks(read_by, reopen_and_go_on, str(tmp_path / "v")):
        assert_same(before, at_four)
        assert_same(after, everything(alone, 6))
    names = [path.name for path in (tmp_path / "v").glob("*.npy")]
    assert len(names) == 4 * read_by  # none of the other world size's are left
