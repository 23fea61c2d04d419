"""The table against one dense matrix, at any number of ranks, placement and format."""

import gc
import resource
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from unidec_ds.classifier import capacity, partition, snapshot
from unidec_ds.classifier.config import ClassifierConfig
from unidec_ds.classifier.native import native_library
from unidec_ds.classifier.row_copy import TorchCopier, native_copier
from unidec_ds.classifier.row_formats import (
    FORMATS,
    Rounding,
    bytes_per_label,
    column_types,
    rounding_bits,
    rounding_row_keys,
    xavier_rows,
)
from unidec_ds.classifier.storage import Column, Placement
from unidec_ds.classifier.table import ClassifierTable
from unidec_ds.durable import sha256, stream_tensors
from unidec_ds.errors import CheckpointError, UserError

L, D, LR = 53, 12, 1e-2
CPU = torch.device("cpu")
STOCHASTIC = (Rounding.STOCHASTIC_FIRST, Rounding.STOCHASTIC_SECOND)


def make_table(
    rank: int = 0, world_size: int = 1, placement: Placement | None = None, num_labels: int = L,
    width: int = D, **config: str,
) -> ClassifierTable:  # fmt: skip
    return ClassifierTable(
        num_labels=num_labels, width=width, rank=rank, world_size=world_size,
        config=ClassifierConfig(**{"kernel": "torch", "format": "fp32", **config}),
        placement=placement or Placement(), device=CPU, seed=7, betas=(0.9, 0.99), eps=1e-8,
        weight_decay=0.1,
    )  # fmt: skip


def pool(step: int) -> np.ndarray:
    """Returns the labels of a step, ascending; the last label is in every third."""
    drawn = np.random.default_rng(step).choice(L - 1, 11, replace=False)
    return np.sort(np.append(drawn, L - 1) if step % 3 == 0 else drawn)


def target(step: int) -> Tensor:
    return torch.randn(L, D, generator=torch.Generator().manual_seed(step))


def take_step(tables: list[ClassifierTable], step: int) -> None:
    """One step of a quadratic loss, every rank on the labels it owns."""
    for table in tables:
        mine = partition.owned(pool(step), table.rank, table.world_size)
        rows = table.fetch(mine)
        assert rows.is_leaf
        assert rows.shape == (len(mine), D)
        (rows - target(step)[mine]).square().sum().backward()
        table.apply(rows, lr=LR)


def dense(tables: list[ClassifierTable]) -> Tensor:
    """Returns the whole matrix."""
    rows = torch.full((L, D), torch.nan)
    for table in tables:
        mine = partition.owned(np.arange(L), table.rank, table.world_size)
        rows[mine] = table.read(mine)
    return rows


