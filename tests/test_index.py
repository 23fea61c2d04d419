"""Approximate indexes: near the exact search on clustered vectors, mapped, never someone else's."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from unidec_ds.errors import UserError
from unidec_ds.index import (
    IndexConfig,
    build_index,
    chosen_kind,
    open_index,
    recall,
)
from unidec_ds.search import exact_search
from unidec_ds.stamp import record_path

RECORD = {"view": "de", "num_labels": 4000}
KINDS = ("ivf", "hnsw")


def clustered(num_vectors, width=32, num_clusters=200, seed=0, noise=0.5):
    """Unit vectors around shared centres, as embeddings of texts are."""
    centres = normalize(torch.randn(num_clusters, width, generator=_generator(9)), dim=1)
    generator = _generator(seed)
    which = torch.randint(num_clusters, (num_vectors,), generator=generator)
    spread = noise * normalize(torch.randn(num_vectors, width, generator=generator), dim=1)
    return normalize(centres[which] + spread, dim=1)


def _generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def vectors():
    return clustered(4000).numpy()


@pytest.fixture(scope="module")
def queries():
    return clustered(200, seed=1)


@pytest.fixture(scope="module", params=KINDS)
def index(request, vectors):
    return build_index(vectors, request.param, IndexConfig(), show_progress=False)


@pytest.mark.parametrize("storage", ["fp16", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_recall_of_exact_search(vectors, queries, kind, storage):
    config = IndexConfig(storage=storage, probes=24)
    index = build_index(vectors, kind, config, show_progress=False)
    scores, ids = index.search(queries, 10, vectors)
    exact_scores, exact_ids = exact_search(queries, torch.from_numpy(vectors), 10)
    assert recall(ids, exact_ids) > 0.97
    # What was found carries its exact score, in exact order.
    torch.testing.assert_close(scores, (queries[:, None] * torch.from_numpy(vectors[ids])).sum(2))
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    torch.testing.assert_close(scores[:, 0], exact_scores[:, 0], rtol=0, atol=0.02)


def test_reading_every_list_is_exact(vectors, queries):
    config = IndexConfig(probes=10**6, storage="fp16")
    index = build_index(vectors, "ivf", config, show_progress=False)
    expected = exact_search(queries, torch.from_numpy(vectors), 10)
    found = index.search(queries, 10, vectors)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])


def test_fewer_probes_find_less():
    vectors, queries = clustered(4000, noise=2.0).numpy(), clustered(200, noise=2.0, seed=1)
    _, exact_ids = exact_search(queries, torch.from_numpy(vectors), 10)
    found = []
    for probes in (1, 32, 128):  # 1 is raised to what 30 candidates need
        config = IndexConfig(probes=probes, lists=400)
        index = build_index(vectors, "ivf", config, show_progress=False)
        found.append(recall(index.search(queries, 10, vectors)[1], exact_ids))
    assert found[0] < found[1] < found[2]


@pytest.mark.parametrize("num_vectors", [1, 5, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_few_vectors_and_many_asked_for(kind, num_vectors):
    vectors = clustered(num_vectors).numpy()
    index = build_index(vectors, kind, IndexConfig(probes=1), show_progress=False)
    scores, ids = index.search(torch.from_numpy(vectors), 50, vectors)
    assert scores.shape == ids.shape == (num_vectors, 50)
    assert ids[:, 0].tolist() == list(range(num_vectors))  # each is nearest to itself
    for row, row_scores in zip(ids, scores, strict=True):
        there = row >= 0
        assert sorted(row[there].tolist()) == list(range(num_vectors))
        assert (row_scores[~there] == -torch.inf).all()


def test_equal_vectors_come_in_the_order_of_their_ids(queries):
    vectors = clustered(30).repeat(5, 1).numpy()
    index = build_index(vectors, "ivf", IndexConfig(probes=1000), show_progress=False)
    found = index.search(queries, 20, vectors)[1]
    assert torch.equal(found, exact_search(queries, torch.from_numpy(vectors), 20)[1])


def test_opened_equals_built(index, vectors, queries, tmp_path):
    path = tmp_path / "labels.faiss"
    index.save(path, RECORD)
    opened = open_index(path, index.kind, IndexConfig(), RECORD)
    assert (len(opened), opened.width) == vectors.shape
    for one, other in zip(
        index.search(queries, 10, vectors), opened.search(queries, 10, vectors), strict=True
    ):
        assert torch.equal(one, other)


OPEN = """
import re, sys
import faiss
from pathlib import Path
from unidec_ds.index import IndexConfig, open_index
def anonymous_kib():
    return int(re.search(r"Anonymous:\\s+(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1])
before = anonymous_kib()
config = IndexConfig(build_depth=8, storage="fp16")
index = open_index(Path(sys.argv[1]), sys.argv[2], config, {"view": "de"})
print(len(index), anonymous_kib() - before)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_opening_maps_and_does_not_read(kind, tmp_path):
    vectors = clustered(6000, width=256).numpy()
    config = IndexConfig(build_depth=8, storage="fp16")
    path = tmp_path / "labels.faiss"
    build_index(vectors, kind, config, show_progress=False).save(path, {"view": "de"})
    done = subprocess.run(
        [sys.executable, "-c", OPEN,
         str(path), kind],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    num_vectors, grown_kib = map(int, done.stdout.split())
    assert num_vectors == 6000
    assert path.stat().st_size > 2900 << 10
    assert grown_kib < 1500


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({"record": {**RECORD, "view": "unified"}}, "view is de, needed unified"),
        ({"config": IndexConfig(storage="fp16")}, "storage is int8, needed fp16"),
        ({"kind": "other"}, "kind is"),
        ({"name": "none.faiss"}, "there is no file"),
    ],
)
def test_an_index_of_something_else_is_refused(index, tmp_path, change, needed):
    index.save(tmp_path / "labels.faiss", RECORD)
    given = {"name": "labels.faiss", "kind": index.kind, "config": IndexConfig(), "record": RECORD}
    given.update(change)
    if given["kind"] == "other":
        given["kind"] = KINDS[1 - KINDS.index(index.kind)]
    with pytest.raises(UserError, match=re.escape(needed)):
        open_index(tmp_path / given["name"], given["kind"], given["config"], given["record"])


def test_search_settings_may_change_after_building(index, vectors, queries, tmp_path):
    path = tmp_path / "labels.faiss"
    index.save(path, RECORD)
    _, exact = exact_search(queries, torch.from_numpy(vectors), 10)
    settings = (IndexConfig(probes=1, search_depth=10), IndexConfig(probes=10**6, search_depth=500))
    opened = [open_index(path, index.kind, config, RECORD) for config in settings]
    shallow, deep = (recall(i.search(queries, 10, vectors)[1], exact) for i in opened)
    assert shallow <= deep
    assert deep > 0.99


@pytest.mark.parametrize("damage", ["cut", "altered", "no record"])
def test_a_damaged_index_is_refused(index, tmp_path, damage):
    path = tmp_path / "labels.faiss"
    index.save(path, RECORD)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "altered":
        path.write_bytes(b"no such thing" + content[13:])
    else:
        record_path(path).unlink()
    with pytest.raises(UserError, match=r"labels\.faiss is "):
        open_index(path, index.kind, IndexConfig(), RECORD)


def test_auto_is_exact_up_to_a_size():
    assert chosen_kind(IndexConfig(), 200_000) == "exact"
    assert chosen_kind(IndexConfig(), 200_001) == "ivf"
    assert chosen_kind(IndexConfig(exact_up_to=10), 11) == "ivf"
    assert chosen_kind(IndexConfig(kind="hnsw"), 3) == "hnsw"
    assert chosen_kind(IndexConfig(kind="exact"), 10**8) == "exact"


def test_recall_counts_found_ids():
    found = torch.tensor([[3, 1, 5], [2, -1, -1]])
    exact = torch.tensor([[1, 2, 3], [2, -1, -1]])
    assert recall(found, exact) == pytest.approx(3 / 4)
    assert np.isclose(recall(exact, exact), 1)
