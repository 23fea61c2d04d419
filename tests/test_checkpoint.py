"""Checkpoints: whole or not there, no pickles, any world size, damage is named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

from unidec_ds import checkpoint, comm
from unidec_ds.classifier.storage import Placement
from unidec_ds.classifier.table import ClassifierConfig, ClassifierTable
from unidec_ds.errors import CheckpointError

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
    return checkpoint.save(Path(folder), step, ENCODER, table, keep=keep, details={"note": "x"})


def read_all(folder):
    table = make_table(seed=99)
    newest = checkpoint.latest(Path(folder))
    checkpoint.load_rows(newest, checkpoint.read_manifest(newest), table)
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
    manifest = checkpoint.read_manifest(newest)
    assert (manifest["step"], manifest["note"], manifest["num_labels"]) == (9, "x", 11)
    tensors = checkpoint.load_tensors(newest, manifest, checkpoint.ENCODER_FILE)
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
    file = folder / checkpoint.ENCODER_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    manifest = checkpoint.read_manifest(folder)
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors is damaged"):
        checkpoint.load_tensors(folder, manifest, checkpoint.ENCODER_FILE)
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="its manifest says"):
        checkpoint.read_manifest(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint.read_manifest(folder)
    (folder / "manifest.json").write_text('{"format_version": 1')
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.read_manifest(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        checkpoint.read_manifest(folder)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    folder = save(tmp_path, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    (tmp_path / "secret").write_text("x")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint.read_manifest(folder)


def test_rows_of_other_labels_are_refused(tmp_path):
    folder = save(tmp_path, 3)
    with pytest.raises(CheckpointError, match="11 labels of width 4; this run has 12"):
        checkpoint.load_rows(folder, checkpoint.read_manifest(folder), make_table(num_labels=12))
