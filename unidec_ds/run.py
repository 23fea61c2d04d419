"""A run directory: what lies where, and what must agree before a run may be continued.

RUN/
    config.yaml        the resolved recipe
    ds_config.json     the DeepSpeed configuration, as given
    environment.json   versions, command, commit
    metrics.jsonl      one object per logged step, evaluation or refresh
    warm_start.json    what it was begun from, if from another run (see `warm_start`)
    label_digests.npy  which labels the rows stand for, see `data.label_digests`
    untrained.json     the encoder's metrics before training
    evaluation.json    final metrics by split and view, in percent
    samples.json       some final predictions, right and wrong
    report.txt         what training printed at its end
    report.html        the same with curves, once `unidec-ds report` was asked for it
    events.out.*       TensorBoard
    checkpoints/       see `checkpoint`
    mining/            shortlists and clusters, see `mining`
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from unidec_ds import checkpoint, comm
from unidec_ds.config import Recipe, load_recipe, write_recipe
from unidec_ds.ds_config import DsConfig
from unidec_ds.durable import write_text
from unidec_ds.errors import CheckpointError, UserError
from unidec_ds.evaluation import Evaluation, format_table
from unidec_ds.manifest import has_all_files, read_manifest
from unidec_ds.unified import TUNED_VIEW

UNTRAINED = "untrained.json"
EVALUATION = "evaluation.json"
SAMPLES = "samples.json"
BREAKDOWN = "breakdown"
REPORT = "report.txt"
WARM_START = "warm_start.json"
_PACKAGES = ("torch", "deepspeed", "accelerate", "transformers", "datasets", "numpy")
# Settings that may change when a run is continued: they do not touch the loss curve.
_FREE_SECTIONS = ("checkpoint", "evaluation")
_FREE_KEYS = ("corpus.path", "corpus.prepared_dir", "corpus.quarantine", "train.encoder_chunk",
              "train.recompute", "train.loss_block_bytes", "train.log_every_steps",
              "classifier.prefetch_rows")  # fmt: skip


def default_run(recipe: str) -> Path:
    """Returns the run directory of a recipe, given by name or by file, unless one is asked for."""
    return Path("runs") / Path(recipe).name.removesuffix(".yaml")


def choose_checkpoint(run: Path, resume: str | None, recipe: Recipe) -> Path | None:
    """Returns the checkpoint to start from, None for a new run; changes nothing.

    Args:
        run: the run directory.
        resume: None, "auto" (the run's newest checkpoint with all its files, or a new run), or a
            checkpoint's folder. Checksums are for `verified_checkpoint` to compare.
        recipe: what is to be trained.

    Raises:
        UserError: `run` holds a run and `resume` was not given; the checkpoint is not there or
            lacks a file, with "auto" each of them does; or the recipe differs from the one it was
            made with.
    """
    if resume is None:
        if (run / "config.yaml").exists():
            raise UserError(
                f"--output: {run} already holds a run; continue it with --resume auto, or choose "
                "another --output"
            )
        return None
    candidates = checkpoint.newest_first(run) if resume == "auto" else [Path(resume)]
    if not candidates:
        return None
    if not candidates[0].is_dir():
        raise UserError(
            f"--resume: there is no checkpoint {candidates[0]}; needs a folder or `auto`"
        )
    chosen = next((c for c in candidates if has_all_files(c)), candidates[0])
    read_manifest(chosen)
    before = chosen.parent.parent / "config.yaml"
    if before.is_file():
        changed = _changed(load_recipe(str(before)), recipe)
        if changed:
            raise UserError(
                f"--resume: {chosen} was trained with other settings; its loss curve cannot be "
                "continued.\n  " + "\n  ".join(changed) + "\n  Use the same settings, or start "
                "anew with another --output."
            )
    return chosen


def verified_checkpoint(run: Path, chosen: Path, is_auto: bool) -> Path:
    """Returns the checkpoint to resume from, every byte of it as it was written.

    Args:
        run: the run directory.
        chosen: what `choose_checkpoint` returned.
        is_auto: whether a damaged one may be passed over, with a warning, for the one before it.

    Raises:
        CheckpointError: on every rank; `chosen` is damaged, with `is_auto` each of the run is.

    Collectives: one gather a checkpoint read; every rank must call.
    """
    damage: list[str] = []
    for candidate in checkpoint.newest_first(run) if is_auto else [chosen]:
        fault = checkpoint.find_damage(candidate)
        if fault is None:
            if damage and comm.is_main():
                print(
                    "WARNING: " + "\n  ".join(damage) + f"\n  Goes on from {candidate} instead; "
                    "the steps after it run again.",
                    file=sys.stderr,
                    flush=True,
                )
            return candidate
        damage.append(fault)
    raise CheckpointError("--resume: no checkpoint is whole.\n  " + "\n  ".join(damage))


def finished_report(run: Path, resume_from: Path | None) -> str | None:
    """Returns the report of a run whose last step and evaluation are done, else None."""
    if resume_from is None or not (run / REPORT).is_file():
        return None
    manifest = read_manifest(resume_from)
    evaluated = read_json(run / EVALUATION).get("details", {}).get("step")
    if not manifest["step"] == manifest.get("total_steps") == evaluated:
        return None
    return (run / REPORT).read_text(encoding="utf-8")


def write_run(run: Path, recipe: Recipe, ds_config: DsConfig) -> None:
    """Writes the files that describe a run, before its first step."""
    run.mkdir(parents=True, exist_ok=True)
    beside = run / "config.yaml.new"  # a kill must not leave half of what a resume compares
    write_recipe(recipe, beside)
    beside.replace(run / "config.yaml")
    write_json(run / "ds_config.json", ds_config.content)
    write_json(run / "environment.json", environment())


def environment() -> dict[str, Any]:
    """Returns what a result depends on beside its settings: versions, machine, command, commit."""
    import torch

    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "command": " ".join(sys.argv),
        "commit": commit or None,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": {name: metadata.version(name) for name in _PACKAGES},
    }


def write_untrained(run: Path, split: str, untrained: Evaluation) -> None:
    """Writes what the encoder scores before training."""
    bins = [asdict(part) for part in untrained.breakdown["encoder"]]
    write_json(run / UNTRAINED, {split: untrained.metrics["encoder"], BREAKDOWN: {split: bins}})


def write_evaluation(
    run: Path,
    split: str,
    metrics: dict[str, dict[str, float]],
    evaluation: Evaluation,
    details: dict[str, Any],
) -> None:
    """Writes the final figures.

    Args:
        run: the run directory.
        split: what was evaluated.
        metrics: by view, the untrained encoder's among them.
        evaluation: whose parts by label frequency go beside the metrics.
        details: what else the figures depend on.
    """
    parts = {view: [asdict(part) for part in bins] for view, bins in evaluation.breakdown.items()}
    untrained = read_json(run / UNTRAINED).get(BREAKDOWN, {}).get(split)
    if untrained:
        parts = {"untrained": untrained, **parts}
    content = {split: metrics, BREAKDOWN: {split: parts}, "details": details}
    write_json(run / EVALUATION, content)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON; readers see the old file or the new one."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object, empty if there is no such file.

    Raises:
        UserError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, or copy the run again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; remove it, or copy the run again")
    return content


def _changed(before: Recipe, after: Recipe) -> list[str]:
    lines = []
    old, new = before.as_yaml_object(), after.as_yaml_object()
    for section, values in new.items():
        for key, value in values.items():
            name = f"{section}.{key}"
            if section in _FREE_SECTIONS or name in _FREE_KEYS:
                continue
            if old[section].get(key) != value:
                lines.append(f"{name}: was {old[section].get(key)}, now {value}")
    return lines


def read_unified_weight(run: Path, newest: Path) -> float | None:
    """Returns the dual encoder's weight that the final report chose for the unified view.

    Args:
        run: the run directory.
        newest: the checkpoint in use.

    Returns:
        None if there is no final report of that checkpoint, or it chose none.
    """
    details = read_json(run / "evaluation.json").get("details", {})
    if TUNED_VIEW not in details or Path(details.get("checkpoint", "")).name != newest.name:
        return None
    return float(details[TUNED_VIEW]["weight_de"])


def describe_run(run: Path) -> str:
    """Returns a page about a run for people: settings, progress, final metrics."""
    recipe = load_recipe(str(run / "config.yaml"))
    newest = checkpoint.latest(run)
    lines = [f"run {run}", f"corpus {recipe.corpus.path}, encoder {recipe.encoder.name}"]
    begun = read_json(run / WARM_START)
    if begun:
        lines.append(
            f"begun from {begun['source']}, {begun['checkpoint']}: labels {begun['matched']:,} "
            f"matched, {begun['new']:,} new, {begun['dropped']:,} dropped"
        )
    if newest is not None:
        manifest = read_manifest(newest)
        total = manifest.get("total_steps", "?")
        lines.append(f"step {manifest['step']} of {total}, {newest}")
    content = read_json(run / EVALUATION)
    for split in ("test", "validation"):
        if split in content:
            lines += [f"{split} set", format_table(content[split], recipe.evaluation.propensity)]
    return "\n".join(lines)
