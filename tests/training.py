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
    missing: list[str] = []

    def note_parameters_without_gradient() -> None:
        missing.extend(
            name
            for name, parameter in trainer.model.named_parameters()
            if parameter.requires_grad and not getattr(parameter, "_saw_gradient", False)
        )

    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_mark)
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
    note_parameters_without_gradient()
    report = evaluate_and_report(trainer)
    trainer.monitor.close()
    state = engine.state()
    rows = trainer.table.state()
    engine.close()
    return {
        "state": state,
        "rows": rows,
        "missing": missing,
        "report": report,
        "step": trainer.step,
    }


def _mark(parameter: torch.Tensor) -> None:
    parameter._saw_gradient = True  # type: ignore[attr-defined]


def read_losses(run: Path) -> dict[int, float]:
    """Returns the logged loss of each step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert len(steps) == len(set(steps)), "a step was logged twice"
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def whole_rows(results: list[dict[str, Any]], num_labels: int) -> torch.Tensor:
    """Puts the ranks' classifier rows together, [L, D]."""
    world_size = len(results)
    width = results[0]["rows"]["rows"].shape[1]
    rows = torch.full((num_labels, width), math.nan)
    for rank, result in enumerate(results):
        rows[rank::world_size] = result["rows"]["rows"].float()
    return rows
