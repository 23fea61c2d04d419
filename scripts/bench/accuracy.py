"""Accuracy of variants of a recipe over several seeds: mean, standard error, training time.

    python scripts/bench/accuracy.py formats [--seeds 0 1 2] [--quick] [--json FILE]
    python scripts/bench/accuracy.py negatives ...

Every variant is the recipe with a few settings changed, trained and evaluated by `train.py` itself,
in a process of its own. Finished runs under `--runs` are not trained again, so a study that was
stopped goes on, a new seed adds to it, and studies share the runs they have in common.

Runs go side by side in `--jobs` processes of `--threads` threads each; a training's seconds
therefore compare within one study only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@5", "R@10", "R@100")
STUDIES: dict[str, dict[str, list[str]]] = {
    "formats": {
        "fp32": ["classifier.format=fp32"],
        "bf16_moments": ["classifier.format=bf16_moments"],
        "bf16": ["classifier.format=bf16"],
        "rowwise": ["classifier.format=rowwise"],
        "fp32, per-row bias correction": [
            "classifier.format=fp32",
            "classifier.bias_correction=per_row",
        ],
    },
    "negatives": {
        "random batches, not mined": ["batches.kind=random", "mining.every_epochs=0"],
        "random batches, mined": ["batches.kind=random"],
        "clustered batches, none drawn": ["pool.num_hard_negatives=0"],
        "clustered batches, mined": [],
        "clustered batches, mined from the cache": ["mining.source=cached"],
    },
}


def main() -> None:
    """Trains what is missing, prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--ds_config", default="ds_configs/cpu.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--set", action="append", default=[], help="applied to every variant")
    parser.add_argument(
        "--layers", type=int, help="train the packaged encoder's first layers only: faster"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "accuracy")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each")
    parser.add_argument("--quick", action="store_true", help="two steps, two seeds")
    parser.add_argument("--view", default="unified")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--results", type=Path, help="folder for the Markdown table")
    args = parser.parse_args()
    seeds = args.seeds[:2] if args.quick else args.seeds
    settings = [*args.set, *(["train.max_steps=2"] if args.quick else [])]
    if args.layers:
        settings.append(f"encoder.name={first_layers(args.layers, args.runs)}")

    variants = {
        name: changes
        for name, changes in STUDIES[args.study].items()
        if args.variants is None or name in args.variants
    }
    trainings = [(name, seed) for seed in seeds for name in variants]

    def run(training: tuple[str, int]) -> dict[str, Any]:
        name, seed = training
        overrides = [*settings, *variants[name], f"train.seed={seed}"]
        changes = [change for change in overrides if not change.startswith("encoder.name")]
        layers = [f"{args.layers}-layers"] if args.layers else []
        folder = args.runs / "-".join([args.recipe, *layers, *changes])
        return {"variant": name, "seed": seed, **train(args, folder, overrides)}

    with ThreadPoolExecutor(args.jobs) as pool:
        figures = list(pool.map(run, trainings))
    report = table(figures, list(variants), args.view)
    command = f"python scripts/bench/accuracy.py {' '.join(sys.argv[1:])}"
    page = (
        f"# Accuracy by {args.study}\n\nTest set, view {args.view}, percent: mean over seeds "
        f"{', '.join(map(str, seeds))} ± standard error.\n\n{report}\n\n    {command}\n"
    )
    print(page)
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
        (args.results / f"accuracy_{args.study}.md").write_text(page, encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def train(args: argparse.Namespace, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Returns the final metrics of one run and the seconds of its steps, training it if need be."""
    evaluation = folder / "evaluation.json"
    if not evaluation.is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "train.py"), "--recipe", args.recipe, "--ds_config",
                   args.ds_config, "--output", str(folder), "--resume", "auto"]  # fmt: skip
        command += [part for override in overrides for part in ("--set", override)]
        with folder.with_name(folder.name + ".log").open("w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
            subprocess.run(command, stdout=log, stderr=log, check=True, env=environment, cwd=ROOT)
    metrics = json.loads(evaluation.read_text(encoding="utf-8"))["test"]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for line in lines if "step_s" in (record := json.loads(line))]
    return {"test": metrics, "training_s": sum(record["step_s"] for record in steps)}


def first_layers(num_layers: int, folder: Path) -> Path:
    """Returns a folder with the packaged encoder cut to its first layers."""
    from transformers import AutoModel, AutoTokenizer

    from unidec_ds.encoders import PACKAGED_ENCODER, resolve_encoder

    target = folder.resolve() / f"encoder-{num_layers}-layers"
    if not target.is_dir():
        source = resolve_encoder(PACKAGED_ENCODER)
        AutoTokenizer.from_pretrained(source).save_pretrained(target)
        AutoModel.from_pretrained(source, num_hidden_layers=num_layers).save_pretrained(target)
    return target


def table(figures: list[dict[str, Any]], variants: list[str], view: str) -> str:
    """Returns Markdown: a line per variant, mean ± standard error over its seeds."""
    lines = [f"| | {' | '.join(COLUMNS)} | steps, s |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name in variants:
        runs = [figure for figure in figures if figure["variant"] == name]
        cells = [in_words([run["test"][view][column] for run in runs]) for column in COLUMNS]
        seconds = mean(run["training_s"] for run in runs)
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def in_words(values: list[float]) -> str:
    """Returns mean ± standard error."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} ± {stdev(values) / math.sqrt(len(values)):.2f}"


if __name__ == "__main__":
    main()
