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
        return num_checkpoints(recipe, total_steps, steps_per_epoch=50)

    assert count(100, every_steps=0) == 1
    assert count(100, every_steps=10, keep=2) == 3  # the new one is whole before the oldest goes
    assert count(15, every_steps=10, keep=5) == 2
    assert count(100, every_steps=10, keep=2, keep_best=True) == 4  # the best stays beside
    assert count(100, every_steps=0, keep_best=True) == 3  # of two epochs, and the last
    assert count(50, every_steps=0, keep_best=True, keep=1) == 2


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


def predicted(inputs, device_type="cpu", ds_config="ds_config.json", **sections):
    recipe = load_recipe(str(write_recipe_file(inputs, **sections)))
    corpus = resolve_corpus(recipe.corpus, recipe.encoder.name, 8, show_progress=False)
    ds = load_ds_config(inputs / ds_config, batch_size=recipe.train.batch_size, world_size=1)
    workload, cost = corpus_workload(corpus, recipe, 1), trace_model(recipe, ds, device_type)
    return predict_memory(recipe, ds, workload, cost, device_type)


def named(parts, stage, name):
    (found,) = [p.num_bytes for p in parts if p.stage == stage and p.name == name]
    return found


def test_weighing_the_views_ranks_once_for_each_weight(inputs):
    """Of as many queries each, choosing the weight is the greediest evaluation of a run."""

    def best_bytes(validation_fraction=0.5, **evaluation):
        corpus = {"validation_fraction": validation_fraction}
        parts = predicted(inputs, corpus=corpus, evaluation={"max_queries": 5, **evaluation})
        return named(parts, "evaluation", "best labels so far")

    assert best_bytes() == 8 * 100 * 5 * 21
    assert best_bytes(tune_unified=False) == 8 * 100 * 5 * 3
    assert best_bytes(validation_fraction=0.0) == 8 * 100 * 5 * 3


def test_a_save_in_the_background_counts_beside_the_step(inputs):
    def step_bytes(**checkpoint):
        parts = predicted(inputs, checkpoint=checkpoint)
        return {p.name: p.num_bytes for p in parts if p.stage == "step"}

    waiting = step_bytes(every_steps=5, in_background=False)
    beside = step_bytes(every_steps=5)
    more = set(beside) - set(waiting)
    assert more == {"encoder and moments, copied to be saved", "rows changed during a save"}
    assert beside["rows changed during a save"] == 60 * 12 * 16  # at most the whole table
    assert step_bytes() == waiting


def test_streaming_holds_the_rows_of_one_block(inputs):
    sections = {
        "objective": {"de": "none", "classifier": "bce", "pool": "all"},
        "train": {"loss_block_bytes": 1 << 20},
        "model": {"width": 1 << 16},
    }
    name = "rows and their gradient"
    whole = named(predicted(inputs, **sections), "step", name)
    streamed = predicted(inputs, **sections, classifier={"streamed": True})
    assert whole // named(streamed, "step", name) == 60 // 4  # 2^20 / (4 * 2^16) labels a block


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
