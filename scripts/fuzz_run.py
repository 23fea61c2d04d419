"""What must hold of the files that describe a run, and of those that it leaves."""

# ruff: noqa: PT017  (an error that names the wrong line is a finding, no test's expectation)

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from fuzz_files import (
    MINED,
    SAFETENSORS,
    TENSORS,
    manifest_file,
    put,
    shortlists_file,
)
from ruamel.yaml import YAML

from unidec_ds.config import load_recipe, write_recipe
from unidec_ds.ds_config import load_ds_config
from unidec_ds.errors import ConfigError, UserError
from unidec_ds.manifest import ENCODER_FILE, load_tensors, read_manifest, rows_file
from unidec_ds.mining.mined import open_mined


def check_recipe(data: bytes, folder: Path) -> bool:
    """Checks a recipe."""
    path = folder / "recipe.yaml"
    path.write_bytes(data)
    try:
        recipe = load_recipe(str(path))
    except UserError as error:
        assert str(path) in str(error)
        assert not isinstance(error, ConfigError) or error.faults
        return False
    values = recipe.as_yaml_object()
    for section, keys in YAML(typ="safe", pure=True).load(data.decode().lstrip("\ufeff")).items():
        for key, value in keys.items():
            assert values[section][key] == value, (section, key)
    write_recipe(recipe, folder / "again.yaml")
    assert load_recipe(str(folder / "again.yaml")) == recipe
    return True


def check_ds_config(data: bytes, folder: Path) -> bool:
    """Checks a ds_config."""
    path = folder / "ds_config.json"
    path.write_bytes(data)
    try:
        config = load_ds_config(path, batch_size=12, world_size=2)
    except UserError as error:
        assert str(path) in str(error)
        return False
    assert config.content == json.loads(data)
    assert config.zero_stage in (0, 1, 2)
    assert config.dtype in ("bf16", "fp32")
    assert config.offload.get("device", "none") in ("none", "cpu", "nvme")
    assert config.gradient_clipping >= 0
    assert config.for_engine(12, 2)["train_batch_size"] == 12
    return True


def check_manifest(data: bytes, folder: Path) -> bool:
    """Checks a checkpoint's manifest."""
    put(folder, {**SAFETENSORS, "manifest.json": data})
    try:
        manifest = read_manifest(folder)
        ranks = range(manifest["world_size"])
        names = [ENCODER_FILE, *(rows_file(r, len(ranks)) for r in ranks)]
        tensors = [load_tensors(folder, manifest, name) for name in names]
    except UserError as error:
        assert str(folder) in str(error)
        return False
    assert manifest == json.loads(data)
    assert sorted(tensors[0]) == sorted(TENSORS)
    assert all((tensors[0][name].numpy() == array).all() for name, array in TENSORS.items())
    return True


def check_safetensors(data: bytes, folder: Path) -> bool:
    """A damaged file whose manifest says that it is right."""
    files = {**SAFETENSORS, ENCODER_FILE: data}
    put(folder, {**files, "manifest.json": manifest_file(files)})
    try:
        manifest = read_manifest(folder)
        tensors = load_tensors(folder, manifest, ENCODER_FILE)
    except UserError as error:
        assert str(folder / ENCODER_FILE) in str(error)
        return False
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    assert {n: list(t.shape) for n, t in tensors.items()} == {
        name: entry["shape"] for name, entry in header.items()
    }
    for name, entry in header.items():
        begin, end = (8 + size + at for at in entry["data_offsets"])
        assert (
            tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
            == (data[begin:end])
        )
    return True


def check_shortlists(data: bytes, folder: Path) -> bool:
    """Checks the shortlists of a mining."""
    place = folder / "epoch-0001"
    place.mkdir(exist_ok=True)
    put(place, {"shortlists.npy": data, "mined.json": json.dumps(MINED).encode()})
    try:
        mined = open_mined(folder, 1)
    except UserError as error:
        assert str(place) in str(error)
        return False
    assert mined.shortlists.dtype == np.int32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a header that Python 2 would have written
        assert np.array_equal(mined.shortlists, np.load(io.BytesIO(data)))
    return True


def check_mined_record(data: bytes, folder: Path) -> bool:
    """Checks the record of a mining."""
    place = folder / "epoch-0001"
    place.mkdir(exist_ok=True)
    put(place, {"shortlists.npy": shortlists_file(), "mined.json": data})
    try:
        mined = open_mined(folder, 1)
    except UserError as error:
        assert str(place) in str(error)
        return False
    figures = mined.figures()
    assert all(isinstance(value, (int, float)) for value in figures.values()), figures
    return True
