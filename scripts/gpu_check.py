"""Trains the first steps on the GPU and holds them against the same steps on the CPU.

    bash scripts/gpu_check.sh [--work DIR] [--json FILE]        about ten minutes on one GPU
    bash scripts/gpu_check.sh --cpu                             the same flow, small, without a GPU

A made-up corpus of 1.3 million labels (`make_synthetic.py`), the packaged encoder, classifier rows
of width 768 in host memory, no dropout. Three runs of the same steps, each in a process of its own:

- reference: the CPU in fp32 (`ds_configs/cpu.json`).
- fp32: `ds_configs/single_gpu_offload_bf16.json` with bf16 off. With --cpu: everything on the
  "device", which is the CPU (ZeRO 0, table updated by torch), other code than the reference's.
- bf16: `ds_configs/single_gpu_offload_bf16.json`. With --cpu: `ds_configs/cpu_bf16.json`.

Checked, against the reference: the losses of all steps; what the steps did to the classifier rows
they touched, as |change - reference change| / |reference change|; that the rows started equal to
the bit, and that untouched rows still do. Tolerances: TOLERANCES. Printed too: where a step's time
goes (the device waited for after each part), memory, and what is copied between host and device.

Exit codes: 0 all checks hold, 1 some do not, 2 there is no GPU and --cpu was not given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from make_synthetic import SHAPES, Synthetic, write

from unidec_ds.batch import Batch
from unidec_ds.config import load_recipe
from unidec_ds.data.prefetch import Prefetcher
from unidec_ds.encoders import PACKAGED_ENCODER
from unidec_ds.engine import start_engine
from unidec_ds.errors import UserError
from unidec_ds.exits import exit_with_message
from unidec_ds.job import prepare_job
from unidec_ds.monitor import StepTimer, device_memory_gib, host_memory_gib
from unidec_ds.run import environment, write_run
from unidec_ds.trainer import Trainer

ROOT = Path(__file__).parents[1]
REFERENCE = "reference"
TOLERANCES = {"fp32": {"loss": 1e-3, "rows": 0.05}, "bf16": {"loss": 4e-2, "rows": 0.5}}
"""Of the losses, relative; of the rows' change, relative to its norm. Adam's first steps are nearly
signs of the gradient, which rounding turns where a gradient is near zero; and bf16 weights follow
their fp32 masters only once these have moved by half a unit in the last place."""
FULL = {"labels": SHAPES["1.3m"].labels, "train_queries": 100_000, "width": 768,
        "batch_size": 512, "pool_size": 2048, "steps": 6}  # fmt: skip
SMALL = {"labels": 20_000, "train_queries": 4_000, "width": 384, "batch_size": 32,
         "pool_size": 96, "steps": 5}  # fmt: skip
COPY_BYTES = 256 << 20
UNTOUCHED = 1000  # rows looked at


def make_inputs(work: Path, sizes: dict[str, int], on_cpu: bool) -> dict[str, Path]:
    """Writes corpus, recipe and ds_configs; returns the ds_config of each run."""
    raw = work / "raw"
    if not (raw / "tst.json.gz").is_file():  # written last
        shape = SHAPES["1.3m"]._replace(
            labels=sizes["labels"], train_queries=sizes["train_queries"], test_queries=100,
            positives=4.0,
        )  # fmt: skip
        write(Synthetic(shape, 20_000, 0), raw)
    recipe = {
        "corpus": {"path": str(raw), "prepared_dir": str(work / "prepared")},
        "encoder": {"name": PACKAGED_ENCODER},
        "model": {"width": sizes["width"], "head_dropout": 0.0, "row_dropout": 0.0},
        "pool": {"size": sizes["pool_size"]},
        "classifier": {"format": "fp32"},  # rows rounded at random would hide small differences
        "mining": {"every_epochs": 0},
        "train": {"batch_size": sizes["batch_size"], "epochs": 1, "encoder_chunk": 128},
    }
    (work / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    configs = ROOT / "ds_configs"
    if on_cpu:
        fp32: dict[str, Any] = {"zero_optimization": {"stage": 0}, "gradient_clipping": 1.0}
        bf16 = configs / "cpu_bf16.json"
    else:
        bf16 = configs / "single_gpu_offload_bf16.json"
        fp32 = json.loads(bf16.read_text(encoding="utf-8")) | {"bf16": {"enabled": False}}
    fp32_file = work / "fp32.json"
    fp32_file.write_text(json.dumps(fp32), encoding="utf-8")
    return {REFERENCE: configs / "cpu.json", "fp32": fp32_file, "bf16": bf16}


def run_apart(name: str, ds_config: Path, work: Path, steps: int, on_cpu: bool) -> dict[str, Any]:
    """Takes the steps in a process of its own; returns its figures, and its arrays by name."""
    command = [
        sys.executable, __file__, "--child", name, "--ds_config", ds_config, "--work", work,
        "--steps", steps,
    ]  # fmt: skip
    env = dict(os.environ)
    if on_cpu or name == REFERENCE:
        env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    else:
        env.pop("DS_ACCELERATOR", None)
    print(f"{name}: {steps} steps with {ds_config.name}", file=sys.stderr, flush=True)
    subprocess.run(list(map(str, command)), check=True, env=env)
    figures = json.loads((work / f"{name}.json").read_text(encoding="utf-8"))
    with np.load(work / f"{name}.npz") as arrays:
        return {**figures, **arrays}


def take_steps(name: str, ds_config: Path, work: Path, steps: int) -> None:
    """Trains `steps` steps in this process and writes NAME.json and NAME.npz."""
    run = Path(tempfile.mkdtemp(dir=work, prefix=f"run_{name}_")) / "run"
    recipe = load_recipe(str(work / "recipe.yaml"))
    job = prepare_job(recipe, ds_config, run)
    engine = start_engine(job.ds_config, recipe.train.batch_size)
    write_run(job.run, recipe, job.ds_config)
    trainer = Trainer(recipe, job.ds_config, job.corpus, engine, job.run)
    table, device = trainer.table, trainer.device
    plans = [trainer.planner.plan(step) for step in range(steps)]
    touched = np.unique(np.concatenate([plan.label_ids for plan in plans]))
    untouched = np.setdiff1d(np.arange(job.corpus.num_labels), touched)[:UNTOUCHED]
    before_RD, untouched_RD = table.read(touched), table.read(untouched)
    losses, seconds, copied = [], [], []
    with Prefetcher(trainer.make_batch, 0, steps) as batches:
        for _ in range(steps):
            timer = StepTimer(device, synchronize=True)
            with timer.part("wait_for_batch"):
                batch = next(batches).to(device)
            losses.append(trainer.train_step(batch, timer, batches.peek()).losses["loss"])
            trainer.step += 1
            seconds.append(timer.seconds)
            copied.append(bytes_copied(trainer, batch))
    if not torch.equal(table.read(untouched), untouched_RD):
        raise RuntimeError(f"{name}: rows that no step touched have changed")
    to_host, to_device = copy_gib_per_s(device)
    figures = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "host_memory_gib": host_memory_gib(),
        "device_memory_gib": device_memory_gib(device),
        "table_gib": table.allocated_bytes / 2**30,
        "step_ms": {part: 1e3 * median(step[part] for step in seconds[1:]) for part in seconds[0]},
        "mib_per_step": {key: median(c[key] for c in copied) / 2**20 for key in copied[0]},
        "to_host_gib_per_s": to_host,
        "to_device_gib_per_s": to_device,
    }
    (work / f"{name}.json").write_text(json.dumps(figures), encoding="utf-8")
    np.savez(work / f"{name}.npz", losses=losses, before=before_RD, after=table.read(touched))
    trainer.monitor.close()
    engine.close()


def bytes_copied(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """Returns the bytes that a step copies to and from the device, by what they are."""
    rows = 4.0 * len(batch.own_label_ids) * trainer.table.width
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    weights = float(sum(p.numel() * p.element_size() for p in parameters))
    offloads = trainer.engine.ds_config.offload.get("device") in ("cpu", "nvme")
    return {
        "rows to the device": rows,
        "row gradients to the host": rows,
        "encoder weights to the device": weights * offloads,
        "encoder gradients to the host": weights * offloads,
        "tokens to the device": 16.0 * batch.num_padded_tokens,
    }


def copy_gib_per_s(device: torch.device) -> tuple[float, float]:
    """Returns the bandwidth of large copies to the host and to the device, from pinned memory."""
    on_gpu = device.type == "cuda"
    host = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
    there = torch.zeros_like(host, device=device)
    found = []
    for source, target in ((there, host), (host, there)):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            target.copy_(source)
            if on_gpu:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        found.append(COPY_BYTES / 2**30 / min(times))
    return found[0], found[1]


def compare(run: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Returns how far a run is from the reference."""
    change, wanted = run["after"] - run["before"], reference["after"] - reference["before"]
    return {
        "loss": float(np.max(np.abs(run["losses"] / reference["losses"] - 1))),
        "rows": float(np.linalg.norm(change - wanted) / np.linalg.norm(wanted)),
        "start": float(np.abs(run["before"] - reference["before"]).max()),
    }


