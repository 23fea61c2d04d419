"""The stages of `scale.py`: each is run in a process of its own and returns its figures."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
import results
from stages import Cgroup, Clock, Figures, folder_gib, memory_gib

sys.path.insert(0, str(results.ROOT / "scripts"))

from make_synthetic import Sizes, Synthetic, write
from make_tiny_encoder import make_encoder

MAX_LENGTH = 32
ENCODER_WIDTH = 64


def make(scratch: Path, sizes: Sizes, seed: int) -> Figures:
    """Writes the raw corpus and the encoder."""
    clock = Clock()
    write(Synthetic(sizes, 20_000, seed), scratch / "raw", filter_share=0.2)
    figures = clock.seconds("make")
    make_encoder(scratch / "raw", scratch / "encoder", width=ENCODER_WIDTH, num_words=20_000)
    return figures | {"peak_gib": memory_gib("VmHWM"), "gib": folder_gib(scratch / "raw")}


def prepare_corpus(scratch: Path) -> Figures:
    """Prepares it."""
    from unidec_ds.data.prepare import prepare

    before_gib = memory_gib("VmHWM")
    clock = Clock()
    corpus = prepare(
        scratch / "raw",
        scratch / "corpus",
        encoder=str(scratch / "encoder"),
        max_length=MAX_LENGTH,
    )
    figures = clock.seconds("prepare")
    num_texts = corpus.num_labels + sum(map(len, corpus.queries.values()))
    return figures | {
        "texts": num_texts,
        "pairs": corpus.positives["train"].num_pairs,
        "texts_per_s": num_texts / figures["prepare_s"],
        "texts_per_cpu_s": num_texts / figures["prepare_cpu_s"],
        "peak_gib": memory_gib("VmHWM"),
        "peak_before_gib": before_gib,
        "gib": folder_gib(scratch / "corpus"),
    }


def load(scratch: Path, batch_size: int, pool_size: int, num_batches: int) -> Figures:
    """Makes batches and nothing else."""
    from unidec_ds.batch import make_batch
    from unidec_ds.data.corpus import open_corpus, split_validation
    from unidec_ds.data.pool import Planner, PoolConfig

    start_gib = memory_gib("RssAnon")
    corpus = open_corpus(scratch / "corpus")
    open_gib = memory_gib("RssAnon")
    clock = Clock()
    query_ids, _ = split_validation(corpus, 0.05, 0)
    figures = clock.seconds("split")
    planner = Planner(
        query_ids=query_ids,
        positives=corpus.positives["train"],
        filter_pairs=corpus.filter_pairs["train"],
        pool=PoolConfig(size=pool_size),
        batch_size=batch_size,
        seed=0,
    )
    plan_s, plan_cpu_s, batch_s = [], [], []
    anon_gib = {}
    for step in range(num_batches):
        started, started_cpu = perf_counter(), process_time()
        plan = planner.plan(step)
        plan_s.append(perf_counter() - started)
        plan_cpu_s.append(process_time() - started_cpu)
        make_batch(plan, corpus, rank=0, world_size=1, encoder_chunk=1024, with_label_texts=True)
        batch_s.append(perf_counter() - started)
        anon_gib[step] = memory_gib("RssAnon")
    return figures | {
        "batches": num_batches,
        "pool_size": len(plan.label_ids),
        "plan_ms": 1e3 * median(plan_s),
        "plan_cpu_ms": 1e3 * median(plan_cpu_s),
        "batch_ms": 1e3 * median(batch_s),
        "open_anon_gib": open_gib - start_gib,
        "anon_after_a_tenth_gib": anon_gib[num_batches // 10] - start_gib,
        "anon_at_the_end_gib": anon_gib[num_batches - 1] - start_gib,
        "peak_gib": memory_gib("VmHWM"),
    }


def table(row_format: str, num_labels: int, width: int, num_steps: int) -> Figures:
    """Makes the classifier table in host memory and updates 8,192 random rows a step."""
    import torch

    from unidec_ds.classifier.storage import Placement

    start_gib = memory_gib("RssAnon")
    clock = Clock()
    made = new_table(row_format, num_labels, width, Placement("cpu"))
    figures = clock.seconds("make")
    figures["table_gib"] = num_labels * made.bytes_per_label / 2**30
    figures["new_anon_gib"] = memory_gib("RssAnon") - start_gib
    rng = np.random.default_rng(0)
    gradient = torch.from_numpy(rng.standard_normal((8_192, width), np.float32))
    cpu_s = []
    for _ in range(num_steps):
        label_ids = np.sort(rng.choice(num_labels, 8_192, replace=False))
        started = process_time()
        rows = made.fetch(label_ids)
        rows.grad = gradient
        made.apply(rows, lr=1e-3)
        cpu_s.append(process_time() - started)
    return figures | {
        "step_cpu_ms": 1e3 * median(cpu_s),
        "anon_after_steps_gib": memory_gib("RssAnon") - start_gib,
        "peak_gib": memory_gib("VmHWM"),
    }


def new_table(row_format: str, num_labels: int, width: int, placement: Any) -> Any:
    """Returns a whole classifier table, on one rank."""
    import torch

    from unidec_ds.classifier.config import ClassifierConfig
    from unidec_ds.classifier.table import ClassifierTable

    return ClassifierTable(
        num_labels=num_labels, width=width, rank=0, world_size=1,
        config=ClassifierConfig(format=row_format), placement=placement,
        device=torch.device("cpu"), seed=0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
    )  # fmt: skip


def train(scratch: Path, row_format: str, settings: dict[str, int]) -> Figures:
    """Trains, saves and evaluates with the real trainer."""
    from unidec_ds import checkpoint
    from unidec_ds.config import load_recipe
    from unidec_ds.engine import start_engine
    from unidec_ds.job import prepare_job
    from unidec_ds.run import write_run
    from unidec_ds.trainer import Trainer

    run = scratch / f"run_{row_format}"
    shutil.rmtree(run, ignore_errors=True)
    recipe_file = scratch / f"recipe_{row_format}.json"
    recipe_file.write_text(json.dumps(recipe(scratch, row_format, settings)))
    before = {"anon": memory_gib("RssAnon"), "peak": memory_gib("VmHWM")}
    job = prepare_job(
        load_recipe(str(recipe_file)), results.ROOT / "ds_configs/cpu.json", run, None
    )
    engine = start_engine(job.ds_config, job.recipe.train.batch_size)
    write_run(job.run, job.recipe, job.ds_config)

    clock = Clock()
    trainer = Trainer(job.recipe, job.ds_config, job.corpus, engine, job.run)
    figures = clock.seconds("start_up")
    figures["table_gib"] = trainer.table.num_rows * trainer.table.bytes_per_label / 2**30
    figures["start_up_anon_gib"] = memory_gib("RssAnon") - before["anon"]
    figures["start_up_peak_gib"] = memory_gib("VmHWM")

    clock = Clock()
    records = take_train_steps(trainer, job.corpus)
    figures |= clock.seconds("all_steps") | step_figures(records)
    figures["steps"] = trainer.step
    figures["trained_anon_gib"] = memory_gib("RssAnon") - before["anon"]

    clock = Clock()
    details = {"corpus_fingerprint": job.corpus.fingerprint, "total_steps": trainer.total_steps}
    saved = checkpoint.Save(
        run, trainer.step, engine.state(), trainer.table, keep=1, details=details
    ).finish()
    figures |= clock.seconds("checkpoint")
    figures["checkpoint_gib"] = folder_gib(saved)
    figures["checkpoint_anon_gib"] = memory_gib("RssAnon") - before["anon"]

    if settings["eval_queries"]:
        clock = Clock()
        trainer.evaluate("test")
        figures |= clock.seconds("evaluate")
        figures["evaluated_labels_per_s"] = job.corpus.num_labels / figures["evaluate_s"]
    figures["host_anon_gib"] = memory_gib("RssAnon")
    figures["peak_gib"] = memory_gib("VmHWM")
    trainer.monitor.close()
    engine.close()
    shutil.rmtree(run)
    return figures


def recipe(scratch: Path, row_format: str, settings: dict[str, int]) -> dict[str, Any]:
    """Returns the recipe: the method's, with a tiny encoder, random batches and no mining."""
    return {
        "corpus": {"path": str(scratch / "corpus")},
        "encoder": {"name": str(scratch / "encoder"), "max_length": MAX_LENGTH},
        "model": {"width": settings["width"]},
        "pool": {"size": settings["pool_size"]},
        "mining": {"every_epochs": 0},
        "classifier": {"format": row_format},
        "evaluation": {
            "propensity": [0.6, 2.6],
            "every_epochs": 0,
            "max_queries": settings["eval_queries"],
        },
        "checkpoint": {"keep": 1},
        "train": {
            "batch_size": settings["batch_size"],
            "epochs": 1,
            "max_steps": settings["steps"],
            "encoder_chunk": 1024,
        },
    }


