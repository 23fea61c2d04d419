"""The whole job on real ranks: what it logs, reports and resumes; see also `test_world_size`."""

import json

import pytest
import torch
from ranks import run_ranks
from tiny import make_inputs, write_recipe_file
from training import assert_same_weights, read_losses, train

pytestmark = [pytest.mark.slow, pytest.mark.kernel]

NUM_LABELS = 60


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def run_job(
    inputs, run, world_size, overrides=(), ds_config=None, resume=None, crash_at=None, **sections
):
    recipe = write_recipe_file(inputs, f"{run.name}.yaml", **sections)
    ds_file = inputs / "ds_config.json"
    if ds_config is not None:
        ds_file = inputs / f"{run.name}.json"
        ds_file.write_text(json.dumps(ds_config))
    arguments = (str(recipe), str(ds_file), str(run), list(overrides), resume, crash_at)
    return run_ranks(world_size, train, *arguments, join=False)


def assert_same_training(one, other, run_one, run_other):
    losses, others = read_losses(run_one), read_losses(run_other)
    assert losses.keys() == others.keys()
    assert list(losses.values()) == pytest.approx(list(others.values()), rel=1e-4)
    assert_same_weights(one, other, NUM_LABELS)


@pytest.fixture(scope="module")
def one_rank(inputs, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "one"
    return run, run_job(inputs, run, 1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_world_size_trains_the_same_model(inputs, one_rank, tmp_path, world_size):
    run, one = one_rank
    many = run_job(inputs, tmp_path / "many", world_size)
    assert one[0]["step"] == 21
    assert_same_training(one, many, run, tmp_path / "many")
    ours = json.loads((run / "evaluation.json").read_text())["test"]
    theirs = json.loads((tmp_path / "many" / "evaluation.json").read_text())["test"]
    views = {"untrained", "de", "classifier", "unified", "unified_tuned"}
    assert ours.keys() == theirs.keys() == views
    assert ours["untrained"] == theirs["untrained"]  # same weights: the same to the last digit
    for view in ours:
        assert theirs[view]["P@1"] == pytest.approx(ours[view]["P@1"], abs=10)


@pytest.mark.parametrize(
    "objective", [{"de": "none", "classifier": "bce"}, {"de": "balanced", "classifier": "none"}]
)
def test_one_head_alone_trains_and_resumes(inputs, tmp_path, objective):
    sections = {
        "objective": objective,
        "train": {"max_steps": 4},
        "checkpoint": {"every_steps": 2, "keep": 5},
    }
    one = run_job(inputs, tmp_path / "one", 1, **sections)
    two = run_job(inputs, tmp_path / "two", 2, **sections)
    assert_same_training(one, two, tmp_path / "one", tmp_path / "two")
    middle = str(tmp_path / "two" / "checkpoints" / "step_00000002")
    run_job(inputs, tmp_path / "again", 2, resume=middle, **sections)
    before, after = read_losses(tmp_path / "two"), read_losses(tmp_path / "again")
    assert after == {step: before[step] for step in (2, 3)}


def test_bf16_trains_close_to_fp32_and_resumes_exactly(inputs, one_rank, tmp_path):
    config = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
    }
    sections = {"checkpoint": {"every_steps": 5, "keep": 5}}
    run_job(inputs, tmp_path / "bf16", 1, ds_config=config, **sections)
    fp32, bf16 = read_losses(one_rank[0]), read_losses(tmp_path / "bf16")
    assert list(bf16.values())[:5] == pytest.approx(list(fp32.values())[:5], rel=0.05)
    middle = str(tmp_path / "bf16" / "checkpoints" / "step_00000010")
    run_job(inputs, tmp_path / "again", 1, ds_config=config, resume=middle, **sections)
    after = read_losses(tmp_path / "again")
    assert after == {step: bf16[step] for step in range(10, 21)}


def test_with_mining_the_curve_is_the_same_until_the_first_refresh(inputs, tmp_path):
    sections = {
        "mining": {"start_epoch": 1, "every_epochs": 1},
        "batches": {"kind": "clustered"},
        "train": {"epochs": 2},
    }
    for world_size, name in ((1, "one"), (2, "two")):
        run_job(inputs, tmp_path / name, world_size, **sections)
    one, two = read_losses(tmp_path / "one"), read_losses(tmp_path / "two")
    assert [one[step] for step in range(7)] == pytest.approx([two[s] for s in range(7)], rel=1e-4)
    assert one.keys() == two.keys() == set(range(14))


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_training_is_bitwise_the_undisturbed_one(inputs, tmp_path, world_size):
    sections = {
        "mining": {"start_epoch": 1, "every_epochs": 1},
        "checkpoint": {"every_steps": 5, "keep": 5},
        "model": {"head_dropout": 0.1, "row_dropout": 0.1},
    }
    whole = run_job(inputs, tmp_path / "whole", world_size, **sections)
    middle = tmp_path / "whole" / "checkpoints" / "step_00000010"  # in the middle of epoch 1
    (tmp_path / "again" / "mining").parent.mkdir()
    (tmp_path / "whole" / "mining").rename(tmp_path / "again" / "mining")
    again = run_job(inputs, tmp_path / "again", world_size, resume=str(middle), **sections)
    before, after = read_losses(tmp_path / "whole"), read_losses(tmp_path / "again")
    assert set(after) == set(range(10, 21))
    assert {step: before[step] for step in after} == after
    for one, other in zip(whole, again, strict=True):
        for part in ("state", "rows"):
            for name, tensor in one[part].items():
                assert torch.equal(tensor, other[part][name]), name


@pytest.fixture(scope="module")
def cached_mining(inputs, tmp_path_factory):
    """Returns sections and the undisturbed run with mining before steps 7 and 14."""
    sections = {
        "mining": {"start_epoch": 1, "every_epochs": 1, "source": "cached"},
        "batches": {"kind": "clustered"},
        "checkpoint": {"every_steps": 5, "keep": 5},
        "model": {"head_dropout": 0.1, "row_dropout": 0.1},
    }
    run = tmp_path_factory.mktemp("cached") / "whole"
    return sections, run, run_job(inputs, run, 1, **sections)


# A crash before the second mining loses no vector; one after it has overwritten some.
@pytest.mark.parametrize("crash_at", [12, 17])
def test_mining_from_kept_vectors_resumes_bitwise_after_a_crash(
    inputs, cached_mining, tmp_path, crash_at
):
    sections, whole_run, whole = cached_mining
    run = tmp_path / "run"
    run_job(inputs, run, 1, crash_at=crash_at, **sections)
    middle = run / "checkpoints" / "step_00000010"  # in the middle of epoch 1
    again = run_job(inputs, run, 1, resume=str(middle), **sections)
    before, after = read_losses(whole_run), read_losses(run)
    assert after == before
    assert set(before) == set(range(21))
    for part in ("state", "rows"):
        for name, tensor in whole[0][part].items():
            assert torch.equal(tensor, again[0][part][name]), name


def test_mining_from_kept_vectors_reuses_what_steps_encoded(cached_mining):
    _, run, _ = cached_mining
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    mined = {r["step"]: r for r in records if "mining_texts_reused" in r}
    assert set(mined) == {7, 14}
    for record in mined.values():
        assert record["mining_texts_reused"] > record["mining_texts_encoded"]
    shares = [r["mining_share_of_epoch"] for r in records if "mining_share_of_epoch" in r]
    assert len(shares) == 2
    assert all(0 < share < 1 for share in shares)


@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_fetched_ahead_train_bitwise_the_same_model(inputs, tmp_path, world_size):
    """With mining, evaluation and checkpoints between the steps; the one table lies in files."""
    results = {}
    for prefetch_rows, device in (("always", "nvme"), ("never", "cpu")):
        offload = {"device": device, "nvme_path": str(tmp_path)}
        results[prefetch_rows] = run_job(
            inputs,
            tmp_path / prefetch_rows,
            world_size,
            ds_config={"zero_optimization": {"stage": 2, "offload_optimizer": offload}},
            classifier={"format": "bf16", "prefetch_rows": prefetch_rows},
            mining={"start_epoch": 1, "every_epochs": 1},
            evaluation={"every_epochs": 1},
            checkpoint={"every_steps": 4, "keep": 1},
        )
    assert read_losses(tmp_path / "always") == read_losses(tmp_path / "never")
    for ahead, plain in zip(results["always"], results["never"], strict=True):
        for part in ("state", "rows"):
            for name, tensor in plain[part].items():
                assert torch.equal(tensor, ahead[part][name]), name


def test_resume_at_another_world_size_continues_the_curve(inputs, tmp_path):
    sections = {"checkpoint": {"every_steps": 10, "keep": 5}}
    run_job(inputs, tmp_path / "one", 1, **sections)
    middle = tmp_path / "one" / "checkpoints" / "step_00000010"
    run_job(inputs, tmp_path / "two", 2, resume=str(middle), **sections)
    before, after = read_losses(tmp_path / "one"), read_losses(tmp_path / "two")
    assert list(after.values()) == pytest.approx([before[step] for step in after], rel=1e-4)