def describe(name: str, run: dict[str, Any]) -> str:
    """Returns a run's times, memory and copies in words."""
    parts = ", ".join(f"{part} {ms:.1f}" for part, ms in run["step_ms"].items())
    copies = ", ".join(f"{what} {mib:.1f}" for what, mib in run["mib_per_step"].items())
    return "\n".join(
        [
            f"{name} on {run['device']}",
            f"  losses          {', '.join(f'{loss:.5f}' for loss in run['losses'])}",
            f"  step, ms        {sum(run['step_ms'].values()):.1f}: {parts}",
            f"  memory, GiB     host {run['host_memory_gib']:.2f} (classifier table "
            f"{run['table_gib']:.2f}), device {run['device_memory_gib']:.2f}",
            f"  copied, MiB     {copies}",
            f"  bandwidth       {run['to_device_gib_per_s']:.1f} GiB/s to the device, "
            f"{run['to_host_gib_per_s']:.1f} to the host",
        ]
    )


def check(args: argparse.Namespace, work: Path) -> bool:
    """Makes the runs, prints what they took, and returns whether all checks hold."""
    sizes = {
        key: given if (given := getattr(args, key)) is not None else value
        for key, value in (SMALL if args.cpu else FULL).items()
    }
    configs = make_inputs(work, sizes, args.cpu)
    runs = {
        name: run_apart(name, ds_config, work, sizes["steps"], args.cpu)
        for name, ds_config in configs.items()
    }
    print(", ".join(f"{key} {value:,}" for key, value in sizes.items()))
    for name, run in runs.items():
        print(describe(name, run))
    found: dict[str, dict[str, float]] = {}
    failed = []
    for name, allowed in TOLERANCES.items():
        found[name] = compare(runs[name], runs[REFERENCE])
        for what, most in {**allowed, "start": 0.0}.items():
            holds = found[name][what] <= most
            print(f"{'ok  ' if holds else 'FAIL'} {name} {what}: {found[name][what]:.2g}, at most "
                  f"{most:g}")  # fmt: skip
            failed += [] if holds else [f"{name} {what}"]
    if args.json:
        plain = {name: {k: v for k, v in run.items() if not isinstance(v, np.ndarray)}
                 for name, run in runs.items()}  # fmt: skip
        content = {"sizes": sizes, "runs": plain, "found": found, "environment": environment()}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return not failed


def parse_args() -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="a small run without a GPU")
    parser.add_argument("--work", type=Path, help="keep corpus and runs here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    for key, value in FULL.items():
        option = "--" + key.replace("_", "-")
        text = f"default: {value:,}, with --cpu {SMALL[key]:,}"
        parser.add_argument(option, type=int, metavar="N", help=text)
    parser.add_argument("--child", help=argparse.SUPPRESS)  # of this script's own processes
    parser.add_argument("--ds_config", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs the check, or one of its processes."""
    args = parse_args()
    if args.child:
        take_steps(args.child, args.ds_config, args.work, args.steps)
        return
    if not args.cpu and not torch.cuda.is_available():
        raise UserError(
            "no GPU: torch.cuda.is_available() is False. Run this on a machine with an NVIDIA GPU "
            "and a CUDA build of torch, or add --cpu for a small run of the same flow"
        )
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if not check(args, work.resolve()):
            sys.exit(1)


if __name__ == "__main__":
    sys.exit(exit_with_message(main))
