"""One run of one system of `rivals.py`: its corpus, its recipe, and ranks that take its steps.

Each run is in processes of its own, forked from one that has imported everything.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import results
from rival_costs import Encoder, forward_flops, step_flops

sys.path.insert(0, str(results.ROOT / "scripts"))

from make_synthetic import Sizes, Synthetic, write
from make_tiny_encoder import make_encoder

Figures = dict[str, Any]
QUERIES, POSITIVES, WORDS = 4096, 3.0, 500
_PRELOAD = ["deepspeed", "accelerate", "transformers", "torch.utils.flop_counter",
            "unidec_ds.trainer", "unidec_ds.job"]  # fmt: skip
_DE_ALONE = {"classifier": "none", "l2q": False}
SECTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "psl": {},
    "pol": {
        "objective": _DE_ALONE,
        "pool": {
            "size": 0, "num_positives": 1, "num_hard_negatives": 0, "fill_with_positives": False
        },
    },
    "pal": {"pool": {"size": 0, "num_positives": 0, "num_hard_negatives": 0}},
    "dexml": {"objective": {**_DE_ALONE, "de": "decoupled", "pool": "all"}},
    "renee": {
        "objective": {"de": "none", "classifier": "bce", "pool": "all", "l2q": False},
        "classifier": {"optimizer": "sgd", "format": "fp32", "streamed": True},
        "train": {"recompute": False},
    },
    "zero_offload": {"classifier": {"format": "fp32"}},
}  # fmt: skip


def make_corpus(work: Path, labels: int, width: int) -> None:
    """Writes and prepares the corpus of a size, and with the first the encoder of all.

    There are so few words that the smallest corpus has them all: texts are as long in every one.
    """
    from unidec_ds.data.prepare import prepare

    folder = work / f"{labels}"
    if (folder / "corpus").is_dir():
        return
    sizes = Sizes(QUERIES, 16, labels, POSITIVES)
    write(Synthetic(sizes, WORDS, seed=0), folder / "raw", filter_share=0.0)
    if not (work / "encoder").is_dir():
        make_encoder(folder / "raw", work / "encoder", width=width, num_words=2 * WORDS)
    prepare(folder / "raw", folder / "corpus", encoder=str(work / "encoder"), max_length=32)


def recipe_file(work: Path, system: str, labels: int, batch_size: int, pool_size: int) -> Path:
    """Writes the recipe of a system at a size."""
    content: dict[str, Any] = {
        "corpus": {"path": str(work / f"{labels}" / "corpus"), "validation_fraction": 0.0},
        "encoder": {"name": str(work / "encoder"), "max_length": 32},
        "model": {"head_dropout": 0.0, "row_dropout": 0.0},
        "pool": {"size": pool_size},
        "objective": {"l2q": True},
        "mining": {"every_epochs": 0},
        "train": {"batch_size": batch_size, "epochs": 100, "encoder_chunk": 256,
                  "loss_block_bytes": 64 << 20},
    }  # fmt: skip
    for section, values in SECTIONS[system].items():
        content[section] = {**content.get(section, {}), **values}
    path = work / f"{system}_{labels}.yaml"
    path.write_text(json.dumps(content))
    return path


def train_on_rank(recipe_path: str, run: str, system: str, num_steps: int) -> Figures:
    """Takes steps on this rank, as the environment describes it; returns its figures."""
    import torch
    from collectives import CollectiveCounter
    from dense_offload import DenseOffload
    from torch.utils.flop_counter import FlopCounterMode

    from unidec_ds import comm
    from unidec_ds.config import load_recipe
    from unidec_ds.engine import start_engine
    from unidec_ds.job import prepare_job
    from unidec_ds.monitor import StepTimer
    from unidec_ds.trainer import Trainer

    recipe = load_recipe(recipe_path)
    with CollectiveCounter() as counter:
        job = prepare_job(recipe, results.ROOT / "ds_configs" / "cpu.json", Path(run))
        engine = start_engine(job.ds_config, recipe.train.batch_size)
        trainer: Any
        if system == "zero_offload":
            trainer = DenseOffload(recipe, job.corpus, engine)
            make_batch = trainer.make_batch
            config = trainer.module.model.encoder.config

            def take_step(batch: Any) -> None:
                trainer.train_step(batch)
        else:
            trainer = Trainer(recipe, job.ds_config, job.corpus, engine, Path(run))
            make_batch = trainer.make_batch
            config = trainer.model.encoder.config

            def take_step(batch: Any) -> None:
                trainer.train_step(batch, StepTimer(engine.device, synchronize=False))
                trainer.step += 1

        if recipe.pool.num_hard_negatives and recipe.objective.pool == "psl":
            shape = (job.corpus.positives["train"].num_rows, recipe.mining.shortlist_size)
            drawn = np.random.default_rng(0).integers(job.corpus.num_labels, size=shape)
            trainer.planner = trainer.planner.with_mined(drawn.astype(np.int32), None)
        take_step(make_batch(0))
        seconds, handed = [], []
        for step in range(1, num_steps + 1):
            batch = make_batch(step)
            comm.barrier()
            before, start = counter.snapshot(), perf_counter()
            take_step(batch)
            seconds.append(perf_counter() - start)
            handed.append(counter.since(before))
        peak = peak_bytes()
        last = make_batch(num_steps + 1)
        # It keeps activations, hence after the peak; products in place are not of those it knows.
        in_place = {torch.ops.aten.addmm_: flops_in_place}
        with FlopCounterMode(display=False, custom_mapping=in_place) as flops:
            take_step(last)
    sizes = Encoder(config.hidden_size, config.num_hidden_layers, config.intermediate_size)
    encoded = forward_flops(sizes, [tuple(chunk.input_ids.shape) for chunk in last.chunks])
    own = {"labels": len(last.own_pool), "text_labels": len(last.own_pool_with_text)}
    rows = max(1, recipe.train.loss_block_bytes // (4 * len(last.plan.query_ids)))
    alone = comm.world_size() == 1  # what is handed over then goes nowhere
    sent = {who: 0 if alone else median(step[who] for step in handed) for who in handed[0]}
    figures = {
        "step_s": median(seconds),
        "peak_bytes": peak,
        "flops": flops.get_total_flops(),
        "formula_flops": step_flops(
            recipe,
            encoded,
            sizes.width,
            queries=len(last.plan.query_ids),
            own_queries=last.query_sizes[comm.rank()],
            blocks=(-(-own["text_labels"] // rows), -(-own["labels"] // rows)),
            **own,
        ),
        "comm_bytes": sum(sent.values()),
        "own_comm_bytes": sent["unidec_ds"],
        "engine_comm_bytes": sent["engine"],
        "pool": len(last.plan.label_ids),
    }
    if system != "zero_offload":
        trainer.monitor.close()
    engine.close()
    return figures


def flops_in_place(
    _: Sequence[int], one: Sequence[int], other: Sequence[int], *__: Any, **___: Any
) -> int:
    """Returns the FLOPs of `x.addmm_(one, other)` from the shapes."""
    return 2 * one[0] * one[1] * other[1]


def peak_bytes() -> int:
    """Returns the most resident memory of this process so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def run_rank(environment: dict[str, str], out: str, log: str, *arguments: Any) -> None:
    """Becomes one rank and leaves its figures in a file, what it says in another."""
    os.environ.update(environment)
    said = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    Path(out).write_text(json.dumps(train_on_rank(*arguments)))