def take_train_steps(trainer: Any, corpus: Any) -> list[dict[str, Any]]:
    """Takes all of a trainer's steps, batches made ahead; returns what each took."""
    from unidec_ds.batch import make_batch
    from unidec_ds.data.prefetch import Prefetcher
    from unidec_ds.monitor import StepTimer

    def make_one(step: int) -> Any:
        chunk = trainer.recipe.train.encoder_chunk
        return make_batch(
            trainer.planner.plan(step), corpus, rank=0, world_size=1, encoder_chunk=chunk
        )

    records = []
    with Prefetcher(make_one, 0, trainer.total_steps) as batches:
        for _ in range(trainer.total_steps):
            timer = StepTimer(trainer.device, synchronize=False)
            started, started_cpu = perf_counter(), process_time()
            with timer.part("wait_for_batch"):
                batch = next(batches).to(trainer.device)
            result = trainer.train_step(batch, timer)
            trainer.step += 1
            record = {
                "step_s": perf_counter() - started,
                "step_cpu_s": process_time() - started_cpu,
                "time_s": timer.seconds,
                "pool_size": len(batch.plan.label_ids),
                "loss": result.losses["loss"],
                "anon_gib": memory_gib("RssAnon"),
            }
            print(trainer.step, f"loss {record['loss']:.3f}, {record['step_s']:.1f} s", flush=True)
            records.append(record)
    return records


