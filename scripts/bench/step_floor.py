"""What a training step costs beyond its encoder.

    python scripts/bench/step_floor.py [--mode floor|overhead] [--quick] [--json FILE]

The real trainer takes steps of the packaged recipe lf-wordnet-84k (batch 256, the recipe's pool,
batches made in the background, records written), and after each step the bare encoder takes the
same texts: forward, mean pooling and backward of the same chunks, with the same dtype, attention
and recompute, and nothing else. The two alternate in one process; figures are medians over steps.

- floor: the packaged MiniLM. `ratio` = `step_s / encoder_s`, where `ratio` is the median of the
  steps' own ratios; the target is 1.15.
- overhead: 1,024 queries, 4,096 pool labels (random hard negatives among them), D = 768, an
  untrained two-layer encoder of width 768: what there is beside it. The target is 60 ms on two
  cores for `overhead_s`: the wait for the batch, gather, rows, loss beyond its matrix products, the
  rows' update and what comes between the parts. The encoder's own AdamW and the loss's matrix
  products are given apart.

Parts, in seconds a step: `wait_for_batch`, `gather`, `rows` and `loss` (forward) as the trainer
itself times them. `loss_backward` ends when autograd turns to the first embedding: all their
gradients are there by then, and what follows is the heads' own backward pass.
`encoder_forward` and `encoder_backward` are the bare encoder's; `forward_rest` and `backward_rest`
are what the trainer's forward and the rest of its backward take beyond them: the heads and ZeRO's
hooks, and, being differences of large numbers, the noise of the machine. `engine_update` clips and
steps encoder and heads, `row_update` the classifier. `between` is all that no part times: checks,
the log, TensorBoard. `plan` and `tokens` are made by a background thread during other steps and
are not part of the sum. `loss_gemm` is the time of the matrix products of both heads' losses on
the same blocks, without which no loss can be.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import results
import torch
from torch import Tensor

from unidec_ds.assembly import build_model
from unidec_ds.batch import Batch, make_batch
from unidec_ds.config import Recipe, load_recipe
from unidec_ds.data.prefetch import Prefetcher
from unidec_ds.data.prepare import embedded_corpora
from unidec_ds.engine import Engine, start_engine
from unidec_ds.job import prepare_job
from unidec_ds.model import UniDEC
from unidec_ds.run import write_run
from unidec_ds.trainer import Trainer

RECIPE, CORPUS = "lf-wordnet-84k", "lf-wordnet-84k"
WARM_UP = 2  # steps that do not count: first allocations, the optimizer's moments
TIMED = ("wait_for_batch", "gather", "rows", "loss")
SETTINGS = {
    # Rows start at random, which takes seconds where embedding all label texts takes minutes; the
    # cosine logits of the recipe, which go with its own start, stay.
    "floor": [
        "train.batch_size=256", "classifier.init=xavier", "objective.classifier_logits=cosine",
    ],
    "overhead": [
        "train.batch_size=1024", "pool.size=4096", "classifier.init=xavier", "encoder.max_length=8",
        "objective.classifier_logits=cosine", "train.encoder_chunk=512", "train.recompute=false",
    ],
}  # fmt: skip


class Stopwatch:
    """Seconds by name, of the step under way and of all before."""

    def __init__(self) -> None:
        self.now: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Times a method of one object, for good."""
        call: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            self.now[name] = time.perf_counter() - start
            return result

        setattr(owner, method, timed)

    def watch_loss_backward(self, engine: Engine) -> None:
        """Times the backward pass from its begin to where it reaches the first embedding.

        Autograd goes back in the order in which things were made, so the loss and the gathering of
        the queries are behind it there, and no head has begun.
        """
        forward, backward = engine.forward, engine.backward
        begun = 0.0

        def note(_: Tensor) -> None:
            self.now.setdefault("loss_backward", time.perf_counter() - begun)

        def watched_forward(*args: Any) -> Any:
            embeddings = forward(*args)
            for tensor in embeddings[:3]:
                if tensor.requires_grad:
                    tensor.register_hook(note)
            return embeddings

        def watched_backward(share: Tensor) -> None:
            nonlocal begun
            begun = time.perf_counter()
            backward(share)

        engine.forward, engine.backward = watched_forward, watched_backward  # type: ignore[method-assign]

    def finish_step(self, **more: float) -> None:
        """Closes the step under way."""
        self.steps.append({**self.now, **more})
        self.now = {}


