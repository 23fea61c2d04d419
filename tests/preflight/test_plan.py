"""`unidec-ds plan`: the page, the JSON, and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_inputs, write_recipe_file

from unidec_ds import cli
from unidec_ds.preflight import command
from unidec_ds.preflight.fits import Room
from unidec_ds.preflight.memory import BASE_NAME

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def plan(inputs, monkeypatch, capsys, *options, **sections):
    """Returns (exit code, output, errors, JSON or None)."""
    recipe = write_recipe_file(inputs, **sections)
    out = inputs / "plan.json"
    out.unlink(missing_ok=True)
    arguments = ["plan", "--recipe", recipe, "--ds_config", inputs / "ds_config.json",
                 "--json", out, *options]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["unidec-ds", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    captured = capsys.readouterr()
    content = json.loads(out.read_text()) if out.exists() else None
    return left.value.code, captured.out, captured.err, content


def test_a_corpus_gives_the_page_and_the_json(inputs, monkeypatch, capsys):
    code, page, errors, content = plan(
        inputs, monkeypatch, capsys, "--measure", 0, mining={"every_epochs": 1, "start_epoch": 1}
    )
    assert code == 0, errors
    host = content["memory"]["host"]
    assert host["peak_bytes"] == sum(
        part["num_bytes"]
        for part in host["parts"]
        if part["stage"] in ("always", host["greediest_stage"]) and not part["reclaimable"]
    )
    assert content["sizes"]["num_labels"] == 60
    assert content["flops"]["step"] == sum(
        content["flops"][f"step_{name}"] for name in ("encoder", "heads", "loss")
    )
    assert content["measured"] is None
    assert content["hours"] == {}
    assert {need["place"] for need in content["fits"]} == {"host", "disk"}
    for part in ("host memory of one rank", "classifier table, fp32", "and while mining",
                 "checkpoints, 1 of", "time: not measured (--measure 0)", ": yes"):  # fmt: skip
        assert part in page
    assert not (ROOT / "runs" / "recipe").exists()


def test_sizes_stand_in_for_a_corpus(inputs, monkeypatch, capsys):
    options = ["--labels", 1_305_265, "--queries", 2_248_619, "--positives", 22.2,
               "--device", "cuda", "--host-gib", 10, "--device-gib", 80]  # fmt: skip
    sections = {"corpus": {"path": "/nowhere"}, "model": {"width": 768}}
    code, page, errors, content = plan(inputs, monkeypatch, capsys, *options, **sections)
    assert code == 0, errors
    table = next(
        p for p in content["memory"]["host"]["parts"] if p["name"].startswith("classifier table")
    )
    assert table["num_bytes"] == 1_305_265 * 768 * 12
    verdicts = {need["place"]: need["fits"] for need in content["fits"]}
    assert verdicts == {"host": False, "device": True, "disk": True}
    assert "classifier.format: rowwise" in content["alternatives"]
    assert "texts of unknown length count as 8 tokens" in page
    assert "time: not measured (there is no corpus yet)" in page


def test_more_ranks_hold_smaller_shards_and_talk(inputs, monkeypatch, capsys):
    sizes = ["--labels", 10_000, "--queries", 5_000, "--device", "cuda"]

    def at(world_size):
        options = [*sizes, "--world-size", world_size, "--ranks-per-machine", 1]
        return plan(inputs, monkeypatch, capsys, *options)[3]

    one, four = at(1), at(4)
    table = [
        next(p["num_bytes"] for p in c["memory"]["host"]["parts"] if "table" in p["name"])
        for c in (one, four)
    ]
    assert table[0] == 4 * table[1]
    links = [{move["link"] for move in c["traffic_bytes_per_step"]} for c in (one, four)]
    assert links[1] - links[0] == {"network"}


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        (["--labels", 5], "give both"),
        (["--labels", 0, "--queries", 4], "needs at least one label"),
        (["--world-size", 0], "--world-size: found 0"),
        (["--world-size", 2, "--ranks-per-machine", 3], "--ranks-per-machine: found 3"),
        (["--measure", -1], "--measure: found -1"),
        (["--world-size", 13], "--world-size: found 13; needs at most train.batch_size, 12"),
    ],
)
def test_bad_options_leave_with_2(inputs, monkeypatch, capsys, options, needed):
    code, _, errors, content = plan(inputs, monkeypatch, capsys, *options)
    assert code == 2
    assert needed in errors
    assert content is None


def test_a_run_that_does_not_fit_gets_its_page_and_is_not_measured(inputs, monkeypatch, capsys):
    def must_not_run(*_):
        raise AssertionError("measured")

    room = Room(host_bytes=1000, device_bytes=None, run_disk_bytes=1 << 40)
    monkeypatch.setattr(command, "room_here", lambda run, ranks, num_running: room)
    monkeypatch.setattr(command, "measure", must_not_run)
    code, page, errors, content = plan(inputs, monkeypatch, capsys)
    assert code == 0, errors
    assert "time: not measured (it does not fit this machine)" in page
    assert "use a larger machine" in page
    assert {need["place"]: need["fits"] for need in content["fits"]} == {
        "host": False,
        "disk": True,
    }


def test_more_ranks_than_pool_labels(inputs, monkeypatch, capsys):
    """Steps in which a rank has no row to move are planned like others."""
    options = ["--world-size", 12, "--measure", 0]
    code, page, errors, content = plan(inputs, monkeypatch, capsys, *options, pool={"size": 12})
    assert code == 0, errors
    assert "traffic of one rank in a step" in page
    assert all(move["num_bytes"] for move in content["traffic_bytes_per_step"])


def test_without_measuring_deepspeed_is_not_imported(inputs):
    recipe = write_recipe_file(inputs)
    program = (
        "import sys; from unidec_ds.cli import _main; _main(); print('deepspeed' in sys.modules)"
    )
    arguments = ["plan", "--recipe", recipe, "--ds_config", inputs / "ds_config.json",
                 "--measure", "0"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.slow
def test_measured_steps_give_hours(inputs, monkeypatch, capsys):
    code, page, errors, content = plan(inputs, monkeypatch, capsys, "--measure", 2)
    assert code == 0, errors
    measured = content["measured"]
    assert measured["steps"] == 2
    expected = content["steps_per_epoch"] * measured["step_s"] / 3600
    assert content["hours"]["steps_per_epoch"] == pytest.approx(expected)
    base = [p for p in content["memory"]["host"]["parts"] if p["name"] == BASE_NAME]
    assert [part["num_bytes"] for part in base] == [measured["base_bytes"]]
    assert measured["peak_bytes"] > measured["base_bytes"] > 100 << 20
    assert "2 steps of" in page