def measure(recipe: Path, system: str, world_size: int, num_steps: int) -> Figures:
    """Returns the figures of a system on new processes, one a rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        processes = []
        for rank in range(world_size):
            environment = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size,
                "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            arguments = (
                {key: str(value) for key, value in environment.items()},
                f"{folder}/{rank}.json", f"{folder}/{rank}.log",
                str(recipe), f"{folder}/run", system, num_steps,
            )  # fmt: skip
            processes.append(context.Process(target=run_rank, args=arguments, daemon=True))
            processes[-1].start()
        while alive := [process for process in processes if process.is_alive()]:
            wait([process.sentinel for process in alive])
            if any(process.exitcode for process in processes):  # the others would wait for it
                for process in alive:
                    process.kill()
        codes = [process.exitcode or 0 for process in processes]
        if any(codes):  # those that were killed have negative codes
            rank = codes.index(max(codes, key=lambda code: (code > 0, code < 0)))
            print(Path(f"{folder}/{rank}.log").read_text(), file=sys.stderr)
            raise SystemExit(f"{system}: rank {rank} of {world_size} failed, see above")
        ranks = [json.loads(Path(f"{folder}/{rank}.json").read_text())
                 for rank in range(world_size)]  # fmt: skip
    summed = {key: sum(rank[key] for rank in ranks) for key in ("flops", "formula_flops")}
    return {**ranks[0], "peak_bytes": max(rank["peak_bytes"] for rank in ranks), **summed}
