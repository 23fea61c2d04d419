"""A run that is stopped in the middle loses nothing: signals, bad numbers, full disks, damage."""

import json
import shutil

import pytest
import torch
from ranks import run_ranks
from stopping import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import DS_CONFIG, make_inputs, write_recipe_file
from training import read_losses

from unidec_ds import checkpoint
from unidec_ds.manifest import ENCODER_FILE, load_tensors, read_manifest, rows_file

pytestmark = [pytest.mark.slow, pytest.mark.kernel]

SECTIONS = {
    "mining": {"start_epoch": 1, "every_epochs": 1},
    "checkpoint": {"every_steps": 5, "keep": 3, "keep_best": True},
    "model": {"head_dropout": 0.1, "row_dropout": 0.1},
    "train": {"deterministic": True},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    # Deterministic, torch fills what it allocates, and DeepSpeed's buffer of gradients on their way
    # has 2 GB if not told otherwise: a second a step.
    zero = {**DS_CONFIG["zero_optimization"], "reduce_bucket_size": 100_000}
    (folder / "ds_config.json").write_text(json.dumps({**DS_CONFIG, "zero_optimization": zero}))
    return folder


def launch(inputs, run, world_size=2, resume=None, ds_config=None, sections=SECTIONS, **happening):
    recipe = write_recipe_file(inputs, f"{run.name}.yaml", **sections)
    ds_file = inputs / "ds_config.json"
    if ds_config is not None:
        ds_file = inputs / f"{run.name}.json"
        ds_file.write_text(json.dumps(ds_config))
    arguments = (str(recipe), str(ds_file), str(run), resume, *happening.values())
    return run_ranks(world_size, train, *arguments, join=False)


def happens(what, during="step", at=0, on_rank=1):
    return {"what": what, "during": during, "at": at, "on_rank": on_rank}


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert [code for code, _ in launch(inputs, run)] == [0, 0]
    return run


def assert_ends_as(run, undisturbed):
    ours, theirs = checkpoint.latest(run), checkpoint.latest(undisturbed)
    assert read_manifest(ours)["files"] == read_manifest(theirs)["files"]
    assert list(read_losses(run).items()) == list(read_losses(undisturbed).items())
    assert evaluations(run) == evaluations(undisturbed)
    events = EventAccumulator(str(run), {"scalars": 0}).Reload()
    assert [e.step for e in events.Scalars("loss/loss")] == list(range(21))
    assert [e.step for e in events.Scalars("validation_unified/P@1")] == [7, 14, 21]
    assert checkpoint.best(run) == checkpoint.best(undisturbed)


def evaluations(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["split"], r["evaluation"]) for r in records if "evaluation" in r]


def test_files_written_in_the_background_are_those_of_saves_that_wait(
    inputs, undisturbed, tmp_path
):
    waiting = {**SECTIONS["checkpoint"], "in_background": False}
    launch(inputs, tmp_path / "run", sections={**SECTIONS, "checkpoint": waiting})
    steps = checkpoint.kept_steps(undisturbed)
    assert steps == checkpoint.kept_steps(tmp_path / "run")
    assert len(steps) >= 3
    for step in steps:
        one, other = (
            read_manifest(checkpoint.place(run, step))["files"]
            for run in (undisturbed, tmp_path / "run")
        )
        assert one == other


def test_the_best_checkpoint_is_the_one_that_scored_best(undisturbed):
    best = checkpoint.best(undisturbed)
    scores = {s: v["unified"]["P@1"] for s, split, v in evaluations(undisturbed)
              if split == "validation"}  # fmt: skip
    assert scores.keys() == {7, 14, 21}
    assert best.value == max(scores.values()) == scores[best.step]
    assert best.step == min(step for step, score in scores.items() if score == best.value)
    assert checkpoint.find_damage(undisturbed / "checkpoints" / best.name) is None


