"""Bytes that are exact are those of the real thing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_inputs, write_recipe_file

from unidec_ds.classifier.row_formats import FORMATS
from unidec_ds.classifier.storage import Placement
from unidec_ds.classifier.table import ClassifierTable
from unidec_ds.config import load_recipe
from unidec_ds.data.prepare import resolve_corpus
from unidec_ds.ds_config import load_ds_config
from unidec_ds.preflight.disk import checkpoint_bytes, num_checkpoints
from unidec_ds.preflight.memory import Part, peak_bytes, predict_memory, table_bytes
from unidec_ds.preflight.tracing import trace_model
from unidec_ds.preflight.workload import corpus_workload

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("correction", ["global", "per_row"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_shard_takes_what_was_predicted(inputs, row_format, correction, world_size):
    section = {"format": row_format, "bias_correction": correction, "kernel": "torch"}
    recipe = load_recipe(str(write_recipe_file(inputs, classifier=section)))
    table = ClassifierTable(
        num_labels=61,
        width=24,
        rank=0,
        world_size=world_size,
        config=recipe.classifier,
        placement=Placement(),
        device=torch.device("cpu"),
        seed=0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
    )
    columns = {name: tensor for name, tensor in table.state().items() if name != "step"}
    predicted = table_bytes(recipe, 61, 24, world_size)
    assert predicted == table.allocated_bytes == sum(c.nbytes for c in columns.values())


@pytest.mark.slow
def test_a_real_checkpoint_has_the_bytes_that_were_predicted(inputs):
    sections = {"objective": {"l2q": False}, "train": {"max_steps": 2, "encoder_chunk": 8}}
    recipe_file = write_recipe_file(inputs, "checkpoint.yaml", **sections)
    command = [sys.executable, "train.py", "--recipe", str(recipe_file), "--output",
               str(inputs / "run"), "--ds_config", str(inputs / "ds_config.json")]  # fmt: skip
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=300)
    recipe = load_recipe(str(recipe_file))
    ds_config = load_ds_config(inputs / "ds_config.json", batch_size=12, world_size=1)
    cost = trace_model(recipe, ds_config, "cpu")
    files = list((inputs / "run" / "checkpoints" / "step_00000002").glob("*.safetensors"))
    headers = 0
    for file in files:
        with file.open("rb") as opened:
            headers += 8 + int.from_bytes(opened.read(8), "little")
    sizes = sum(file.stat().st_size for file in files)
    assert checkpoint_bytes(recipe, 60, cost, 1) == sizes - headers


def test_checkpoints_on_disk_at_once(inputs):
    def count(total_steps, **checkpoint):
        recipe = load_recipe(str(write_recipe_file(inputs, checkpoint=checkpoint)))
        return num_checkpoints(recipe, total_steps)

    assert count(100, every_steps=0) == 1
    assert count(100, every_steps=10, keep=2) == 3  # the new one is whole before the oldest goes
    assert count(15, every_steps=10, keep=5) == 2


def test_stages_do_not_add_up_and_mapped_files_count_only_where_asked():
    parts = [
        Part("host", "always", "a", 10, "exact"),
        Part("host", "always", "mapped", 3, "exact", reclaimable=True),
        Part("host", "step", "b", 5, "exact"),
        Part("host", "step", "c", 4, "exact"),
        Part("host", "mining", "d", 8, "exact"),
        Part("device", "step", "e", 100, "exact"),
    ]
    assert peak_bytes(parts, "host", with_reclaimable=False) == 19
    assert peak_bytes(parts, "host", with_reclaimable=True) == 22
    assert peak_bytes(parts, "device", with_reclaimable=False) == 100


def test_where_things_live_follows_the_ds_config(inputs):
    recipe = load_recipe(str(write_recipe_file(inputs)))
    corpus = resolve_corpus(recipe.corpus, recipe.encoder.name, 8, show_progress=False)
    workload = corpus_workload(corpus, recipe, 2)

    def places(zero, device_type):
        path = inputs / "placed.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        ds_config = load_ds_config(path, batch_size=12, world_size=2)
        cost = trace_model(recipe, ds_config, device_type)
        parts = predict_memory(recipe, ds_config, workload, cost, device_type)
        moments = next(p for p in parts if p.name == "their Adam moments")
        table = next(p for p in parts if p.name.startswith("classifier table"))
        shared = cost.num_trainable // (2 if zero["stage"] else 1)
        assert moments.num_bytes == 8 * shared
        return table.place, moments.place

    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    nvme = {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}
    assert places(offload, "cuda") == ("host", "host")
    assert places(nvme, "cuda") == ("nvme", "host")
    assert places({"stage": 1}, "cuda") == ("device", "device")
    assert places({"stage": 0}, "cuda") == ("device", "device")
    assert places({"stage": 1}, "cpu") == ("host", "host")
