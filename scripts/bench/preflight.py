"""Predicted memory and disk against what a run then takes.

    python scripts/bench/preflight.py [--quick] [--json FILE] [--only SETTING] [--scratch DIR]

Settings, each trained by the real trainer in a process of its own, one rank:

- quickstart: the packaged recipe and encoder; all activations are kept. Three steps, a checkpoint.
- bf16: the same with `ds_configs/cpu_bf16.json`, batches of 192 and all texts in one encoder call.
  The two constants of `preflight.memory` that were measured, on the other settings, were fixed
  before this one was first run.
- large_table: 300,000 made-up labels, fp32 rows at width 768 (2.6 GiB), a tiny encoder, recompute.
  Steps, an evaluation, a checkpoint.
- mining: 40,000 made-up labels, rowwise rows at width 256, batches of 1,024 in chunks of 512 whose
  activations are kept, clustered batches. A mining, steps, an evaluation, a checkpoint.

`predicted` is what `unidec-ds plan` says beforehand, mapped files included, with the base memory
it ships with. `measured` is the most resident memory of the process (VmHWM). Stages come in the
order of a run, and the C library keeps what a stage freed for the next ones, so only the peak of
all compares; the stages' own peaks (the kernel's mark is reset between them) show where it lies.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import results
from stages import apart, memory_bytes

sys.path.insert(0, str(results.ROOT / "scripts"))

from make_synthetic import Sizes, Synthetic, write
from make_tiny_encoder import make_encoder

MAX_LENGTH = 32
SETTINGS = ("quickstart", "large_table", "mining", "bf16")
PACKAGED = ("quickstart", "bf16")
SIZES = {
    "large_table": Sizes(60_000, 2_000, 300_000, 5.0),
    "mining": Sizes(20_000, 2_000, 40_000, 5.0),
}
QUICK_SIZES = {
    "large_table": Sizes(4_000, 500, 30_000, 5.0),
    "mining": Sizes(4_000, 500, 8_000, 5.0),
}
ENCODER_WIDTH = {"large_table": 64, "mining": 128}
STEPS = {"quickstart": 3, "large_table": 8, "mining": 8, "bf16": 3}

Figures = dict[str, Any]


def recipe_file(setting: str, scratch: Path) -> Path:
    """Writes the setting's recipe over the corpus that `make` left in `scratch`."""
    content: dict[str, Any] = {
        "corpus": {"path": str(scratch / "corpus"), "validation_fraction": 0.0},
        "encoder": {"name": str(scratch / "encoder"), "max_length": MAX_LENGTH},
        "evaluation": {"every_epochs": 0, "max_queries": 1_000},
        "checkpoint": {"keep": 1},
        "train": {"epochs": 1, "max_steps": STEPS[setting]},
    }
    if setting == "large_table":
        content["model"] = {"width": 768}
        content["pool"] = {"size": 4_096}
        content["classifier"] = {"format": "fp32"}
        content["mining"] = {"every_epochs": 0}
        content["train"] |= {"batch_size": 512, "encoder_chunk": 256}
    else:
        content["model"] = {"width": 256}
        content["pool"] = {"size": 3_000, "num_hard_negatives": 3}
        content["batches"] = {"kind": "clustered"}
        content["classifier"] = {"format": "rowwise"}
        content["mining"] = {"every_epochs": 1, "start_epoch": 0}
        content["train"] |= {"batch_size": 1_024, "encoder_chunk": 512, "recompute": False}
    path = scratch / "recipe.yaml"
    path.write_text(json.dumps(content))
    return path


def make(setting: str, scratch: Path, sizes: Sizes) -> None:
    """Writes the setting's made-up corpus, prepared, and its encoder."""
    from unidec_ds.data.prepare import prepare

    write(Synthetic(sizes, 20_000, 0), scratch / "raw", filter_share=0.2)
    width = ENCODER_WIDTH[setting]
    make_encoder(scratch / "raw", scratch / "encoder", width=width, num_words=20_000)
    prepare(
        scratch / "raw", scratch / "corpus", encoder=str(scratch / "encoder"), max_length=MAX_LENGTH
    )


def load(setting: str, scratch: Path) -> Any:
    """Returns the setting's recipe."""
    from unidec_ds.config import load_recipe

    if setting not in PACKAGED:
        return load_recipe(str(recipe_file(setting, scratch)))
    other = ["train.batch_size=192", "train.encoder_chunk=0"] if setting == "bf16" else []
    return load_recipe(
        "quickstart",
        [
            *other,
            f"train.max_steps={STEPS[setting]}",
            f"corpus.prepared_dir={scratch}",
            "classifier.init=xavier",  # encoding all labels takes minutes and little memory
            "mining.every_epochs=0",
            "batches.kind=random",
        ],
    )


def ds_config_file(setting: str) -> Path:
    """Returns the setting's ds_config."""
    return results.ROOT / "ds_configs" / ("cpu_bf16.json" if setting == "bf16" else "cpu.json")


def predicted(setting: str, scratch: Path) -> Figures:
    """Returns what is predicted of a setting."""
    from unidec_ds.data.prepare import resolve_corpus
    from unidec_ds.ds_config import load_ds_config
    from unidec_ds.preflight.memory import BASE_BYTES, greediest_stage, peak_bytes
    from unidec_ds.preflight.prediction import predict
    from unidec_ds.preflight.workload import corpus_workload

    recipe = load(setting, scratch)
    ds_config = load_ds_config(
        ds_config_file(setting), batch_size=recipe.train.batch_size, world_size=1
    )
    corpus = resolve_corpus(recipe.corpus, recipe.encoder.name, recipe.encoder.max_length)
    made = predict(
        recipe,
        ds_config,
        lambda recipe, world_size: corpus_workload(corpus, recipe, world_size),
        world_size=1,
        device_type="cpu",
    )
    return {
        "peak_bytes": peak_bytes(made.memory, "host", with_reclaimable=True),
        "greediest_stage": greediest_stage(made.memory, "host"),
        "base_bytes": BASE_BYTES["cpu"],
        "checkpoint_bytes": next(
            part.num_bytes for part in made.disk if part.name.startswith("checkpoints")
        ),
        "parts": {
            f"{part.stage}: {part.name}": part.num_bytes
            for part in sorted(made.memory, key=lambda part: -part.num_bytes)
        },
    }


