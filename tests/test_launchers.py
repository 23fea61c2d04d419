"""The same train.py under every launcher gives the same first losses; runs are used afterwards."""

import json
import subprocess
import sys

import pytest
from clusters_page import LAUNCHERS, commands, runnable
from launching import BIN, ROOT, environment
from ranks import free_port
from tiny import make_inputs, write_recipe_file
from training import read_losses

pytestmark = [pytest.mark.slow, pytest.mark.kernel]

FAR_BELOW_THE_TIMEOUT_S = 240  # which is 30 minutes


def start(command):
    """Runs a command to its end, which a rank that waits for ever would not let it reach."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(OMP_NUM_THREADS="1"),
        capture_output=True, text=True, timeout=FAR_BELOW_THE_TIMEOUT_S,
    )  # fmt: skip


def job(inputs, run, *options):
    return ["--recipe", str(inputs / "recipe.yaml"), "--output", str(run), *options]


def train_alone(inputs, run, *options):
    ds_config = ["--ds_config", str(inputs / "ds_config.json")]
    return start([sys.executable, "train.py", *ds_config, *job(inputs, run, *options)])


def on_two_ranks(launcher, inputs, run, *options):
    """Returns the command of docs/clusters.md for eight GPUs with two CPU ranks."""
    command = commands("Eight GPUs")[launcher]
    return runnable(command, inputs, job(inputs, run, *options), free_port())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    write_recipe_file(folder)
    return folder


@pytest.fixture(scope="module")
def plain(inputs):
    done = train_alone(inputs, inputs / "plain")
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_ranks_under_each_launcher_follow_the_losses_of_one_process(
    inputs, plain, tmp_path, name
):
    done = start(on_two_ranks(name, inputs, tmp_path / "run"))
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
    again = train_alone(inputs, inputs / "plain", "--resume", "auto")
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
    wrong = (inputs, tmp_path / "run", "--set", "train.epochs=0")
    for done in (train_alone(*wrong), start(on_two_ranks("deepspeed", *wrong))):
        assert done.returncode == 2
        assert done.stderr.count("train.epochs: found 0") == 1
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("how", ["exception", "kill"])
def test_a_failure_under_a_launcher_is_told_once_and_ends_the_job(inputs, tmp_path, launcher, how):
    command = on_two_ranks(launcher, inputs, tmp_path / "run")
    place = command.index("train.py")
    command[place : place + 1] = ["tests/failing_rank.py", how, "1"]
    if launcher == "deepspeed":
        command.insert(1, "--no_local_rank")  # an option that would come before these two words
    done = start(command)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert said.count("[rank 0] stopped: rank 1 (host ") == 1, said
    assert said.count("[rank 1] stopped") == 0
    assert said.count("[rank 0] Traceback") == 0
    if how == "exception":
        assert said.count("[rank 1] Traceback") == 1
        assert said.count("[rank 1] ZeroDivisionError: our own fault") == 1
        assert "failed: ZeroDivisionError: our own fault" in said
    else:
        assert said.count("[rank 1]") == 0
        assert "is gone: its process was killed" in said
    assert len(read_losses(tmp_path / "run")) == 3