def make_trainer(mode: str, work: Path, ds_config: Path, overrides: list[str]) -> Trainer:
    """Returns the trainer of a new run under `work`."""
    settings = [*SETTINGS[mode], f"corpus.prepared_dir={work / 'prepared'}", *overrides]
    if mode == "overhead":
        encoder = work / "encoder"
        if not encoder.is_dir():
            raw = embedded_corpora()[CORPUS]
            maker = results.ROOT / "scripts" / "make_tiny_encoder.py"
            sizes = ["--width", "768", "--words", "2000"]
            subprocess.run([sys.executable, maker, raw, "--out", encoder, *sizes], check=True)
        settings.append(f"encoder.name={encoder}")
    run = Path(tempfile.mkdtemp(dir=work, prefix="run_"))
    job = prepare_job(load_recipe(RECIPE, settings), ds_config, run / "run")
    engine = start_engine(job.ds_config, job.recipe.train.batch_size)
    write_run(job.run, job.recipe, job.ds_config)
    trainer = Trainer(job.recipe, job.ds_config, job.corpus, engine, job.run)
    if mode == "overhead":  # random hard negatives fill the pool, as mined ones would
        shape = (job.corpus.positives["train"].num_rows, job.recipe.mining.shortlist_size)
        shortlists = np.random.default_rng(0).integers(job.corpus.num_labels, size=shape)
        trainer.planner = trainer.planner.with_mined(shortlists.astype(np.int32), None)
    return trainer


def bare_encoder(trainer: Trainer) -> UniDEC:
    """Returns the trainer's model anew, outside the engine, in the engine's dtype."""
    model = build_model(trainer.recipe, trainer.device)
    return model.to(next(trainer.model.encoder.parameters()).dtype)