def measured(setting: str, scratch: Path) -> Figures:
    """Returns what a setting takes, by stage."""
    from unidec_ds.engine import start_engine
    from unidec_ds.job import prepare_job
    from unidec_ds.preflight.disk import folder_bytes
    from unidec_ds.run import write_run
    from unidec_ds.trainer import Trainer

    recipe, run = load(setting, scratch), scratch / "run"
    shutil.rmtree(run, ignore_errors=True)
    peaks: dict[str, int] = {}
    job = prepare_job(recipe, ds_config_file(setting), run)
    engine = start_engine(job.ds_config, job.recipe.train.batch_size)
    write_run(job.run, job.recipe, job.ds_config)
    base_bytes = memory_bytes("VmRSS")
    trainer = Trainer(job.recipe, job.ds_config, job.corpus, engine, job.run)
    note_peak(peaks, "start")
    if recipe.mining.every_epochs:
        trainer.planner = trainer.miner.refresh(trainer.planner, 0, 0)
        note_peak(peaks, "mining")
    take_steps(trainer)
    note_peak(peaks, "step")
    if setting not in PACKAGED:
        trainer.evaluate("test")
        note_peak(peaks, "evaluation")
    trainer._save()
    note_peak(peaks, "checkpoint")
    figures = {
        "peak_bytes": max(peaks.values()),
        "stages": peaks,
        "base_bytes": base_bytes,
        "checkpoint_bytes": folder_bytes(run / "checkpoints"),
    }
    trainer.monitor.close()
    engine.close()
    return figures


def take_steps(trainer: Any) -> None:
    """Takes all steps as `Trainer.fit` does, without an evaluation."""
    from unidec_ds.data.prefetch import Prefetcher

    with Prefetcher(trainer.make_batch, 0, trainer.total_steps) as batches:
        for _ in range(trainer.total_steps):
            trainer._step(batches)


def note_peak(peaks: dict[str, int], stage: str) -> None:
    """Notes the most resident memory since the last call, and lets the kernel begin anew."""
    peaks[stage] = memory_bytes("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")


def page(figures: dict[str, Any]) -> str:
    """Returns the tables."""

    def mib(num_bytes: float) -> str:
        return f"{num_bytes / 2**20:,.0f}"

    def off(predicted_bytes: int, measured_bytes: int) -> str:
        return f"{100 * (predicted_bytes / measured_bytes - 1):+.1f} %"

    rows = []
    for name, both in figures.items():
        guess, found = both["predicted"], both["measured"]
        rows.append(
            [
                name,
                mib(guess["peak_bytes"]),
                mib(found["peak_bytes"]),
                off(guess["peak_bytes"], found["peak_bytes"]),
                mib(guess["base_bytes"]),
                mib(found["base_bytes"]),
                f"{guess['checkpoint_bytes']:,}",
                f"{found['checkpoint_bytes']:,}",
            ]
        )
    columns = ("setting", "predicted peak, MiB", "measured", "off", "base predicted, MiB",
               "measured", "checkpoint predicted, bytes", "measured")  # fmt: skip
    text = [results.table(columns, rows), ""]
    for name, both in figures.items():
        stages = ", ".join(f"{k} {mib(v)}" for k, v in both["measured"]["stages"].items())
        text += [
            f"## {name}",
            "",
            f"Measured peaks by stage, MiB: {stages}. Predicted greediest stage: "
            f"{both['predicted']['greediest_stage']}.",
            "",
            results.table(
                ("predicted part", "MiB"),
                [
                    [part, mib(size)]
                    for part, size in both["predicted"]["parts"].items()
                    if size >= 1 << 20
                ],
            ),
            "",
        ]
    return "\n".join(text)


def main() -> None:
    """Predicts and trains the settings, and writes what was asked for."""
    parser = results.parser(__doc__, quick="setting mining alone, with 8,000 labels")
    parser.add_argument("--only", action="append", choices=SETTINGS, help="such as mining")
    parser.add_argument("--scratch", type=Path, help="keep the files here, and use what is there")
    args: argparse.Namespace = parser.parse_args()
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="preflight_"))
    figures: dict[str, Any] = {}
    try:
        for setting in args.only or (("mining",) if args.quick else SETTINGS):
            folder = scratch / ("quick" if args.quick else "full") / setting
            folder.mkdir(parents=True, exist_ok=True)
            sizes = (QUICK_SIZES if args.quick else SIZES).get(setting)
            if sizes is not None and not (folder / "corpus").is_dir():
                apart(make, setting, folder, sizes)
            done = folder / "measured.json"
            if not done.is_file():
                done.write_text(json.dumps(apart(measured, setting, folder)))
            figures[setting] = {
                "predicted": apart(predicted, setting, folder),
                "measured": json.loads(done.read_text()),
            }
    finally:
        if args.scratch is None:
            shutil.rmtree(scratch)
    title = "Predicted memory and disk against what a run takes"
    results.publish("preflight", args, figures, title=title, body=page(figures))


if __name__ == "__main__":
    main()
