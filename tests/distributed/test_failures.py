"""Real ranks without a launcher that would end the others: none waits, one says what happened."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port
from tiny import make_inputs, write_recipe_file
from training import read_losses

pytestmark = [pytest.mark.slow, pytest.mark.kernel]

SCRIPT = Path(__file__).parents[1] / "failing_rank.py"
FAR_BELOW_THE_TIMEOUT_S = 240  # which is 30 minutes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def run_job(inputs, run, *how, options=((), ())):
    """Returns (exit codes, what each rank wrote to stderr) of a job of two ranks."""
    recipe = write_recipe_file(inputs, f"{run.name}.yaml")
    command = [sys.executable, str(SCRIPT), *how, "--recipe", str(recipe)]
    command += ["--ds_config", str(inputs / "ds_config.json"), "--output", str(run)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [*command, *options[rank]],
            env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=FAR_BELOW_THE_TIMEOUT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


@pytest.mark.parametrize(("how", "killed"), [("kill", 0), ("kill and stop", 1)])
def test_a_killed_rank_ends_the_other_which_names_it(inputs, tmp_path, how, killed):
    codes, said = run_job(inputs, tmp_path / "run", how, str(killed))
    survivor = 1 - killed
    assert codes[killed] == -signal.SIGKILL, said
    assert codes[survivor] == 1
    assert said[survivor].count(f"[rank {survivor}] stopped: rank {killed} (host ") == 1
    assert "is gone: its process was killed" in said[survivor]
    assert "SIGTERM" not in said[survivor]  # nothing will be saved, nothing is promised
    assert "Traceback" not in "".join(said)
    assert len(read_losses(tmp_path / "run")) == 3


def test_an_exception_on_one_rank_is_shown_once(inputs, tmp_path):
    codes, said = run_job(inputs, tmp_path / "run", "exception", "1")
    assert codes == [1, 1]
    assert "".join(said).count("Traceback") == 1
    assert "[rank 1] ZeroDivisionError: our own fault" in said[1]
    assert said[0].count("[rank 0] stopped: rank 1 (host ") == 1
    assert "failed: ZeroDivisionError: our own fault" in said[0]


def test_a_users_mistake_that_one_rank_meets_ends_all_with_2(inputs, tmp_path):
    codes, said = run_job(inputs, tmp_path / "run", "user", "1")
    assert codes == [2, 2]
    assert "Traceback" not in "".join(said)
    assert said[1].count("error: this disk is full") == 1
    assert said[0].count("[rank 0] stopped: rank 1 (host ") == 1


def test_a_rank_that_hangs_ends_the_job_at_the_timeout(inputs, tmp_path):
    options = (("--timeout_minutes", "0.3"),) * 2
    codes, said = run_job(inputs, tmp_path / "run", "hang", "1", options=options)
    assert codes == [1, 1]
    assert "".join(said).count("Traceback") == 1
    assert "[rank 0] RuntimeError: " in said[0]
    assert "Timed out" in said[0]
    assert said[1].count("[rank 1] stopped: rank 0 (host ") == 1


def test_a_wrong_option_on_one_rank_ends_all_before_training(inputs, tmp_path):
    options = ((), ("--set", "train.epochs=0"))
    codes, said = run_job(inputs, tmp_path / "run", "none", "2", options=options)
    assert codes == [2, 2]
    assert "error: " in said[1]
    assert "train.epochs: found 0" in said[1]
    assert "[rank 0] stopped: rank 1 (host " in said[0]
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "run").exists()


def test_ranks_that_see_two_run_directories_end_with_2_and_one_message(inputs, tmp_path):
    options = ((), ("--output", str(tmp_path / "own")))
    codes, said = run_job(inputs, tmp_path / "run", "impatient", "none", options=options)
    assert codes == [2, 2]
    assert "".join(said).count("error: the ranks cannot train together") == 1
    assert "".join(said).count(f"did not find in {tmp_path / 'own'} what rank 0 (host ") == 1
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "run").exists()
