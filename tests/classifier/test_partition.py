import numpy as np
import pytest

from unidec_ds.classifier import partition


@pytest.mark.parametrize("num_labels", [0, 1, 2, 3, 7, 12, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_every_label_has_one_owner_and_one_row(num_labels: int, world_size: int) -> None:
    label_ids = np.arange(num_labels)
    seen = []
    for rank in range(world_size):
        mine = partition.owned(label_ids, rank, world_size)
        num_rows = partition.num_local_rows(num_labels, rank, world_size)
        rows = partition.local_row(mine, world_size)
        assert (partition.owner(mine, world_size) == rank).all()
        np.testing.assert_array_equal(rows, np.arange(num_rows))
        np.testing.assert_array_equal(partition.label_ids(rows, rank, world_size), mine)
        seen.append(mine)
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), label_ids)


def test_shards_are_balanced() -> None:
    sizes = [partition.num_local_rows(1_305_265, rank, 16) for rank in range(16)]
    assert sum(sizes) == 1_305_265
    assert max(sizes) - min(sizes) <= 1