def oracle(steps: int) -> Tensor:
    """Returns the matrix after torch's AdamW, each step on the touched rows of one dense matrix."""
    rows = dense([make_table()])
    exp_avg, exp_avg_sq = torch.zeros(L, D), torch.zeros(L, D)
    for step in range(steps):
        index = torch.from_numpy(pool(step))
        parameter = torch.nn.Parameter(rows[index])
        optimizer = torch.optim.AdamW([parameter], lr=LR, betas=(0.9, 0.99), weight_decay=0.1)
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": exp_avg[index],
            "exp_avg_sq": exp_avg_sq[index],
        }
        (parameter - target(step)[index]).square().sum().backward()
        optimizer.step()
        rows[index] = parameter.detach()
        exp_avg[index] = optimizer.state[parameter]["exp_avg"]
        exp_avg_sq[index] = optimizer.state[parameter]["exp_avg_sq"]
    return rows


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
@pytest.mark.parametrize("kind", ["cpu", "nvme", "device"])
def test_equals_one_dense_matrix(world_size: int, kind: str, tmp_path: Path) -> None:
    placement = Placement(kind, tmp_path)
    tables = [make_table(rank, world_size, placement) for rank in range(world_size)]
    for step in range(20):
        take_step(tables, step)
    assert all(table.step == 20 for table in tables)
    torch.testing.assert_close(dense(tables), oracle(20), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_equals_torch_on_one_dense_matrix(world_size: int, weight_decay: float) -> None:
    """With every label in every step, as momentum of rows that a step leaves out would wait."""
    config = ClassifierConfig(kernel="torch", format="fp32", optimizer="sgd", momentum=0.8)
    tables = [
        ClassifierTable(
            num_labels=L, width=D, rank=rank, world_size=world_size, config=config,
            placement=Placement(), device=CPU, seed=7, betas=(0.9, 0.99), eps=1e-8,
            weight_decay=weight_decay,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    weight = torch.nn.Parameter(dense(tables))
    sgd = torch.optim.SGD([weight], lr=LR, momentum=0.8, weight_decay=weight_decay)
    for step in range(10):
        for table in tables:
            mine = partition.owned(np.arange(L), table.rank, world_size)
            rows = table.fetch(mine)
            (rows - target(step)[mine]).square().sum().backward()
            table.apply(rows, lr=LR)
        sgd.zero_grad()
        (weight - target(step)).square().sum().backward()
        sgd.step()
    torch.testing.assert_close(dense(tables), weight.detach(), atol=1e-5, rtol=1e-5)
    assert tables[0].bytes_per_label == 8 * D


def test_sgd_in_bf16_stays_close_to_fp32() -> None:
    tables = [make_table(optimizer="sgd", format=row_format) for row_format in ("fp32", "bf16")]
    for step in range(50):
        for table in tables:
            take_step([table], step)
    exact, close = dense(tables[:1]), dense(tables[1:])
    assert (close - exact).norm() < 0.05 * exact.norm()
    assert tables[1].bytes_per_label == 4 * D


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"format": "rowwise"}, "rowwise"), ({"bias_correction": "per_row"}, "no bias to correct")],
)
def test_sgd_refuses_what_is_of_adamw_alone(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_table(optimizer="sgd", **settings)


@pytest.mark.kernel
def test_cpu_adam_equals_one_dense_matrix() -> None:
    tables = [make_table(rank, 2, kernel="cpu_adam") for rank in range(2)]
    for step in range(20):
        take_step(tables, step)
    torch.testing.assert_close(dense(tables), oracle(20), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("bias_correction", ["global", "per_row"])
def test_every_format_is_the_same_anywhere(
    row_format: str, bias_correction: str, tmp_path: Path
) -> None:
    """Stochastic rounding included: bitwise at any world size and on the host or in files."""
    results = []
    for world_size, kind in ((1, "cpu"), (3, "cpu"), (2, "nvme"), (1, "device")):
        config = {"format": row_format, "bias_correction": bias_correction}
        placement = Placement(kind, tmp_path)
        tables = [make_table(rank, world_size, placement, **config) for rank in range(world_size)]
        for step in range(8):
            take_step(tables, step)
        results.append(dense(tables))
    for result in results[1:]:
        assert torch.equal(results[0], result)


def test_blocks_do_not_change_the_result() -> None:
    """Enough rows for several blocks; each row moves by lr in Adam's first step."""
    table = make_table(num_labels=5000, width=768)
    label_ids = np.arange(0, 5000, 3)
    before = table.read(label_ids)
    rows = table.fetch(label_ids)
    (-rows).sum().backward()
    table.apply(rows, lr=LR)
    after = table.read(label_ids)
    torch.testing.assert_close(after, before * (1 - LR * 0.1) + LR)
    assert torch.equal(rows.detach(), after), "the leaf on the host holds what was stored"
    untouched = np.setdiff1d(np.arange(5000), label_ids)
    assert torch.equal(table.read(untouched), xavier_rows(untouched, 5000, 768, seed=7))


@pytest.mark.parametrize(("row_format", "tolerance"), [("bf16_moments", 0.02), ("bf16", 0.04)])
def test_reduced_formats_stay_close_to_fp32(row_format: str, tolerance: float) -> None:
    table = make_table(format=row_format)
    for step in range(50):
        take_step([table], step)
    assert (dense([table]) - oracle(50)).norm() < tolerance * oracle(50).norm()


def test_rowwise_descends() -> None:
    table, label_ids = make_table(format="rowwise"), np.arange(L)
    for _ in range(200):
        rows = table.fetch(label_ids)
        (rows - target(0)).square().sum().backward()
        table.apply(rows, lr=LR)
    assert (dense([table]) - target(0)).square().mean() < 0.05


@pytest.mark.parametrize(
    ("row_format", "size"),
    [("fp32", 9216), ("bf16_moments", 6144), ("bf16", 4608), ("rowwise", 1540)],
)
def test_bytes_per_label(row_format: str, size: int) -> None:
    assert bytes_per_label(row_format, "global", 768) == size
    assert bytes_per_label(row_format, "per_row", 768) == size + 4
    table = make_table(num_labels=10, width=768, format=row_format)
    held = sum(t.nbytes for name, t in table.state().items() if name != "step")
    assert table.bytes_per_label == size
    assert table.allocated_bytes == held == 10 * size


def rounded(values: Tensor, step: int, label_ids: np.ndarray, rounding: Rounding) -> Tensor:
    keys = rounding_row_keys(0, step, label_ids)
    bits = rounding_bits(keys, rounding, values.shape[1], CPU)
    return (values.view(torch.int32) + bits).bitwise_and(-0x10000).view(torch.float32)


@pytest.mark.parametrize("rounding", STOCHASTIC)
def test_stochastic_rounding_is_unbiased_and_on_the_grid(rounding: Rounding) -> None:
    values = torch.full((4000, 64), 1.0 + 0.3 * 2**-7)  # bf16's step at 1 is 2^-7
    values[:, ::2] *= -1
    result = rounded(values, 1, np.arange(4000), rounding)
    assert torch.equal(result, result.bfloat16().float())
    up = (result.abs() - 1) / 2**-7
    assert set(up.unique().tolist()) == {0.0, 1.0}
    assert abs(up.mean() - 0.3) < 4 * (0.21 / up.numel()) ** 0.5
    assert (up.mean(0) - 0.3).abs().max() < 0.04  # by column
    assert (up.mean(1) - 0.3).abs().max() < 0.40  # by row


def test_rounding_differs_by_step_label_and_use() -> None:
    values = torch.full((1, 256), 1.0 + 0.5 * 2**-7)
    base = rounded(values, 1, np.array([1]), STOCHASTIC[0])
    for step, label, rounding in (
        (2, 1, STOCHASTIC[0]),
        (1, 2, STOCHASTIC[0]),
        (1, 1, STOCHASTIC[1]),
    ):
        other = rounded(values, step, np.array([label]), rounding)
        assert 0.35 < (base == other).float().mean() < 0.65


@pytest.mark.kernel
@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("width", [1, 7, 768])
def test_native_copies_equal_torch_bitwise(row_format: str, width: int) -> None:
    native = native_copier()
    assert native is not None
    types = column_types(row_format, "global", width)
    index = torch.tensor([0, 3, 4, 9, 700])
    values = {name: torch.randn(5, column.width) for name, column in types.items()}
    keys = rounding_row_keys(3, 5, index.numpy())
    results = []
    for copier in (native, TorchCopier()):
        columns = {
            name: Column(torch.zeros(701, column.width, dtype=column.dtype))
            for name, column in types.items()
        }
        stored = {name: value.clone() for name, value in values.items()}
        copier.scatter(columns, index, stored, keys)
        gathered = {name: torch.full_like(value, torch.nan) for name, value in values.items()}
        copier.gather(columns, index, gathered)
        for name in types:
            assert torch.equal(gathered[name], stored[name]), "what is left is what is stored"
        results.append({name: column.tensor for name, column in columns.items()})
    for name in types:
        assert torch.equal(results[0][name], results[1][name])


@pytest.mark.kernel
@pytest.mark.parametrize("row_format", FORMATS)
def test_kernel_and_torch_tables_agree(row_format: str) -> None:
    tables = [make_table(format=row_format, kernel=kernel) for kernel in ("cpu_adam", "torch")]
    for step in range(10):
        for table in tables:
            take_step([table], step)
    # An element on the edge between two bf16 values may round either way.
    tolerance = {"fp32": 1e-6, "bf16_moments": 1e-3, "bf16": 1e-2, "rowwise": 1e-2}[row_format]
    torch.testing.assert_close(dense([tables[0]]), dense([tables[1]]), atol=tolerance, rtol=0)


def test_rows_are_copied_by_torch_where_c_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.warns(UserWarning, match="could not be compiled"):
        assert native_library.__wrapped__() is None


def test_rows_are_copied_by_torch_where_nothing_can_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match="could not be compiled"):
        assert native_library.__wrapped__() is None


def test_initial_rows_are_xavier_uniform() -> None:
    rows = xavier_rows(np.arange(3000), 3000, 96, seed=1)
    bound = (6 / (3000 + 96)) ** 0.5
    assert rows.abs().max() <= bound
    assert rows.abs().max() > 0.999 * bound
    assert abs(rows.mean()) < 4 * bound / (3 * rows.numel()) ** 0.5
    assert abs(rows.var() / (bound**2 / 3) - 1) < 0.01
    correlation = torch.corrcoef(rows) - torch.eye(3000)
    assert correlation.abs().max() < 0.7
    assert abs(correlation.std() * 96**0.5 - 1) < 0.02
    assert abs(torch.corrcoef(rows.T) - torch.eye(96)).max() < 0.1
    assert not torch.equal(rows, xavier_rows(np.arange(3000), 3000, 96, seed=2))


def test_no_rows() -> None:
    table = make_table()
    before = dense([table])
    rows = table.fetch(np.zeros(0, np.int64))
    assert rows.shape == (0, D)
    (rows @ torch.zeros(D, 3)).sum().backward()
    table.apply(rows, lr=LR)
    assert table.step == 1
    table.apply(table.fetch(np.zeros(0, np.int64)), lr=LR)  # without a gradient
    assert torch.equal(dense([table]), before)


def test_more_ranks_than_labels(tmp_path: Path) -> None:
    for kind in ("cpu", "nvme", "device"):
        table = make_table(2, 3, Placement(kind, tmp_path), num_labels=2)
        assert table.fetch(np.zeros(0, np.int64)).shape == (0, D)
        assert table.state()["rows"].shape == (0, D)


def test_write_then_read_and_the_last_label_of_a_shard() -> None:
    table = make_table(1, 3)
    label_ids = partition.owned(np.arange(L), 1, 3)[::-1].copy()
    values = torch.randn(len(label_ids), D)
    table.write(label_ids, values)
    assert torch.equal(table.read(label_ids), values)
    assert torch.equal(table.read(label_ids[:1]), values[:1])


@pytest.mark.parametrize("label_ids", [[0], [1, L], [-2, 1], [4, 1], [1, 1]])
def test_wrong_label_ids_are_our_own_fault(label_ids: list[int]) -> None:
    with pytest.raises(AssertionError):
        make_table(1, 3).fetch(np.array(label_ids))


def test_apply_takes_only_the_leaf_of_the_last_fetch() -> None:
    table = make_table()
    rows = table.fetch(pool(0))
    rows.sum().backward()
    with pytest.raises(AssertionError):
        table.apply(rows.detach(), lr=LR)
    table.apply(rows, lr=LR)
    with pytest.raises(AssertionError):
        table.apply(rows, lr=LR)


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("world_sizes", [(1, 1), (2, 3), (3, 1)])
def test_resumes_at_any_world_size(row_format: str, world_sizes: tuple[int, int]) -> None:
    old_world_size, new_world_size = world_sizes
    config = {"format": row_format, "bias_correction": "per_row"}
    old = [make_table(rank, old_world_size, **config) for rank in range(old_world_size)]
    new = [make_table(rank, new_world_size, **config) for rank in range(new_world_size)]
    for step in range(4):
        take_step(old, step)
    for table in new:
        for rank, shard in enumerate(old):
            table.load_shard(shard.state(), rank, old_world_size)
        assert table.step == 4
    for step in range(4, 8):
        take_step(old, step)
        take_step(new, step)
    assert torch.equal(dense(old), dense(new))


def test_state_of_another_format_or_size_is_refused() -> None:
    table = make_table(format="bf16")
    with pytest.raises(CheckpointError, match=r"rows \[53, 12\] float32.*rows \[53, 12\] bfloat16"):
        table.load_state(make_table().state())
    with pytest.raises(CheckpointError, match=r"\[54, 12\]"):
        make_table().load_state(make_table(num_labels=54).state())


def mapped_files(folder: Path) -> list[str]:
    """Returns the files under `folder` that this process has mapped."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line[line.index("/") :] for line in maps if f" {folder}/" in line]


def test_nvme_files_have_no_name_and_go_with_the_table(tmp_path: Path) -> None:
    table = make_table(placement=Placement("nvme", tmp_path))
    other_run = make_table(placement=Placement("nvme", tmp_path))
    take_step([table], 0)
    assert len(mapped_files(tmp_path)) == 6
    assert all(file.endswith("(deleted)") for file in mapped_files(tmp_path))
    assert not list(tmp_path.iterdir())
    assert torch.equal(dense([other_run]), dense([make_table()])), "each run has its own"
    del table, other_run
    gc.collect()
    assert not mapped_files(tmp_path)


def test_nvme_path_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nvme_path is not set"):
        make_table(placement=Placement("nvme"))
    with pytest.raises(UserError, match=r"missing is not a directory"):
        make_table(placement=Placement("nvme", tmp_path / "missing"))
    with pytest.raises(UserError, match="cannot hold the classifier table"):
        make_table(placement=Placement("nvme", Path("/proc")), num_labels=0)


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        needed = r"cannot hold the classifier table: \[Errno.*needs 4,320,000 bytes"
        with pytest.raises(UserError, match=needed):
            make_table(placement=Placement("nvme", tmp_path), num_labels=30_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["cpu", "nvme"])
def test_a_table_that_does_not_fit_is_refused_with_what_would(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "free_bytes", lambda placement, device: 7 * 2**30)
    with pytest.raises(UserError) as caught:
        capacity.check_fits(1_300_000, 768, 1, "fp32", "global", Placement(kind, tmp_path), CPU)
    message = str(caught.value)
    assert "11,980,800,000 bytes" in message
    assert "7.0 GiB" in message
    assert "format: bf16 (5.6 GiB)" in message
    assert "rowwise" in message
    assert "bf16_moments" not in message
    assert "a world size of 2 or more" in message


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "free_bytes", lambda placement, device: 7 * 2**30)
    arguments = (1_300_000, 768, 4, "fp32", "global", Placement(), CPU)
    capacity.check_fits(*arguments, local_world_size=2)
    with pytest.raises(UserError, match="a world size of 7 or more with 4 ranks a machine"):
        capacity.check_fits(*arguments, local_world_size=4)


def test_a_table_larger_than_any_machine_is_refused() -> None:
    with pytest.raises(UserError, match="does not fit into host memory"):
        capacity.check_fits(10**12, 768, 1, "fp32", "global", Placement(), CPU)
    assert 2**20 < capacity.host_free_bytes() < 2**50


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_a_snapshot_is_the_table_as_it_was_whatever_steps_do_while_it_is_read(
    monkeypatch, name, world_size
):
    monkeypatch.setattr(snapshot, "_BLOCK_BYTES", 5 * D)  # a few rows a block
    tables = [
        make_table(rank, world_size, format=name, bias_correction="per_row")
        for rank in range(world_size)
    ]
    for step in range(4):
        take_step(tables, step)
    for steps_a_block in (0, 1, 3):
        expected = [{k: v.clone() for k, v in table.state().items()} for table in tables]
        readers = [table.snapshot().read() for table in tables]
        found: list[list[Tensor]] = [[] for _ in tables]
        for blocks in zip_longest(*readers):
            for mine, block in zip(found, blocks, strict=True):
                if block is not None:
                    mine.append(block.flatten().view(torch.uint8))
            for _ in range(steps_a_block):
                step += 1
                take_step(tables, step)
        for table, mine, state in zip(tables, found, expected, strict=True):
            whole = [tensor.flatten().view(torch.uint8) for tensor in state.values()]
            assert torch.equal(torch.cat(mine), torch.cat(whole))
            assert table._snapshot is not None
            assert not table._snapshot._preserved


def test_a_snapshot_is_read_in_a_thread_while_steps_are_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "_BLOCK_BYTES", 256)
    table, step = make_table(num_labels=L, format="bf16"), 0
    for save in range(20):
        expected = {k: v.clone() for k, v in table.state().items()}
        taken = table.snapshot()
        path = tmp_path / f"{save}.safetensors"
        with ThreadPoolExecutor(1) as worker:
            entry = worker.submit(stream_tensors, path, taken.shapes(), taken.read())
            while not entry.done():
                take_step([table], step)
                step += 1
        found = load_file(path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert entry.result() == {"bytes": path.stat().st_size, "sha256": sha256(path)}
    assert step > 20
