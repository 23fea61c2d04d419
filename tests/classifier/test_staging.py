"""Rows fetched ahead are, bit for bit, the rows of the plain order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from unidec_ds.classifier import partition
from unidec_ds.classifier.config import ClassifierConfig
from unidec_ds.classifier.row_formats import FORMATS
from unidec_ds.classifier.staging import Staging
from unidec_ds.classifier.storage import Placement
from unidec_ds.classifier.table import ClassifierTable

L, D, STEPS = 61, 12, 24
CPU = torch.device("cpu")
KERNELS = ["torch", pytest.param("cpu_adam", marks=pytest.mark.kernel)]


def make_table(
    prefetch_rows: str, *, rank: int = 0, world_size: int = 1, placement: Placement | None = None,
    device: torch.device = CPU, kernel: str = "torch", row_format: str = "fp32",
) -> ClassifierTable:  # fmt: skip
    config = {"prefetch_rows": prefetch_rows, "kernel": kernel, "format": row_format}
    return ClassifierTable(
        num_labels=L, width=D, rank=rank, world_size=world_size,
        config=ClassifierConfig.model_validate({**config, "bias_correction": "per_row"}),
        placement=placement or Placement(), device=device, seed=7, betas=(0.9, 0.99), eps=1e-8,
        weight_decay=0.1,
    )  # fmt: skip


def pool(step: int) -> np.ndarray:
    """Pools in turn the same as the last, mostly the same, disjoint from it, and empty."""
    rng = np.random.default_rng(step // 6)
    half = np.sort(rng.choice(L // 2, 15, replace=False))
    match step % 6:
        case 0 | 1:
            return half
        case 2:
            return np.sort(np.append(half[2:], [L - 2, L - 1]))
        case 3:
            return np.setdiff1d(np.arange(L), [*half, L - 2, L - 1])
        case 4:
            return np.array([L - 1])
    return np.zeros(0, np.int64)


def labels_of(table: ClassifierTable, step: int) -> np.ndarray:
    return partition.owned(pool(step), table.rank, table.world_size)


def train(table: ClassifierTable, steps: range = range(STEPS)) -> list[Tensor]:
    """Takes steps of a quadratic loss, fetching ahead; returns the rows each step saw."""
    seen = []
    for step in steps:
        label_ids = labels_of(table, step)
        rows = table.fetch(label_ids)
        table.fetch_ahead(labels_of(table, step + 1))
        seen.append(rows.detach().to("cpu", copy=True))
        target = torch.randn(L, D, generator=torch.Generator().manual_seed(step))
        (rows - target[label_ids].to(rows.device)).square().sum().backward()
        table.apply(rows, lr=1e-2)
    return seen


def assert_same(one: ClassifierTable, other: ClassifierTable) -> None:
    state = other.state()
    for name, tensor in one.state().items():
        assert torch.equal(tensor, state[name]), name


@pytest.fixture
def used_ahead(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Notes for every fetch whether rows packed ahead served it."""
    used: list[bool] = []
    take_ahead = Staging.take_ahead

    def noted(self: Staging, label_ids: np.ndarray):
        staged = take_ahead(self, label_ids)
        used.append(staged is not None)
        return staged

    monkeypatch.setattr(Staging, "take_ahead", noted)
    return used


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("kind", ["cpu", "nvme"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_both_orders_are_bitwise_the_same(
    row_format: str, kind: str, kernel: str, rank: int, world_size: int, tmp_path: Path,
    used_ahead: list[bool],
) -> None:  # fmt: skip
    arguments = {
        "rank": rank, "world_size": world_size, "kernel": kernel, "row_format": row_format,
    }  # fmt: skip
    plain = make_table("never", **arguments)
    rows_plain = train(plain)
    assert not any(used_ahead)
    used_ahead.clear()
    ahead = make_table("always", placement=Placement(kind, tmp_path), **arguments)
    rows_ahead = train(ahead)
    assert used_ahead == [False] + [True] * (STEPS - 1)
    assert all(torch.equal(*pair) for pair in zip(rows_plain, rows_ahead, strict=True))
    assert_same(plain, ahead)


def test_shared_rows_would_differ_without_their_renewal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Staging, "renew", lambda self, updated: None)
    rows_plain, rows_ahead = train(make_table("never")), train(make_table("always"))
    assert torch.equal(rows_plain[0], rows_ahead[0])
    assert not torch.equal(rows_plain[1], rows_ahead[1])


def test_what_happens_between_steps_does_not_show(used_ahead: list[bool]) -> None:
    """Reads, writes, a resume and another pool than the one announced, each after a fetch ahead."""
    tables = [make_table("never"), make_table("always")]
    saved = {name: tensor.clone() for name, tensor in tables[0].state().items()}
    values = torch.randn(L, D, generator=torch.Generator().manual_seed(1))
    for table in tables:
        train(table, range(1))
        used_ahead.clear()
        table.read(np.arange(L))
        train(table, range(1, 2))
    assert used_ahead == [True]
    for change in (
        lambda table: table.write(np.arange(L), values),
        lambda table: table.load_state(saved),
    ):
        seen = []
        for table in tables:
            train(table, range(2))
            used_ahead.clear()
            change(table)
            seen.append(train(table, range(2, 4)))
        assert used_ahead == [False, True]
        assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))
    seen = []
    for table in tables:
        train(table, range(2))
        used_ahead.clear()
        seen.append(train(table, range(7, 9)))  # not the step that was announced
    assert used_ahead == [False, True]
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))
    assert_same(*tables)


def test_a_cpu_and_a_table_on_the_device_fetch_no_rows_ahead(used_ahead: list[bool]) -> None:
    train(make_table("auto"))
    train(make_table("always", placement=Placement("device")))
    assert len(used_ahead) == 2 * STEPS
    assert not any(used_ahead)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pin_memory", [False, True])
def test_on_cuda_both_orders_are_bitwise_the_same(pin_memory: bool, used_ahead: list[bool]) -> None:
    arguments = {"placement": Placement("cpu", pin_memory=pin_memory)}
    tables = [
        make_table(prefetch_rows, device=torch.device("cuda", 0), **arguments)
        for prefetch_rows in ("never", "auto")
    ]
    seen = [train(table) for table in tables]
    assert used_ahead == [False] * STEPS + [False] + [True] * (STEPS - 1)
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))
    assert_same(*tables)