@pytest.mark.parametrize(
    ("name", "during", "at", "saved"),
    [("SIGUSR1", "step", 11, 12), ("SIGTERM", "evaluation", 14, 14)],
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step_with_nothing_lost(
    inputs, undisturbed, tmp_path, name, during, at, saved
):
    run = tmp_path / "run"
    results = launch(inputs, run, **happens(name, during, at))
    assert [code for code, _ in results] == [75, 75]
    (_, message), (_, other) = results
    assert f"stopped by {name} after step {saved} of 21" in message
    assert "--resume auto" in message
    assert "Traceback" not in message + other
    assert checkpoint.latest(run).name == f"step_{saved:08d}"
    assert [code for code, _ in launch(inputs, run, resume="auto")] == [0, 0]
    assert_ends_as(run, undisturbed)


@pytest.mark.parametrize("what", ["bad row", "bad encoder"])
def test_a_bad_number_on_one_rank_stops_all_and_is_named_and_not_saved(inputs, tmp_path, what):
    run = tmp_path / "run"
    results = launch(inputs, run, **happens(what, at=9))
    assert [code for code, _ in results] == [1, 1]
    (_, message), (_, other) = results
    assert "Traceback" not in message + other
    assert "the loss of step 9 is nan" in message
    assert "rank 1: its share of the loss; " in message
    assert checkpoint.kept_steps(run) == [5, 7]
    assert "step_00000007" in message
    named = message.partition("rank 1: its share of the loss; ")[2].splitlines()[0]
    if what == "bad row":
        label = int(named.removeprefix("classifier rows ").split()[0])
        assert named == f"classifier rows {label} (1)"
        assert label % 2 == 1
    else:
        assert named.startswith("queries ")
        assert "; label texts " in named


def test_a_full_disk_under_one_rank_stops_all_and_leaves_the_checkpoint_before(inputs, tmp_path):
    run = tmp_path / "run"
    results = launch(inputs, run, **happens("full disk", at=8))
    assert [code for code, _ in results] == [1, 1]
    (_, message), (_, other) = results
    assert "Traceback" not in message + other
    assert "the checkpoint of step 10 could not be written" in message
    assert "rank 1: " in message
    assert "step_00000007" in message
    folders = {path.name for path in (run / "checkpoints").iterdir() if path.is_dir()}
    assert folders == {"step_00000005", "step_00000007"}
    assert checkpoint.find_damage(checkpoint.latest(run)) is None


def test_damaged_checkpoints_are_passed_over_loudly_or_refused(inputs, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    steps = checkpoint.kept_steps(run)
    newest, before, good = (checkpoint.place(run, step) for step in reversed(steps[-3:]))
    shard = newest / rows_file(1, 2)
    shard.write_bytes(shard.read_bytes()[:-1])
    flipped = bytearray((before / ENCODER_FILE).read_bytes())
    flipped[-1] ^= 1
    (before / ENCODER_FILE).write_bytes(flipped)
    for code, message in launch(inputs, run, resume=str(before)):
        assert code == 2
        assert ("encoder.safetensors is damaged" in message) == ("error" in message)
    (code, message), (other_code, other) = launch(inputs, run, resume="auto")
    assert [code, other_code] == [0, 0]
    warning = message.partition("WARNING: ")[2]
    assert f"{shard} has" in warning
    assert f"{before / ENCODER_FILE} is damaged" in warning
    assert f"Goes on from {good} instead" in warning
    assert "WARNING" not in other
    assert_ends_as(run, undisturbed)


OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.fixture(scope="module")
def without_mining(inputs, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "without_mining"
    sections = {"checkpoint": {"every_steps": 10, "keep": 5}}
    codes = launch(inputs, run, ds_config=OFFLOADED, sections=sections)
    assert [code for code, _ in codes] == [0, 0]
    return sections, run


@pytest.mark.parametrize(("world_size", "stage"), [(1, 1), (3, 0)])
def test_another_world_size_zero_stage_and_placement_go_on_with_the_same_moments(
    inputs, without_mining, tmp_path, world_size, stage
):
    sections, before = without_mining
    middle = str(before / "checkpoints" / "step_00000010")
    run = tmp_path / f"at_{world_size}"
    on_device = {"zero_optimization": {"stage": stage}}
    codes = launch(inputs, run, world_size, middle, on_device, sections)
    assert [code for code, _ in codes] == [0] * world_size
    losses, theirs = read_losses(run), read_losses(before)
    assert set(losses) == set(range(10, 21))
    assert list(losses.values()) == pytest.approx([theirs[s] for s in losses], rel=1e-4)
    ours, other = (
        load_tensors(folder, read_manifest(folder), ENCODER_FILE)
        for folder in (checkpoint.latest(run), checkpoint.latest(before))
    )
    moments = [name for name in other if "exp_avg" in name and "key.bias" not in name]
    assert moments
    assert ours.keys() == other.keys()
    for name in moments:
        torch.testing.assert_close(ours[name], other[name], rtol=2e-2, atol=1e-5)