def step_figures(records: list[dict[str, Any]]) -> Figures:
    """Returns the medians over the steps, the first left out."""
    steps = records[1:]
    figures = {
        "step_ms": 1e3 * median(record["step_s"] for record in steps),
        "step_cpu_ms": 1e3 * median(record["step_cpu_s"] for record in steps),
    }
    for part in steps[0]["time_s"]:
        figures[f"{part}_ms"] = 1e3 * median(record["time_s"][part] for record in steps)
    return figures | {
        "pool_size": median(record["pool_size"] for record in steps),
        "first_loss": records[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "anon_after_a_tenth_gib": records[len(records) // 10]["anon_gib"],
        "anon_at_the_end_gib": records[-1]["anon_gib"],
    }


def nvme(scratch: Path, num_labels: int, width: int, num_steps: int, limit_bytes: int) -> Figures:
    """Updates a table in mapped files under a memory limit, and one in host memory without."""
    import torch

    from unidec_ds.classifier.storage import Placement

    def take_steps(table: Any) -> list[float]:
        rng = np.random.default_rng(0)
        seconds = []
        for _ in range(num_steps):
            label_ids = np.sort(rng.choice(num_labels, 4096, replace=False))
            gradient = torch.from_numpy(rng.standard_normal((4096, width), np.float32))
            started = perf_counter()
            rows = table.fetch(label_ids)
            rows.grad = gradient
            table.apply(rows, lr=1e-3)
            seconds.append(perf_counter() - started)
        return seconds

    in_memory = new_table("fp32", num_labels, width, Placement("cpu"))
    memory_s = take_steps(in_memory)
    sample = np.arange(0, num_labels, 97)
    expected = in_memory.read(sample)
    del in_memory
    (scratch / "nvme").mkdir(exist_ok=True)
    with Cgroup(limit_bytes) as cgroup:
        mapped = new_table("fp32", num_labels, width, Placement("nvme", scratch / "nvme"))
        files_s = take_steps(mapped)
        difference = float((mapped.read(sample) - expected).abs().max())
        figures = {
            "table_gib": num_labels * mapped.bytes_per_label / 2**30,
            "limit_gib": cgroup.limit_gib,
            "most_charged_gib": cgroup.most_charged_gib(),
            "files_step_ms": 1e3 * median(files_s),
            "memory_step_ms": 1e3 * median(memory_s),
            "difference": difference,
        }
        del mapped
    return figures