def encode(model: UniDEC, batch: Batch, recompute: bool) -> tuple[float, float]:
    """Encodes a step's texts and back-propagates; returns the seconds of both passes."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    pooled = torch.cat([model.pool(chunk, recompute) for chunk in batch.chunks])
    encoded = time.perf_counter()
    pooled.backward(torch.full_like(pooled, 1e-3))
    return encoded - start, time.perf_counter() - encoded


def products_s(batch: Batch, recipe: Recipe, width: int) -> float:
    """Returns the seconds of the matrix products of both heads' losses and gradients."""
    num_queries = len(batch.plan.query_ids)
    block_labels = max(1, recipe.train.loss_block_bytes // (4 * num_queries))
    queries_BD = torch.randn(num_queries, width)
    gradient_BD = torch.zeros_like(queries_BD)
    seconds = 0.0
    for num_labels in (len(batch.own_pool_with_text), len(batch.own_pool)):
        labels_PD = torch.randn(num_labels, width)
        gradient_PD = torch.zeros_like(labels_PD)
        buffer = torch.zeros(min(block_labels, num_labels), num_queries)
        times = 1 if block_labels >= num_labels else 2  # blocks are computed anew in backward
        start = time.perf_counter()
        for first in range(0, num_labels, block_labels):
            part = slice(first, first + block_labels)
            labels_pD = labels_PD[part]
            block_pB = buffer[: len(labels_pD)]
            for _ in range(times):
                torch.mm(labels_pD, queries_BD.T, out=block_pB)
            gradient_BD.addmm_(block_pB.T, labels_pD)
            torch.mm(block_pB, queries_BD, out=gradient_PD[part])
        seconds += time.perf_counter() - start
    return seconds


def background_s(trainer: Trainer, step: int) -> dict[str, float]:
    """Returns the seconds of what the background thread does for a step."""
    start = time.perf_counter()
    plan = trainer.planner.plan(step)
    planned = time.perf_counter()
    make_batch(
        plan,
        trainer.corpus,
        rank=0,
        world_size=1,
        encoder_chunk=trainer.recipe.train.encoder_chunk,
    )
    return {"plan": planned - start, "tokens": time.perf_counter() - planned}


def measure(trainer: Trainer, num_steps: int) -> list[dict[str, float]]:
    """Returns the parts of each step after the warm-up, in seconds."""
    watch = Stopwatch()
    watch.wrap(trainer, "train_step", "train_step")
    watch.wrap(trainer.engine, "step", "engine_update")
    watch.wrap(trainer.table, "apply", "row_update")
    watch.watch_loss_backward(trainer.engine)
    bare, recipe = bare_encoder(trainer), trainer.recipe
    recompute = recipe.train.recompute and recipe.train.encoder_chunk > 0
    log = trainer.monitor.log_step
    records: list[dict[str, Any]] = []
    trainer.monitor.log_step = lambda record: (records.append(record), log(record))  # type: ignore
    with Prefetcher(trainer.make_batch, 0, WARM_UP + num_steps) as batches:
        for step in range(WARM_UP + num_steps):
            start = time.perf_counter()
            trainer._step(batches)  # what `fit` does between the epochs' ends
            step_s = time.perf_counter() - start
            batch = trainer.make_batch(step)
            forward_s, backward_s = encode(bare, batch, recompute)
            watch.finish_step(
                step_s=step_s,
                encoder_forward=forward_s,
                encoder_backward=backward_s,
                loss_gemm=products_s(batch, recipe, trainer.model.width),
                num_queries=len(batch.plan.query_ids),
                pool_size=len(batch.plan.label_ids),
                num_tokens=batch.num_tokens,
                **{f"trainer_{key}": value for key, value in records[-1]["time_s"].items()},
                **background_s(trainer, step),
            )
            print(
                f"step {step}: {step_s:.3f} s, bare encoder {forward_s + backward_s:.3f} s",
                file=sys.stderr,
                flush=True,
            )
    return watch.steps[WARM_UP:]


def breakdown_of(step: dict[str, float]) -> dict[str, float]:
    """Returns the parts of one step; all but plan, tokens and loss_gemm add up to `step_s`."""
    parts = {name: step[f"trainer_{name}"] for name in TIMED}
    parts["encoder_forward"] = step["encoder_forward"]
    parts["encoder_backward"] = step["encoder_backward"]
    parts["forward_rest"] = step["trainer_forward"] - step["encoder_forward"]
    parts["loss_backward"] = step["loss_backward"]
    parts["backward_rest"] = (
        step["trainer_backward"] - step["loss_backward"] - step["encoder_backward"]
    )
    parts["engine_update"] = step["engine_update"]
    parts["row_update"] = step["row_update"]
    parts["between"] = step["step_s"] - sum(parts.values())
    return {**parts, **{name: step[name] for name in ("plan", "tokens", "loss_gemm")}}


def summarise(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Returns medians over the steps."""
    encoder = [step["encoder_forward"] + step["encoder_backward"] for step in steps]
    parts = [breakdown_of(step) for step in steps]
    ours = ("wait_for_batch", "gather", "rows", "loss", "loss_backward", "row_update", "between")
    return {
        "step_s": median(step["step_s"] for step in steps),
        "encoder_s": median(encoder),
        "ratio": median(s["step_s"] / e for s, e in zip(steps, encoder, strict=True)),
        "overhead_s": median(sum(p[name] for name in ours) - p["loss_gemm"] for p in parts),
        "steps": len(steps),
        "num_queries": median(step["num_queries"] for step in steps),
        "pool_size": median(step["pool_size"] for step in steps),
        "num_tokens": median(step["num_tokens"] for step in steps),
        "breakdown": {name: median(p[name] for p in parts) for name in parts[0]},
    }


def page(mode: str, figures: dict[str, Any]) -> str:
    """Returns the tables."""
    step_s = figures["step_s"]
    rows = [
        [name, f"{1e3 * seconds:.1f}", f"{100 * seconds / step_s:.1f}"]
        for name, seconds in figures["breakdown"].items()
    ]
    return "\n".join(
        [
            f"Mode {mode}: {figures['num_queries']:,.0f} queries, pool {figures['pool_size']:,.0f},"
            f" {figures['num_tokens']:,.0f} tokens, {figures['dtype']}, medians of "
            f"{figures['steps']} steps. What the parts are: `scripts/bench/step_floor.py`.",
            "",
            f"- whole step {1e3 * step_s:.1f} ms, bare encoder {1e3 * figures['encoder_s']:.1f} ms,"
            f" ratio {figures['ratio']:.3f}",
            f"- beside the encoder, its AdamW and the loss's matrix products: "
            f"{1e3 * figures['overhead_s']:.1f} ms",
            "",
            results.table(["part", "ms", "% of the step"], rows),
        ]
    )


def main() -> None:
    """Takes the steps and writes what was asked for."""
    parser = results.parser(__doc__, quick="three steps of 32 queries and 128 labels")
    parser.add_argument("--mode", choices=SETTINGS, default="floor")
    parser.add_argument("--ds_config", type=Path, help="default: ds_configs/cpu_bf16.json")
    parser.add_argument("--steps", type=int, default=12, help="that count (default: 12)")
    parser.add_argument("--work", type=Path, help="keep the prepared corpus here")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    args = parser.parse_args()
    ds_config = args.ds_config or results.ROOT / "ds_configs" / "cpu_bf16.json"
    quick = ["train.batch_size=32", "pool.size=128"] if args.quick else []
    with tempfile.TemporaryDirectory(prefix="step_floor_") as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        trainer = make_trainer(args.mode, work, ds_config, [*quick, *args.overrides])
        figures = summarise(measure(trainer, 3 if args.quick else args.steps))
        figures |= {"mode": args.mode, "dtype": trainer.engine.ds_config.dtype}
        trainer.monitor.close()
        trainer.engine.close()
    name = "step_floor" if args.mode == "floor" else "step_overhead"
    title = "A training step against its bare encoder"
    results.publish(name, args, figures, title=title, body=page(args.mode, figures))


if __name__ == "__main__":
    main()
