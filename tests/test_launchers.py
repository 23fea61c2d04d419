"""The same train.py under every launcher gives the same first losses; runs are used afterwards."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_inputs, write_recipe_file
from training import read_losses

pytestmark = [pytest.mark.slow, pytest.mark.kernel]

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(launcher, inputs, run, *options):
    command = [
        *launcher,
        str(ROOT / "train.py"),
        "--recipe",
        str(inputs / "recipe.yaml"),
        "--ds_config",
        str(inputs / "ds_config.json"),
        "--output",
        str(run),
        *options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        environment.pop(name, None)
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    write_recipe_file(folder)
    return folder


@pytest.fixture(scope="module")
def plain(inputs):
    done = launch([sys.executable], inputs, inputs / "plain")
    assert done.returncode == 0, done.stderr
    return done


LAUNCHERS = {
    "deepspeed": lambda: [
        str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", free_port(),
    ],
    "accelerate": lambda: [
        str(BIN / "accelerate"), "launch", "--use_deepspeed", "--num_processes", "2",
        "--main_process_port", free_port(),
    ],
    "torchrun": lambda: [
        str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", free_port(),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_ranks_under_each_launcher_follow_the_losses_of_one_process(
    inputs, plain, tmp_path, name
):
    done = launch(LAUNCHERS[name](), inputs, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    one, two = read_losses(inputs / "plain"), read_losses(tmp_path / "run")
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
    manifest = next((tmp_path / "run" / "checkpoints").glob("step_*")) / "manifest.json"
    assert json.loads(manifest.read_text())["world_size"] == 2


def test_a_run_directory_follows_the_contract(inputs, plain):
    run = inputs / "plain"
    assert "unified" in plain.stdout
    assert "query:" in plain.stdout
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "ds_config.json", "metrics.jsonl", "evaluation.json"} <= names
    assert [name for name in names if name.startswith("events.out.tfevents")]
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    keys = {"step", "epoch", "loss", "loss_de", "loss_classifier", "lr", "pool_size", "step_s"}
    assert keys <= first.keys()
    evaluation = json.loads((run / "evaluation.json").read_text())
    cut_offs = (1, 3, 5, 10, 100)
    names = ("P", "nDCG", "PSP", "PSnDCG", "R", "coverage")
    for view in ("untrained", "de", "classifier", "unified", "unified_tuned"):
        assert evaluation["test"][view].keys() == {f"{n}@{k}" for n in names for k in cut_offs}
    chosen = evaluation["details"]["unified_tuned"]
    assert chosen["chosen_on"] == "validation"
    assert f"{chosen['weight_de']:g}" in chosen["tried"]
    assert f"unified_tuned: weight of the dual encoder {chosen['weight_de']:g}" in plain.stdout


def test_a_finished_run_is_reused_evaluated_and_asked(inputs, plain, tmp_path):
    again = launch([sys.executable], inputs, inputs / "plain", "--resume", "auto")
    assert again.returncode == 0, again.stderr

    def command(*arguments, **options):
        return subprocess.run(
            [str(BIN / "unidec-ds"), *arguments],
            capture_output=True, text=True, check=False, timeout=120, **options,
        )  # fmt: skip

    done = command("evaluate", str(inputs / "plain"), "--json", str(tmp_path / "m.json"))
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((inputs / "plain" / "evaluation.json").read_text())
    trained = evaluation["test"]
    again = json.loads((tmp_path / "m.json").read_text())["test"]
    assert list(again) == ["de", "classifier", "unified", "unified_tuned"]
    for view, metrics in again.items():
        assert metrics == pytest.approx(trained[view])
    done = command(
        "predict", str(inputs / "plain"), "--input", "-", "--k", "3", "--json",
        input="red car\n\nsmall house\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [len(answer["labels"]) for answer in answers] == [3, 0, 3]
    scores = [label["score"] for label in answers[0]["labels"]]
    assert scores == sorted(scores, reverse=True)
    chosen = evaluation["details"]["unified_tuned"]["weight_de"]
    weighted = [
        command(
            "predict", str(inputs / "plain"), "--input", "-", "--json", "--weight-de", weight,
            input="red car\n",
        )
        for weight in ("tuned", str(chosen))
    ]  # fmt: skip
    assert weighted[0].returncode == 0, weighted[0].stderr
    assert weighted[0].stdout == weighted[1].stdout
    done = command("info", str(inputs / "plain"))
    assert done.returncode == 0, done.stderr
    assert "step 21 of 21" in done.stdout
    assert command("info", str(tmp_path)).returncode == 2


def test_a_wrong_input_leaves_with_2_under_python_and_deepspeed(inputs, tmp_path):
    for launcher in ([sys.executable], LAUNCHERS["deepspeed"]()):
        done = launch(launcher, inputs, tmp_path / "run", "--set", "train.epochs=0")
        assert done.returncode == 2
        assert done.stderr.count("train.epochs: found 0") == 1
        assert not (tmp_path / "run").exists()
