"""The run that `kill_test.py` kills: its inputs, one rank's life, and what two ends differ in.

Which phase a rank is in, and whether it is writing checkpoint files, it notes in memory that it
shares with who kills it.
"""

from __future__ import annotations

import functools
import json
import logging
import mmap
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from make_synthetic import SHAPES, Synthetic, write
from make_tiny_encoder import make_encoder

from unidec_ds import checkpoint
from unidec_ds.exits import exit_with_message
from unidec_ds.manifest import read_manifest

PHASES = ("start", "step", "save", "mining", "evaluation", "between")
DS_CONFIG = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "gradient_clipping": 1.0,
}


def make_inputs(folder: Path) -> None:
    """Writes corpus, encoder, recipe and ds_config."""
    sizes = SHAPES["131k"]._replace(train_queries=300, test_queries=40, labels=200)
    write(Synthetic(sizes, 100, 0), folder / "raw", filter_share=0.2, show_progress=False)
    make_encoder(folder / "raw", folder / "encoder", width=32, num_words=200)
    recipe = {
        "corpus": {
            "path": str(folder / "raw"),
            "prepared_dir": str(folder / "prepared"),
            "validation_fraction": 0.1,
        },
        "encoder": {"name": str(folder / "encoder"), "max_length": 12},
        "pool": {"size": 64, "num_positives": 2, "num_hard_negatives": 2},
        "batches": {"kind": "clustered"},
        "mining": {
            "start_epoch": 1, "every_epochs": 1, "shortlist_size": 8, "source": "cached",
        },
        "checkpoint": {"every_steps": 3, "keep": 2, "keep_best": True},
        "train": {"batch_size": 32, "epochs": 4, "encoder_chunk": 32},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    (folder / "ds_config.json").write_text(json.dumps(DS_CONFIG))


def live(rank: int, world_size: int, port: int, inputs: Path, run: Path, life: Path) -> None:
    """One rank of one life of a run, as `train.py --resume auto`; notes its phase on the way."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1",
    )  # fmt: skip
    log = os.open(life / f"{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from unidec_ds import job
    from unidec_ds.config import load_recipe
    from unidec_ds.lifeline import Lifeline
    from unidec_ds.mining.miner import Miner
    from unidec_ds.saver import Saver
    from unidec_ds.trainer import Trainer

    torch.set_num_threads(1)
    phases, seconds = open_phases(life), Counter[str]()

    def mark(owner: type, name: str, phase: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)
        place = rank if phase in PHASES else world_size + rank

        @functools.wraps(plain)
        def marked(*args: Any, **kwargs: Any) -> Any:
            before, start = phases[place], time.perf_counter()
            phases[place] = PHASES.index(phase) if phase in PHASES else 1
            try:
                return plain(*args, **kwargs)
            finally:
                phases[place] = before
                seconds[phase] += time.perf_counter() - start
                seconds[f"{phase} calls"] += 1

        setattr(owner, name, marked)

    mark(Trainer, "train_step", "step")
    mark(Saver, "begin", "save")
    mark(Saver, "finish", "save")
    mark(checkpoint.Save, "_write_files", "writing")  # in a thread of its own
    mark(Miner, "refresh", "mining")
    mark(Trainer, "evaluate", "evaluation")
    plain_fit = Trainer.fit

    def fit(self: Trainer) -> None:
        phases[rank] = PHASES.index("between")
        plain_fit(self)

    Trainer.fit = fit  # type: ignore[method-assign]

    lifeline = Lifeline.of_launch()

    def main() -> None:
        recipe = load_recipe(str(inputs / "recipe.yaml"))
        lifeline.open()
        ds_config = inputs / "ds_config.json"
        job.run_job(job.prepare_job(recipe, ds_config, run, "auto", lifeline=lifeline), lifeline)

    begin = time.perf_counter()
    code = exit_with_message(main, lifeline)
    if rank == 0:
        seconds["start"], seconds["start calls"] = time.perf_counter() - begin, 10
        (life / "seconds.json").write_text(json.dumps(seconds))
    sys.exit(code)


def open_phases(life: Path) -> mmap.mmap:
    """Returns shared memory: a byte for each rank's phase, then one for whether it is writing."""
    with (life / "phases").open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def differences(run: Path, undisturbed: Path) -> list[str]:
    """Returns in what a finished run differs from the undisturbed one."""
    found = []
    ours, theirs = _read(run), _read(undisturbed)
    for name, value in theirs.items():
        if ours[name] != value:
            found.append(f"{name}: {ours[name]!s:.300} instead of {value!s:.300}")
    return found


def _read(run: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # purging is what is wanted
    newest = checkpoint.latest(run)
    assert newest is not None
    damage = checkpoint.find_damage(newest)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(run), {"scalars": 0}).Reload()
    best = checkpoint.best(run)
    noted = ("checkpoint", "unified_tuned")
    evaluation = json.loads((run / "evaluation.json").read_text())
    return {
        "damage": damage,
        "files": read_manifest(newest)["files"],
        "folders": sorted(path.name for path in newest.parent.iterdir()),
        "best": best,
        "losses": [(r["step"], r["loss"]) for r in records if "loss" in r],
        "evaluations": [
            (r["step"], r["split"], r["evaluation"]) for r in records if "evaluation" in r
        ],
        "mining steps": [r["step"] for r in records if "mining_total_s" in r],
        "TensorBoard losses": [(e.step, e.value) for e in events.Scalars("loss/loss")],
        "TensorBoard validation": [
            (e.step, e.value) for e in events.Scalars("validation_unified/P@1")
        ],
        "final evaluation": {k: v for k, v in evaluation.items() if k != "details"},
        "details": {k: v for k, v in evaluation["details"].items() if k not in noted},
    }
