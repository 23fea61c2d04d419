"""Starts launch.sh and what it prints, in an environment without other launchers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tiny import write_recipe_file

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
STOP_WITHIN_S = 240


def environment(**settings: str) -> dict[str, str]:
    """An environment without launchers and schedulers, in which this Python is the active one."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not re.match("SLURM|CUDA|RANK$|WORLD_SIZE$|LOCAL_|OMP_|DS_ACC", name)
    }
    path = f"{BIN}:{os.environ['PATH']}"
    return {**kept, "VIRTUAL_ENV": sys.prefix, "PATH": path, **settings}


def launch(*options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs launch.sh."""
    return subprocess.run(
        ["bash", "launch.sh", *options],
        cwd=ROOT, env=environment(**settings), capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def printed(*options: str, **settings: str) -> list[str]:
    """Returns the printed commands without the settings of `env`."""
    done = launch("--dry-run", "--recipe", "lf-wordnet-84k", *options, **settings)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    return [re.sub(r"^env (-u \w+ |\w+=\S* )+", "", line) for line in lines]


def tiny_job(inputs: Path, run: Path, **train: int) -> list[str]:
    """Returns options of a short training over `make_inputs(inputs)`."""
    recipe = write_recipe_file(inputs, f"{run.name}.yaml", train={"epochs": 1, **train})
    options = ["--recipe", str(recipe), "--ds_config", str(inputs / "ds_config.json")]
    return [*options, "--output", str(run)]


def make_installed_environment(folder: Path) -> Path:
    """Makes a virtual environment that launch.sh finds installed, with this Python's packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "outer.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    done = subprocess.run(
        ["bash", "-c", "source scripts/environment.sh && installation_hash"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (folder / ".unidec_ds-installed").write_text(done.stdout)
    return folder


def wait_until_it_trains(process: subprocess.Popen[str], run: Path) -> None:
    """Returns when the run has logged its first steps."""
    deadline = time.monotonic() + STOP_WITHIN_S
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"loss"') < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
