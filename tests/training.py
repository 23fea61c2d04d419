"""Trains a few steps with the real engine, in whatever process group the environment describes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch


class CrashError(Exception):
    """What a run that is to crash dies of."""


def train(
    recipe_file: str,
    ds_config: str,
    run: str,
    overrides: list[str],
    resume: str | None = None,
    crash_at: int | None = None,
) -> dict[str, Any]:
    """Runs a whole job; returns its logged losses and final weights (whole on every rank).

    With `crash_at` the job dies before that step, on every rank; nothing is returned.
    """
    from unidec_ds.config import load_recipe
    from unidec_ds.engine import start_engine
    from unidec_ds.job import evaluate_and_report, prepare_job
    from unidec_ds.run import write_run
    from unidec_ds.trainer import Trainer

    job = prepare_job(load_recipe(recipe_file, overrides), Path(ds_config), Path(run), resume)
    engine = start_engine(job.ds_config, job.recipe.train.batch_size)
    if os.environ["RANK"] == "0":
        write_run(job.run, job.recipe, job.ds_config)
    trainer = Trainer(job.recipe, job.ds_config, job.corpus, engine, job.run, job.resume_from)
    if crash_at is not None:
        try_step = trainer.train_step

        def step_or_crash(*arguments: Any) -> Any:
            if trainer.step == crash_at:
                raise CrashError
            return try_step(*arguments)

        trainer.train_step = step_or_crash  # type: ignore[method-assign]
        try:
            trainer.fit()
        except CrashError:
            engine.close()
            return {}
    trainer.fit()
    report = evaluate_and_report(trainer)
    trainer.monitor.close()
    state = engine.state()
    rows = trainer.table.state()
    engine.close()
    return {
        "state": state,
        "rows": rows,
        "report": report,
        "step": trainer.step,
    }


def make_trainer(
    recipe_file: Path, ds_config_file: Path, run: Path, resume_from: Path | None = None
) -> Any:
    """Returns a trainer before its first step, in the process group that is there, if one is.

    One process can make several after one another, each with a ds_config of its own.
    """
    from accelerate.state import AcceleratorState

    from unidec_ds.config import load_recipe
    from unidec_ds.data.prepare import resolve_corpus
    from unidec_ds.ds_config import load_ds_config
    from unidec_ds.engine import launched_world_size, start_engine
    from unidec_ds.trainer import Trainer

    AcceleratorState._reset_state(reset_partial_state=True)  # or it keeps the first ds_config
    recipe = load_recipe(str(recipe_file))
    batch_size = recipe.train.batch_size
    ds_config = load_ds_config(
        ds_config_file, batch_size=batch_size, world_size=launched_world_size()
    )
    corpus = resolve_corpus(
        recipe.corpus, recipe.encoder.name, recipe.encoder.max_length, show_progress=False
    )
    run.mkdir(exist_ok=True)
    engine = start_engine(ds_config, batch_size)
    return Trainer(recipe, ds_config, corpus, engine, run, resume_from)


def read_losses(run: Path) -> dict[int, float]:
    """Returns the logged loss of each step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert len(steps) == len(set(steps)), "a step was logged twice"
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def whole_rows(
    results: list[dict[str, Any]], num_labels: int, column: str = "rows"
) -> torch.Tensor:
    """Puts the ranks' classifier rows, or a moment of theirs, together, [L, D]."""
    world_size = len(results)
    width = results[0]["rows"][column].shape[1]
    rows = torch.full((num_labels, width), math.nan)
    for rank, result in enumerate(results):
        rows[rank::world_size] = result["rows"][column].float()
    return rows


def assert_same_weights(
    one: list[dict[str, Any]], other: list[dict[str, Any]], num_labels: int
) -> None:
    """Asserts that two trainings, each given by its ranks, end alike to rounding.

    The moments are compared as well: Adam's steps alone do not tell the scale of a gradient.
    """
    tensors = [(name, tensor, other[0]["state"][name]) for name, tensor in one[0]["state"].items()]
    for column in sorted(one[0]["rows"].keys() - {"step"}):
        both = (whole_rows(results, num_labels, column) for results in (one, other))
        tensors.append((f"rows' {column}", *both))
    for name, tensor, theirs in tensors:
        if "key.bias" in name:  # its true gradient is zero; Adam normalises the noise
            continue
        tolerance = (
            {"rtol": 1e-2, "atol": 1e-5} if "exp_avg" in name else {"rtol": 1e-3, "atol": 2e-4}
        )
        torch.testing.assert_close(tensor, theirs, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
