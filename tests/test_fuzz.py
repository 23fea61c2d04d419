"""Broken input is refused by name or read rightly, whatever is broken; see scripts/fuzz_targets.py.

python -m pytest tests/test_fuzz.py --hypothesis-profile long      20,000 examples a target
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from fuzz import damage, run_one  # noqa: E402  (a script, found by the line above)
from fuzz_targets import TARGETS  # noqa: E402

settings.register_profile("long", max_examples=20_000)


@pytest.mark.parametrize("name", TARGETS)
def test_a_whole_file_is_accepted(name, tmp_path):
    for data in TARGETS[name].seeds():
        assert run_one(TARGETS[name], data, tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_damage_is_refused_by_name_or_read_rightly(name, tmp_path):
    is_long = settings().max_examples > 1000

    @settings(
        max_examples=settings().max_examples if is_long else 40,
        deadline=None,
        database=None,
        derandomize=not is_long,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(TARGETS[name].seeds()), st.integers(0, 2**64 - 1))
    def holds(data, seed):
        run_one(TARGETS[name], damage(data, random.Random(seed)), tmp_path)

    holds()


@pytest.mark.parametrize("name", ["xmc-queries", "sparse-text", "npz", "recipe", "manifest"])
def test_any_bytes_are_refused_by_name(name, tmp_path):
    @settings(
        max_examples=20, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.binary(max_size=300))
    def holds(data):
        run_one(TARGETS[name], data, tmp_path)

    holds()


def run_fuzz(*options):
    command = [sys.executable, str(SCRIPTS / "fuzz.py"), "--engine", "random", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_script_counts_and_writes_what_it_ran(tmp_path):
    figures, crashes = tmp_path / "fuzz.json", tmp_path / "crashes"
    options = ["--target", "filter", "--seconds", "0.2", "--json", str(figures)]
    done = run_fuzz(*options, "--crashes", str(crashes))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(figures.read_text())["targets"]["filter"]
    assert result["executions"] > result["accepted"] > 0
    assert result["crashes"] == 0
    assert not crashes.exists()
    assert run_fuzz("--target", "nothing").returncode == 2
