import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unidec_ds import search
from unidec_ds.data.pairs import Pairs
from unidec_ds.search import TopK, exact_search, fixed_blocks


def sorted_by_definition(scores, k, exclude=()):
    """Every query's k best (score descending, id ascending) by sorting all of its scores."""
    values = np.full((len(scores), k), -np.inf, np.float32)
    ids = np.full((len(scores), k), -1, np.int64)
    for query, row in enumerate(scores.tolist()):
        found = [(-s, i) for i, s in enumerate(row) if s > -np.inf and (query, i) not in exclude]
        for place, (negative, label) in enumerate(sorted(found)[:k]):
            values[query, place], ids[query, place] = -negative, label
    return values, ids


def search_in_blocks(scores, k, query_block, label_block, exclude=None, order=None):
    top = TopK(len(scores), k)
    blocks = fixed_blocks(scores.shape[1], label_block)
    for position in order if order is not None else range(len(blocks)):
        label, end = blocks[position]
        for query, stop in fixed_blocks(len(scores), query_block):
            block = scores[query:stop, label:end].clone()
            top.update(block, first_query=query, first_label=label, exclude=exclude)
    return top


def check(top, expected):
    values, ids = top.result()
    np.testing.assert_array_equal(ids.numpy(), expected[1])
    np.testing.assert_array_equal(values.numpy(), expected[0])


@given(
    seed=st.integers(0, 10**6),
    num_labels=st.integers(1, 90),
    k=st.integers(1, 20),
    num_values=st.sampled_from([1, 2, 7, 10**6]),  # few distinct scores: ties everywhere
    label_block=st.integers(1, 100),
    excluded=st.integers(0, 60),
)
@settings(max_examples=150, deadline=None)
def test_any_cut_into_blocks_gives_the_sorted_answer(
    seed, num_labels, k, num_values, label_block, excluded
):
    g = np.random.default_rng(seed)
    scores = (g.integers(0, num_values, (7, num_labels)) / 3 - 1).astype(np.float32)
    scores[g.random(scores.shape) < 0.1] = -np.inf
    pairs = Pairs.from_pairs(
        g.integers(0, 7, excluded), g.integers(0, num_labels, excluded), 7, num_labels
    )
    banned = set(zip(pairs.rows_of_pairs().tolist(), pairs.indices.tolist(), strict=True))
    num_blocks = -(-num_labels // label_block)
    top = search_in_blocks(
        torch.from_numpy(scores), k, 3, label_block, pairs, g.permutation(num_blocks)
    )
    check(top, sorted_by_definition(scores, k, banned))


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "all equal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_search_of_wide_blocks_is_exact(order, dtype):
    """Blocks wide enough that groups of columns, and a last ragged group, are used."""
    scores = torch.randn(9, 3001, generator=torch.Generator().manual_seed(0)).to(dtype)
    if order in ("ascending", "descending"):
        scores = scores.sort(dim=1, descending=order == "descending").values
    if order == "all equal":
        scores = torch.zeros_like(scores)
        scores[:, ::2] = -0.0  # equal to 0.0
    expected = sorted_by_definition(scores.float().numpy(), 11)
    check(search_in_blocks(scores, 11, 4, 1000), expected)


def test_ties_across_the_kth_place_go_to_the_lowest_ids():
    scores = torch.zeros(2, 5000)
    scores[1, [4999, 17]] = 1.0
    _, ids = search_in_blocks(scores, 3, 2, 2000, order=[2, 0, 1]).result()
    assert ids.tolist() == [[0, 1, 2], [17, 4999, 0]]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_share_the_label_blocks_merge_to_the_same_bits(world_size):
    scores = torch.randn(20, 4000, generator=torch.Generator().manual_seed(1)).mul(3).round()
    alone = search_in_blocks(scores, 30, 8, 512)
    shares = [
        search_in_blocks(scores, 30, 8, 512, order=range(rank, 8, world_size))
        for rank in range(world_size)
    ]
    merged = TopK(20, 30)
    for share in reversed(shares):
        merged.merge_keys(share.keys_QK[:12])
        merged.merge_keys(share.keys_QK[12:], first_query=12)
    check(merged, [part.numpy() for part in alone.result()])


def test_exact_search_across_blocks(monkeypatch):
    monkeypatch.setattr(search, "LABEL_BLOCK", 64)
    monkeypatch.setattr(search, "query_block", lambda device: 16)
    g = torch.Generator().manual_seed(2)
    queries, labels = torch.randn(50, 8, generator=g), torch.randn(200, 8, generator=g)
    exclude = Pairs.from_pairs([0, 0, 49], [3, 150, 199], 50, 200)
    values, ids = exact_search(queries, labels, 200, exclude=exclude)
    for query in range(50):
        banned = exclude.row(query).tolist()
        assert ids[query, -len(banned) or 200 :].tolist() == [-1] * len(banned)
        found = ids[query][ids[query] >= 0]
        assert sorted(found.tolist() + banned) == list(range(200))
        torch.testing.assert_close(values[query, : len(found)], labels[found] @ queries[query])
        assert (values[query].diff() <= 0)[: len(found) - 1].all()


def test_half_precision_labels_of_a_memory_mapped_file(tmp_path):
    labels = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float16)
    np.save(tmp_path / "labels.npy", labels)
    mapped = torch.from_numpy(np.load(tmp_path / "labels.npy", mmap_mode="c"))
    queries = torch.eye(4)
    expected = sorted_by_definition(labels.T.astype(np.float32), 5)
    values, ids = exact_search(queries, mapped, 5)
    np.testing.assert_array_equal(ids.numpy(), expected[1])
    np.testing.assert_array_equal(values.numpy(), expected[0])


def test_more_places_than_labels_and_no_labels_at_all():
    values, ids = exact_search(torch.ones(2, 3), torch.ones(2, 3), 4)
    assert ids.tolist() == [[0, 1, -1, -1]] * 2
    assert values.tolist() == [[3.0, 3.0, -torch.inf, -torch.inf]] * 2
    assert exact_search(torch.ones(2, 3), torch.ones(0, 3), 2)[1].tolist() == [[-1, -1]] * 2
    assert exact_search(torch.ones(0, 3), torch.ones(5, 3), 2)[1].shape == (0, 2)


def test_a_nan_is_refused_wherever_it_stands():
    for column in (0, 999, 1000):
        scores = torch.randn(3, 1001)
        scores[1, column] = torch.nan
        with pytest.raises(FloatingPointError, match=r"labels 50\.\.1050 is NaN"):
            TopK(3, 5).update(scores, first_label=50)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_accelerator_and_host_agree_bit_for_bit():
    scores = torch.randn(300, 5000, generator=torch.Generator().manual_seed(3)).mul(50).round()
    exclude = Pairs.from_pairs(np.arange(300), np.arange(300), 300, 5000)
    host, device = TopK(300, 100), TopK(300, 100, "cuda")
    for first, end in fixed_blocks(5000, 2048):
        block = scores[:, first:end]
        host.update(block.clone(), first_label=first, exclude=exclude)
        device.update(block.cuda(), first_label=first, exclude=exclude)
    for ours, theirs in zip(host.result(), device.result(), strict=True):
        assert torch.equal(ours, theirs.cpu())
