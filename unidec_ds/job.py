"""From the command line to a finished run: every check, then training, then the report.

`prepare_job` does all that one process can do alone, and compares what the ranks have found: a
user's mistake ends there, on every rank and before any process group exists. `run_job` joins the
other ranks.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from unidec_ds import checkpoint, comm
from unidec_ds.agreement import check_agreement
from unidec_ds.assembly import trained_views
from unidec_ds.config import Recipe
from unidec_ds.data.corpus import Corpus
from unidec_ds.data.label_digests import write_label_digests
from unidec_ds.data.prepare import resolve_corpus
from unidec_ds.ds_config import DsConfig, load_ds_config
from unidec_ds.encoders import check_encoder
from unidec_ds.engine import check_launch, launched_rank, launched_world_size, start_engine
from unidec_ds.errors import StoppedError
from unidec_ds.evaluation import Evaluation, format_breakdown, format_table
from unidec_ds.lifeline import ALONE, Lifeline
from unidec_ds.preflight.fits import check_run_fits
from unidec_ds.projector import embed_some_labels
from unidec_ds.run import (
    REPORT,
    SAMPLES,
    UNTRAINED,
    WARM_START,
    choose_checkpoint,
    finished_report,
    read_json,
    verified_checkpoint,
    write_evaluation,
    write_json,
    write_run,
)
from unidec_ds.samples import choose_samples, describe_samples
from unidec_ds.trainer import Trainer
from unidec_ds.unified import TUNED_VIEW
from unidec_ds.warm_start import WarmStart, choose_warm_start, write_warm_start


@dataclass(frozen=True)
class Job:
    """A run that has passed every check that needs no other rank."""

    recipe: Recipe
    ds_config: DsConfig
    corpus: Corpus
    run: Path
    resume_from: Path | None
    warm_start: WarmStart | None = None
    is_auto: bool = False
    """Whether a damaged checkpoint may be passed over for the one before it."""
    report: str | None = None
    """That of a run which is finished, the same on every rank: nothing is left to train."""


def prepare_job(
    recipe: Recipe,
    ds_config_file: Path,
    run: Path,
    resume: str | None = None,
    init_from: Path | None = None,
    lifeline: Lifeline = ALONE,
) -> Job:
    """Checks all input and prepares the corpus, before any process group exists.

    Rank 0 prepares the corpus before the others look for it. File locks do not reach over every
    shared file system; where the others see its folder they find it ready, and where they do not,
    one process of each node prepares that node's copy.

    Raises:
        UserError: with what was found, what was needed and what to do.
        PeerFailedError: another rank raised one.
    """
    batch_size = recipe.train.batch_size
    ds_config = load_ds_config(
        ds_config_file, batch_size=batch_size, world_size=launched_world_size()
    )
    check_launch(ds_config, batch_size)
    check_encoder(recipe.encoder.name)
    resume_from = choose_checkpoint(run, resume, recipe)
    with lifeline.rank_0_first("corpus"):
        corpus = resolve_corpus(
            recipe.corpus,
            recipe.encoder.name,
            recipe.encoder.max_length,
            show_progress=launched_rank() == 0,
        )
    warm_start = choose_warm_start(run, init_from, resume, resume_from, recipe, corpus)
    begin_from = warm_start.checkpoint if warm_start is not None else None
    check_agreement(lifeline, run, recipe, ds_config, corpus, resume_from, begin_from)
    # Only rank 0 looks: a rank that finds an older report than the others would leave them, or
    # wait for them.
    report = finished_report(run, resume_from) if lifeline.rank == 0 else None
    report = lifeline.exchange("finished", report)[0]
    check_run_fits(recipe, ds_config, corpus, run)
    return Job(recipe, ds_config, corpus, run, resume_from, warm_start, resume == "auto", report)


def run_job(job: Job, lifeline: Lifeline = ALONE) -> None:
    """Joins the other ranks, trains, evaluates, and prints the result on rank 0.

    A run that is already finished is only reported.

    Raises:
        StoppedError: on every rank; a signal came, a number is not finite, or the disk is full.
    """
    if job.report is not None:
        if launched_rank() == 0:
            print(f"{job.run} is finished\n\n{job.report}")
        return
    if job.recipe.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    engine = start_engine(job.ds_config, job.recipe.train.batch_size, lifeline.timeout)
    resume_from = job.resume_from
    if resume_from is not None:
        resume_from = verified_checkpoint(job.run, resume_from, job.is_auto)
    if comm.is_main():
        if job.warm_start is not None:
            print(job.warm_start.describe())
            write_warm_start(job.run, job.warm_start)
        write_run(job.run, job.recipe, job.ds_config)
        write_label_digests(job.run, job.corpus)
    trainer = Trainer(
        job.recipe,
        job.ds_config,
        job.corpus,
        engine,
        job.run,
        resume_from=resume_from,
        warm_start=job.warm_start,
    )
    trainer.stop_requests.has_failed = lambda: lifeline.verdict is not None
    try:
        trainer.fit()
        report = evaluate_and_report(trainer)
    except StoppedError:  # every rank's
        with suppress(OSError):  # it may say already that the disk is full
            trainer.monitor.close()
        engine.close()
        raise
    finally:
        trainer.monitor.close()
    if comm.is_main():
        print(f"\n{report}")
    engine.close()


def evaluate_and_report(trainer: Trainer) -> str:
    """Evaluates the final model, writes evaluation.json and report.txt, and returns the report.

    Collectives: those of an evaluation; every rank must call. Ranks other than 0 return "".
    """
    split, run, recipe = trainer.final_split, trainer.run, trainer.recipe
    tuned = trainer.tune_unified()
    result = trainer.evaluate(split, {TUNED_VIEW: tuned.weight_de} if tuned else None)
    trainer.monitor.log_evaluation(
        trainer.step, recipe.train.epochs, split, result.metrics, result.breakdown
    )
    if not comm.is_main():
        return ""
    metrics = {**_metrics_at_start(run, split), **result.metrics}
    details = {
        "step": trainer.step,
        "num_queries": len(result.query_ids),
        "queries": result.describe_queries(),
        "num_labels": trainer.corpus.num_labels,
        "num_train_queries": trainer.corpus.positives["train"].num_rows,
        "propensity": list(recipe.evaluation.propensity),
        "checkpoint": str(checkpoint.latest(run)),
        **({TUNED_VIEW: tuned.details()} if tuned else {}),
    }
    view = trained_views(recipe)[-1]
    samples = describe_samples(trainer.corpus, split, result.query_ids, result.predictions[view])
    trainer.monitor.log_text(trainer.step, "predictions", samples)
    settings = f"```\n{(run / 'config.yaml').read_text(encoding='utf-8')}```"
    trainer.monitor.log_text(trainer.step, "configuration", settings)
    _write_for_people(trainer, split, view, result)
    report = "\n".join(
        [
            f"{split} set, {result.describe_queries()}, {trainer.corpus.num_labels:,} labels",
            format_table(metrics, recipe.evaluation.propensity),
            *([tuned.describe(split)] if tuned else []),
            "",
            f"labels by train frequency ({view})",
            format_breakdown(result.breakdown[view]),
            "",
            f"examples ({view}; + is a true label)",
            samples.strip("`\n"),
            "",
            "next",
            *_activation(),
            f"  unidec-ds report {run}",
            f"  tensorboard --logdir {run}",
            f"  unidec-ds evaluate {run}",
            f"  unidec-ds predict {run} --input - --k 5",
            "  bash launch.sh --recipe lf-wordnet-84k        another recipe",
        ]
    )
    (run / REPORT).write_text(report + "\n", encoding="utf-8")
    write_evaluation(run, split, metrics, result, details)
    return report


def _metrics_at_start(run: Path, split: str) -> dict[str, dict[str, float]]:
    """Returns the metrics before the first step: of the untrained encoder, or the warm start's."""
    untrained = read_json(run / UNTRAINED).get(split)
    if untrained:
        return {"untrained": untrained}
    views = read_json(run / WARM_START).get("evaluation", {}).get(split)
    return {"warm_start": list(views.values())[-1]} if views else {}


def _write_for_people(trainer: Trainer, split: str, view: str, result: Evaluation) -> None:
    """Writes samples.json and the projector's labels."""
    recipe, seed = trainer.recipe, trainer.recipe.train.seed
    samples = choose_samples(
        trainer.corpus, split, result.query_ids, result.predictions[view], seed=seed
    )
    write_json(trainer.run / SAMPLES, {"split": split, "view": view, **samples})
    if recipe.evaluation.projector_labels and recipe.objective.de != "none":
        labels = embed_some_labels(
            trainer.model, trainer.corpus, recipe.evaluation.projector_labels, seed
        )
        trainer.monitor.log_label_vectors(trainer.step, labels.vectors_nD, labels.rows)


def _activation() -> list[str]:
    """Returns the line that puts this environment's commands on the PATH, if it has one."""
    if sys.prefix == sys.base_prefix:
        return []
    return [f"  source {os.path.relpath(sys.prefix)}/bin/activate"]
