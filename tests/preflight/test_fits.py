"""A run that will not fit is refused with settings that do fit."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from tiny import make_inputs, write_recipe_file
from transformers import BertModel

from unidec_ds.config import load_recipe
from unidec_ds.data.prepare import resolve_corpus
from unidec_ds.ds_config import load_ds_config
from unidec_ds.exits import exit_with_message
from unidec_ds.job import prepare_job
from unidec_ds.preflight import fits
from unidec_ds.preflight.memory import peak_bytes
from unidec_ds.preflight.prediction import predict
from unidec_ds.preflight.workload import corpus_workload

PLENTY = fits.Room(1 << 50, 1 << 50, 1 << 50)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def predicted(inputs, overrides=(), device_type="cpu", zero_stage=2, **sections):
    recipe = load_recipe(str(write_recipe_file(inputs, **sections)), list(overrides))
    ds_file = inputs / "ds_config.json"
    if zero_stage != 2:
        ds_file = inputs / "other.json"
        ds_file.write_text(json.dumps({"zero_optimization": {"stage": zero_stage}}))
    ds_config = load_ds_config(ds_file, batch_size=12, world_size=1)
    corpus = resolve_corpus(recipe.corpus, recipe.encoder.name, 8, show_progress=False)
    return predict(
        recipe,
        ds_config,
        lambda recipe, world_size: corpus_workload(corpus, recipe, world_size),
        world_size=1,
        device_type=device_type,
    )


def workload_of(inputs, prediction):
    recipe = prediction.recipe
    corpus = resolve_corpus(recipe.corpus, recipe.encoder.name, 8, show_progress=False)
    return lambda recipe, world_size: corpus_workload(corpus, recipe, world_size)


def refusal(inputs, capsys, monkeypatch, room, overrides=(), **sections):
    """Leaves `prepare_job` where a machine has this room; returns (exit code, message)."""
    monkeypatch.setattr(fits, "room_here", lambda run, ranks, num_running: room)
    recipe = load_recipe(str(write_recipe_file(inputs, **sections)), list(overrides))
    code = exit_with_message(
        lambda: prepare_job(recipe, inputs / "ds_config.json", inputs / "run") and None
    )
    return code, capsys.readouterr().err


def test_a_run_that_fits_passes(inputs, capsys, monkeypatch):
    assert refusal(inputs, capsys, monkeypatch, PLENTY)[0] == 0


def test_too_little_host_memory_names_settings_that_do_fit(inputs, capsys, monkeypatch):
    sections = {"train": {"encoder_chunk": 0, "batch_size": 90}, "pool": {"size": 0}}
    needed = peak_bytes(predicted(inputs, **sections).memory, "host", with_reclaimable=False)
    smaller = predicted(inputs, ["train.encoder_chunk=18"], **sections)
    room = replace(
        PLENTY, host_bytes=peak_bytes(smaller.memory, "host", with_reclaimable=False) + 1
    )
    monkeypatch.setitem(
        fits.TOLERANCES, "host", 0.0
    )  # next to the base memory these models are nothing
    code, message = refusal(inputs, capsys, monkeypatch, room, **sections)
    assert code == 2
    assert f"({needed:,} bytes)" in message
    assert f"({room.host_bytes:,} bytes) are there" in message
    assert "in a training step" in message
    assert not (inputs / "run").exists()
    chunks = [int(size) for size in re.findall(r"train\.encoder_chunk: (\d+)", message)]
    assert chunks
    for chunk in chunks:
        setting = [f"train.encoder_chunk={chunk}"]
        assert refusal(inputs, capsys, monkeypatch, room, setting, **sections)[0] == 0


def test_within_the_tolerance_a_run_is_warned_about_and_not_refused(
    inputs, capsys, monkeypatch, caplog
):
    needed = peak_bytes(predicted(inputs).memory, "host", with_reclaimable=False)
    room = replace(PLENTY, host_bytes=int(0.95 * needed))
    assert refusal(inputs, capsys, monkeypatch, room)[0] == 0
    assert "may not fit" in caplog.text
    room = replace(PLENTY, host_bytes=int(0.85 * needed))
    assert refusal(inputs, capsys, monkeypatch, room)[0] == 2


def test_ranks_of_a_machine_share_its_memory(inputs, monkeypatch):
    prediction = predicted(inputs)
    one = peak_bytes(prediction.memory, "host", with_reclaimable=False)
    (host, _) = fits.needs(prediction, replace(PLENTY, host_bytes=one, ranks=4))
    assert host.needed_bytes == 4 * one
    assert host.cannot_fit


def test_checkpoints_that_the_disk_cannot_hold_are_refused(inputs, capsys, monkeypatch):
    section = {"checkpoint": {"every_steps": 1, "keep": 2}}
    disk = sum(p.num_bytes for p in predicted(inputs, **section).disk)
    room = replace(PLENTY, run_disk_bytes=disk - 1)
    code, message = refusal(inputs, capsys, monkeypatch, room, **section)
    assert code == 2
    assert "does not fit into the disk of" in message
    assert "checkpoints, 3 of" in message
    assert "checkpoint.keep: 1" in message
    smaller = ["checkpoint.keep=1"]
    assert refusal(inputs, capsys, monkeypatch, room, smaller, **section)[0] == 0


def test_where_no_single_setting_is_enough_they_are_tried_together(inputs):
    section = {"checkpoint": {"every_steps": 1, "keep": 2}, "classifier": {"format": "fp32"}}
    both = predicted(inputs, ["classifier.format=rowwise", "checkpoint.every_steps=0"], **section)
    room = replace(PLENTY, run_disk_bytes=sum(p.num_bytes for p in both.disk))
    prediction = predicted(inputs, **section)
    (text,) = fits.fitting_alternatives(prediction, room, workload_of(inputs, prediction))
    assert "classifier.format: rowwise together with" in text
    assert "checkpoint.every_steps: 0" in text


def test_what_makes_another_place_worse_is_no_part_of_all_together(inputs):
    """Moving the table onto the accelerator takes nothing off a full disk."""
    section = {"checkpoint": {"every_steps": 1, "keep": 2}, "classifier": {"format": "fp32"}}
    prediction = predicted(inputs, device_type="cuda", **section)
    smallest = predicted(
        inputs,
        ["classifier.format=rowwise", "checkpoint.every_steps=0"],
        device_type="cuda",
        **section,
    )
    disk = sum(part.num_bytes for part in smallest.disk)
    (text,) = fits.fitting_alternatives(
        prediction, replace(PLENTY, run_disk_bytes=disk), workload_of(inputs, prediction)
    )
    assert "classifier.format: rowwise" in text
    assert "offload_optimizer.device: none" not in text


def test_streaming_the_classifier_is_advice_for_bce_alone(inputs):
    def advised(loss):
        section = {
            "objective": {"de": "none", "classifier": loss, "pool": "all"},
            "train": {"loss_block_bytes": 1 << 20},
            "model": {"width": 1 << 16},  # 15 labels make a block
        }
        prediction = predicted(inputs, **section)
        streamed = (
            predicted(inputs, ["classifier.streamed=true"], **section) if loss == "bce" else 0
        )
        needed = [peak_bytes(p.memory, "host", with_reclaimable=False)
                  for p in (prediction, streamed) if p]  # fmt: skip
        room = replace(PLENTY, host_bytes=needed[-1] * 11 // 10 + 1)
        found = fits.fitting_alternatives(prediction, room, workload_of(inputs, prediction))
        return needed, any("classifier.streamed: true" in text for text in found)

    (plain, streamed), is_advised = advised("bce")
    assert streamed < plain
    assert is_advised
    assert not advised("softmax")[1]


def test_without_zero_no_offloading_is_advised(inputs):
    room = replace(PLENTY, host_bytes=1000)
    for stage, is_tried in ((2, True), (0, False)):
        prediction = predicted(inputs, zero_stage=stage)
        tried = [text for text, *_ in fits._alternatives(prediction, room)]
        assert any("offload_optimizer" in text for text in tried) == is_tried


def test_nothing_helps_is_said(inputs, capsys, monkeypatch):
    code, message = refusal(inputs, capsys, monkeypatch, replace(PLENTY, host_bytes=1000))
    assert code == 2
    assert "use a larger machine" in message


def test_an_encoder_that_cannot_be_traced_is_trained_with_a_warning(
    inputs, capsys, monkeypatch, caplog
):
    def forward(self, input_ids, attention_mask):
        return self.embeddings(input_ids[:, : int(attention_mask.sum(1).max())])

    monkeypatch.setattr(BertModel, "forward", forward)  # a shape that depends on numbers
    code, message = refusal(inputs, capsys, monkeypatch, replace(PLENTY, host_bytes=1000))
    assert code == 0, message
    assert "cannot be run on torch's meta device" in caplog.text
    assert "Only the classifier table was checked" in caplog.text


def test_room_here_counts_what_the_run_has_on_disk_already(inputs, tmp_path):
    before = fits.room_here(tmp_path / "runs" / "none", 1, 1)
    assert before.run_disk_bytes > 0
    assert before.host_bytes > 0
    run = tmp_path / "run"
    run.mkdir()
    (run / "file").write_bytes(b"x" * 4096)
    assert fits.folder_bytes(run) == 4096


def test_only_running_processes_make_room_for_the_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(fits, "host_free_bytes", lambda: 1 << 30)
    monkeypatch.setattr(fits, "host_memory_gib", lambda: 0.5)
    rooms = [fits.room_here(tmp_path, 4, num_running=n) for n in (1, 4)]
    assert [room.host_bytes / 2**30 for room in rooms] == [1.5, 3.0]
    assert {room.ranks for room in rooms} == {4}
