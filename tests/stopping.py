"""A whole job that something happens to in the middle, in whatever process group there is."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch

METHODS = {"step": "train_step", "evaluation": "evaluate"}


def train(
    recipe_file: str,
    ds_config: str,
    run: str,
    resume: str | None = None,
    what: str | None = None,
    during: str = "step",
    at: int = 0,
    on_rank: int = 0,
) -> tuple[int, str]:
    """Runs a job as train.py does; returns its exit code and what it wrote to standard error.

    There is no lifeline, which would end this process: every rank says why it stopped.
    `what` happens on one rank as its step or evaluation with `at` steps taken begins.
    """
    from unidec_ds.config import load_recipe
    from unidec_ds.exits import exit_with_message
    from unidec_ds.job import prepare_job, run_job
    from unidec_ds.trainer import Trainer

    plain = getattr(Trainer, METHODS[during])

    def disturbed(trainer: Trainer, *arguments: Any) -> Any:
        if what is not None and trainer.step == at and int(os.environ["RANK"]) == on_rank:
            _happen(what, trainer, *arguments)
        return plain(trainer, *arguments)

    setattr(Trainer, METHODS[during], disturbed)

    def main() -> None:
        recipe = load_recipe(recipe_file)
        run_job(prepare_job(recipe, Path(ds_config), Path(run), resume))

    errors, (_, most) = io.StringIO(), resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = exit_with_message(main)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    return code, errors.getvalue()


def _happen(what: str, trainer: Any, *arguments: Any) -> None:
    if what == "full disk":
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, most))
    elif what == "bad row":
        label = arguments[0].own_label_ids[:1]
        trainer.table.write(np.array(label), torch.full((1, trainer.table.width), torch.nan))
    elif what == "bad encoder":
        with torch.no_grad():
            next(trainer.model.encoder.parameters()).fill_(torch.nan)
    else:
        os.kill(os.getpid(), getattr(signal, what))
