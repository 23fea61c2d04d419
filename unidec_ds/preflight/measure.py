"""A few real steps, timed in a process of their own: what this machine makes of a prediction.

`steps` is that process; this module starts it and reads what it found. It knows no trainer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from unidec_ds.config import Recipe, write_recipe
from unidec_ds.errors import UserError

_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
             "ACCELERATE_DEEPSPEED_CONFIG_FILE")  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """What a few steps took on this machine, with one rank."""

    step_s: float
    """Median over the steps, the first left out."""
    steps: int
    tokens_per_s: float
    """Of the steps, padding not counted."""
    encoded_texts_per_s: float
    """Queries encoded without gradient, as mining and evaluation do."""
    base_bytes: int
    """Resident before there is a model: Python, torch, DeepSpeed, ..."""
    peak_bytes: int
    """Most resident memory of these steps: no evaluation, mining or checkpoint."""


def measure(recipe: Recipe, ds_config: Path, steps: int) -> Measured:
    """Returns what `steps` steps took in a process of their own.

    Raises:
        UserError: the run cannot start; the message is the run's own.
        RuntimeError: it failed in another way.
    """
    with tempfile.TemporaryDirectory(prefix="unidec_ds_plan_") as scratch:
        folder = Path(scratch)
        write_recipe(recipe, folder / "recipe.yaml")
        request = {"ds_config": str(ds_config.absolute()), "steps": steps}
        (folder / "request.json").write_text(json.dumps(request))
        environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
        done = subprocess.run(
            [sys.executable, "-m", "unidec_ds.preflight.steps", scratch],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == UserError.exit_code:
            raise UserError(done.stderr.strip().split("error: ", 1)[-1])
        if done.returncode:
            raise RuntimeError(f"measuring steps failed:\n{done.stderr[-2000:]}")
        return Measured(**json.loads((folder / "result.json").read_text()))
