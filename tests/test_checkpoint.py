"""Checkpoints: whole or not there, no pickles, any world size, damage is named."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

from unidec_ds import checkpoint, comm
from unidec_ds.classifier.config import ClassifierConfig
from unidec_ds.classifier.storage import Placement
from unidec_ds.classifier.table import ClassifierTable
from unidec_ds.errors import CheckpointError, SaveError
from unidec_ds.manifest import ENCODER_FILE, load_tensors, read_manifest

ENCODER = {"weight": torch.arange(6.0).reshape(2, 3), "weight.exp_avg": torch.ones(2, 3)}


def make_table(seed=0, num_labels=11):
    return ClassifierTable(
        num_labels=num_labels,
        width=4,
        rank=comm.rank(),
        world_size=comm.world_size(),
        config=ClassifierConfig(kernel="torch", format="fp32"),
        placement=Placement(kind="cpu"),
        device=torch.device("cpu"),
        seed=seed,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
    )


def save(folder, step, keep=2, seed=0):
    table = make_table(seed)
    details = {"note": "x"}
    return checkpoint.Save(Path(folder), step, ENCODER, table, keep=keep, details=details).finish()


def read_all(folder):
    table = make_table(seed=99)
    newest = checkpoint.latest(Path(folder))
    checkpoint.load_rows(newest, read_manifest(newest), table)
    own = np.arange(comm.rank(), 11, comm.world_size())
    return own, table.read(own)


@pytest.mark.parametrize(("saved_by", "read_by"), [(1, 1), (1, 2), (2, 1), (2, 3), (3, 2)])
def test_rows_written_by_some_ranks_are_read_by_others(tmp_path, saved_by, read_by):
    run_ranks(saved_by, save, str(tmp_path), 7)
    expected = make_table().read(np.arange(11))
    for own, rows in run_ranks(read_by, read_all, str(tmp_path)):
        assert torch.equal(rows, expected[torch.from_numpy(own)])


def test_manifest_tensors_and_pruning(tmp_path):
    for step in (3, 5, 9):
        save(tmp_path, step)
    folders = sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir())
    assert folders == ["step_00000005", "step_00000009"]
    newest = checkpoint.latest(tmp_path)
    assert newest.name == "step_00000009"
    manifest = read_manifest(newest)
    assert (manifest["step"], manifest["note"], manifest["num_labels"]) == (9, "x", 11)
    tensors = load_tensors(newest, manifest, ENCODER_FILE)
    assert all(torch.equal(tensors[name], ENCODER[name]) for name in ENCODER)
    assert {p.suffix for p in newest.iterdir()} == {".json", ".safetensors"}


def test_an_interrupted_save_is_never_taken_for_a_checkpoint(tmp_path):
    good = save(tmp_path, 3)
    partial = tmp_path / "checkpoints" / "step_00000005.partial"
    partial.mkdir()
    (partial / "encoder.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoints" / "latest").unlink()
    assert checkpoint.latest(tmp_path) == good
    save(tmp_path, 5)
    assert checkpoint.latest(tmp_path).name == "step_00000005"
    assert not partial.exists()


def test_damage_is_found_and_named(tmp_path):
    folder = save(tmp_path, 3)
    file = folder / ENCODER_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    manifest = read_manifest(folder)
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors is damaged"):
        load_tensors(folder, manifest, ENCODER_FILE)
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="its manifest says"):
        read_manifest(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        read_manifest(folder)
    (folder / "manifest.json").write_text('{"format_version": 1')
    with pytest.raises(CheckpointError, match="is damaged"):
        read_manifest(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        read_manifest(folder)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    folder = save(tmp_path, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    (tmp_path / "secret").write_text("x")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is missing"):
        read_manifest(folder)


def test_rows_of_other_labels_are_refused(tmp_path):
    folder = save(tmp_path, 3)
    with pytest.raises(CheckpointError, match="11 labels of width 4; this run has 12"):
        checkpoint.load_rows(folder, read_manifest(folder), make_table(num_labels=12))


class KilledError(BaseException):
    """What a process that is killed in the middle of a save dies of."""


def kill_at(monkeypatch, moment):
    """Lets the `moment`-th change of a folder be the last thing that happens, once it is done."""
    changes = []

    def dying(owner, name):
        plain = getattr(owner, name)

        def change(*args, **kwargs):
            result = plain(*args, **kwargs)
            changes.append(name)
            if len(changes) == moment:
                raise KilledError
            return result

        monkeypatch.setattr(owner, name, change)

    for owner, name in ((Path, "rename"), (Path, "unlink"), (Path, "mkdir"), (os, "unlink")):
        dying(owner, name)
    return changes


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_newest_checkpoint(tmp_path, monkeypatch):
    """Also where step 5 is written again, and those of the steps after it are of no more use."""
    for moment in range(1, 100):
        run = tmp_path / str(moment)
        for step in (3, 5, 9):
            save(run, step, keep=3)
        (run / "checkpoints" / "latest").write_text("step_00000003\n")  # resumed from there
        with monkeypatch.context() as patch:
            changes = kill_at(patch, moment)
            with contextlib.suppress(KilledError):
                save(run, 5, seed=1)
        newest = checkpoint.latest(run)
        assert checkpoint.find_damage(newest) is None
        assert newest.name.removesuffix(".replaced") in ("step_00000003", "step_00000005")
        for folder in checkpoint.newest_first(run):
            assert checkpoint.find_damage(folder) is None
        save(run, 7)
        assert checkpoint.latest(run).name == "step_00000007"
        names = {path.name.removesuffix(".replaced") for path in (run / "checkpoints").iterdir()}
        assert names <= {"latest", "step_00000003", "step_00000005", "step_00000007"}
        if len(changes) < moment:  # nothing was left to be killed
            assert names == {"latest", "step_00000005", "step_00000007"}
            assert moment > 5
            return
    raise AssertionError("a save that never ends")


def test_the_best_is_kept_beside_the_newest(tmp_path):
    for step, score in ((3, 40.0), (5, 39.0), (9, 38.0)):
        save(tmp_path, step, keep=1)
        if checkpoint.best(tmp_path) is None or score > checkpoint.best(tmp_path).value:
            checkpoint.write_best(tmp_path, step, "unified P@1", score, keep=1)
    assert checkpoint.kept_steps(tmp_path) == [3, 9]
    best = checkpoint.best(tmp_path)
    assert (best.name, best.step, best.value) == ("step_00000003", 3, 40.0)
    assert checkpoint.choose(tmp_path, "best").name == "step_00000003"
    assert checkpoint.choose(tmp_path, "latest").name == "step_00000009"
    checkpoint.write_best(tmp_path, 9, "unified P@1", 41.0, keep=1)
    assert checkpoint.kept_steps(tmp_path) == [9]  # the best before it is not kept any longer
    save(tmp_path, 12, keep=1)
    assert checkpoint.kept_steps(tmp_path) == [9, 12]


def test_checkpoints_of_an_abandoned_future_go_with_the_next_save(tmp_path):
    for step in (3, 5, 9):
        save(tmp_path, step, keep=3)
    save(tmp_path, 4)  # resumed from step 3
    assert checkpoint.latest(tmp_path).name == "step_00000004"
    assert checkpoint.kept_steps(tmp_path) == [3, 4]


def assert_full_disk_is_survived(run, expected):
    with pytest.raises(SaveError, match=r"step 5 could not be written.*step_00000003") as caught:
        save(run, 5)
    assert expected in str(caught.value)
    assert [path.name for path in checkpoint.newest_first(run)] == ["step_00000003"]
    assert checkpoint.find_damage(checkpoint.latest(run)) is None
    assert not list((run / "checkpoints").glob("*.partial"))


def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(tmp_path):
    size = sum(path.stat().st_size for path in save(tmp_path / "size", 3).iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    kilobytes = size // 1024 + 16  # four files of whole pages, and folders; not twice that
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        save(disk, 3)
        assert_full_disk_is_survived(disk, "No space left on device")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_too_large_for_the_quota_is_like_a_full_disk(tmp_path):
    save(tmp_path, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(SaveError, match="File too large"):
            save(tmp_path, 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.find_damage(checkpoint.latest(tmp_path)) is None
    assert [path.name for path in checkpoint.newest_first(tmp_path)] == ["step_00000003"]
