"""The process that takes a few real steps for `measure`.

    python -m unidec_ds.preflight.steps FOLDER

The steps are the trainer's: the real encoder, table and corpus, batches made ahead in the
background, hard negatives drawn at random where mining has yet to find them. Nothing is evaluated,
mined or saved, rows start as random numbers, and the run directory is a temporary one.

Cost: the start of a run (the kernels' first build included), N + 1 steps, one block of texts.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter

from unidec_ds.config import Recipe, load_recipe
from unidec_ds.data.prefetch import Prefetcher
from unidec_ds.data.prepare import resolve_corpus
from unidec_ds.ds_config import load_ds_config
from unidec_ds.embedding import BLOCK, embed
from unidec_ds.engine import start_engine
from unidec_ds.exits import exit_with_message
from unidec_ds.monitor import StepTimer
from unidec_ds.preflight.measure import Measured
from unidec_ds.preflight.workload import with_random_shortlists
from unidec_ds.run import write_run
from unidec_ds.trainer import Trainer


def take_steps(folder: Path) -> Measured:
    """Takes the steps that `folder` asks for, in this process."""
    request = json.loads((folder / "request.json").read_text())
    recipe = _only_steps(load_recipe(str(folder / "recipe.yaml")), request["steps"] + 1)
    batch_size = recipe.train.batch_size
    ds_config = load_ds_config(Path(request["ds_config"]), batch_size=batch_size, world_size=1)
    corpus = resolve_corpus(recipe.corpus, recipe.encoder.name, recipe.encoder.max_length)
    engine = start_engine(ds_config, batch_size)
    base_bytes = _status_bytes("VmRSS")
    write_run(folder / "run", recipe, ds_config)
    trainer = Trainer(recipe, ds_config, corpus, engine, folder / "run")
    step_s, tokens = _timed_steps(trainer)
    figures = Measured(
        step_s=median(step_s),
        steps=len(step_s),
        tokens_per_s=sum(tokens) / sum(step_s),
        encoded_texts_per_s=_encoding_speed(trainer),
        base_bytes=base_bytes,
        peak_bytes=_status_bytes("VmHWM"),
    )
    trainer.monitor.close()
    engine.close()
    return figures


def _only_steps(recipe: Recipe, steps: int) -> Recipe:
    return recipe.model_copy(
        update={
            "classifier": recipe.classifier.model_copy(update={"init": "xavier"}),
            "train": recipe.train.model_copy(update={"max_steps": steps}),
        }
    )


def _timed_steps(trainer: Trainer) -> tuple[list[float], list[int]]:
    """Returns the seconds and tokens of each of a trainer's steps but the first."""
    trainer.planner = with_random_shortlists(trainer.planner, trainer.corpus, trainer.recipe)
    seconds, tokens = [], []
    with Prefetcher(trainer.make_batch, 0, trainer.total_steps) as batches:
        for _ in range(trainer.total_steps):
            start = perf_counter()
            batch = next(batches).to(trainer.device)
            # Waits for the device: the losses come back as numbers.
            trainer.train_step(batch, StepTimer(trainer.device, synchronize=False), batches.peek())
            seconds.append(perf_counter() - start)
            tokens.append(batch.num_tokens)
            trainer.step += 1
    return seconds[1:] or seconds, tokens[1:] or tokens


def _encoding_speed(trainer: Trainer) -> float:
    """Returns the queries encoded in a second, of one block as mining cuts it."""
    corpus, ids = trainer.corpus, trainer.train_ids[:BLOCK]
    start = perf_counter()
    (vectors,) = embed(trainer.model, corpus.queries["train"], ids, ("de",), corpus.pad_token_id)
    vectors.sum().item()  # waits for the device
    return len(ids) / (perf_counter() - start)


def _status_bytes(field: str) -> int:
    """Returns a field of this process's memory status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _main() -> None:
    folder = Path(sys.argv[1])
    (folder / "result.json").write_text(json.dumps(asdict(take_steps(folder))))


if __name__ == "__main__":
    sys.exit(exit_with_message(_main))
