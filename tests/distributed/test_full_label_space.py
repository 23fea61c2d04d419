"""The pool of all labels: PSL = `pool: all`, streamed = plain, row-sparse = dense, on real ranks.

And what a step communicates depends neither on the pool nor on the number of labels.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import DS_CONFIG, make_inputs, make_raw_corpus, write_recipe_file
from training import whole_rows

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.append(str(BENCH))  # child processes inherit it

pytestmark = [pytest.mark.slow, pytest.mark.kernel]

NUM_LABELS, MANY_LABELS, STEPS = 60, 150, 4
SMALL_BLOCKS = {"loss_block_bytes": 1 << 20}
ALL = {"pool": "all"}
BCE = {**ALL, "classifier": "bce", "de": "decoupled", "weight_de": 0.3}
RENEE = {**ALL, "classifier": "bce", "de": "none", "l2q": False, "temperature": 1.0}
NO_ROW_DECAY = {"encoder_lr": 1e-3, "head_lr": 2e-3, "row_lr": 1e-2, "row_weight_decay": 0.0}
SGD = {"format": "fp32", "optimizer": "sgd", "momentum": 0.9}
CASES: dict[str, dict[str, Any]] = {
    "psl": {},
    "small_pool": {"pool": {"size": 14}},
    "psl_of_all": {
        "pool": {"size": 0, "num_hard_negatives": NUM_LABELS},
        "optimizer": NO_ROW_DECAY,
    },
    "all": {"objective": ALL, "optimizer": NO_ROW_DECAY},
    "dexml": {"objective": {**ALL, "de": "decoupled", "classifier": "none", "l2q": False}},
    "joint": {"objective": BCE},
    "joint_streamed": {"objective": BCE, "classifier": {"streamed": True}},
    "renee": {"objective": RENEE, "classifier": SGD},
    "renee_streamed": {"objective": RENEE, "classifier": {**SGD, "streamed": True}},
    "all_of_many": {"objective": ALL, "corpus": "many"},
    "psl_of_many": {"corpus": "many"},
}


class Trained(NamedTuple):
    """What one rank has after the steps of one case."""

    losses: list[float]
    state: dict[str, torch.Tensor]
    rows: torch.Tensor
    comm_bytes: list[dict[str, int]]
    pool_sizes: list[int]
    batch_sizes: list[int]
    error: str = ""


def train_cases(folder: str) -> dict[str, Trained]:
    """Trains every case and the dense reference, one after another in one process group."""
    from collectives import CollectiveCounter
    from dense_offload import DenseOffload

    from unidec_ds import comm
    from unidec_ds.config import load_recipe
    from unidec_ds.engine import Engine, start_engine
    from unidec_ds.job import prepare_job
    from unidec_ds.monitor import StepTimer
    from unidec_ds.trainer import Trainer

    trained: dict[str, Trained] = {}
    with CollectiveCounter() as counter:
        first = None
        for name in [*CASES, "dense"]:
            recipe = load_recipe(f"{folder}/{'all' if name == 'dense' else name}.yaml")
            run = Path(folder) / f"{name}_{comm.world_size()}"
            job = prepare_job(recipe, Path(folder) / "ds_config.json", run)
            if first is None:
                first = start_engine(job.ds_config, recipe.train.batch_size)
            engine = Engine(first._accelerator, job.ds_config)
            trainer: Any
            if name == "dense":
                trainer = DenseOffload(recipe, job.corpus, engine)
                make_batch = trainer.make_batch
            else:
                trainer = Trainer(recipe, job.ds_config, job.corpus, engine, run)
                make_batch = trainer.make_batch
            if name == "psl_of_all":
                num_queries = job.corpus.positives["train"].num_rows
                every = np.tile(np.arange(NUM_LABELS, dtype=np.int32), (num_queries, 1))
                trainer.planner = trainer.planner.with_mined(every, None)
            made = Trained([], {}, torch.empty(0), [], [], [])
            for step in range(STEPS):
                batch = make_batch(step)
                before = counter.snapshot()
                if name == "dense":
                    made.losses.append(trainer.train_step(batch))
                else:
                    result = trainer.train_step(batch, StepTimer(engine.device, synchronize=False))
                    made.losses.append(result.losses["loss"])
                    trainer.step += 1
                made.comm_bytes.append(counter.since(before))
                made.pool_sizes.append(len(batch.plan.label_ids))
                made.batch_sizes.append(len(batch.plan.query_ids))
            if name == "dense":
                state = {k.removeprefix("model."): v for k, v in weights(engine).items()}
                trained[name] = made._replace(state=state, rows=state.pop("rows"))
            else:
                rows = trainer.table.state()["rows"].clone()
                trained[name] = made._replace(state=weights(engine), rows=rows)
                if name == "renee_streamed":
                    error = step_on_a_bad_row(trainer, batch)
                    trained[name] = trained[name]._replace(error=error)
                trainer.monitor.close()
    assert first is not None
    first.close()
    return trained


def step_on_a_bad_row(trainer: Any, batch: Any) -> str:
    """Takes a step with an infinite row on the last rank alone; returns what stops it."""
    from unidec_ds import comm
    from unidec_ds.errors import NonFiniteError
    from unidec_ds.monitor import StepTimer

    if comm.rank() == comm.world_size() - 1:
        label = np.array([comm.rank()])
        trainer.table.write(label, torch.full((1, trainer.table.width), torch.inf))
    with pytest.raises(NonFiniteError) as error:
        trainer.train_step(batch, StepTimer(trainer.device, synchronize=False))
    return str(error.value)


def weights(engine) -> dict[str, torch.Tensor]:
    # The gradient of attention's key biases is zero; Adam normalises its noise.
    return {k: v for k, v in engine.state().items() if "exp_avg" not in k and "key.bias" not in k}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a function that gives every rank's results at a world size."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    make_raw_corpus(folder / "raw_many", num_labels=MANY_LABELS)
    # The dense reference's rows are in the engine and would be clipped with the encoder.
    unclipped = {key: value for key, value in DS_CONFIG.items() if key != "gradient_clipping"}
    (folder / "ds_config.json").write_text(json.dumps(unclipped))
    for name, sections in CASES.items():
        sections = dict(sections)
        if sections.get("corpus") == "many":
            paths = {"path": str(folder / "raw_many"), "prepared_dir": str(folder / "many")}
            sections["corpus"] = paths
        sections["train"] = {"max_steps": STEPS, **SMALL_BLOCKS}
        write_recipe_file(folder, f"{name}.yaml", **sections)

    @cache
    def at(world_size: int) -> list[dict[str, Trained]]:
        return run_ranks(world_size, train_cases, str(folder), join=False)

    return at


def assert_same(ranks: list[dict[str, Trained]], one: str, other: str) -> None:
    assert ranks[0][one].losses == pytest.approx(ranks[0][other].losses, rel=1e-5)
    for name, tensor in ranks[0][one].state.items():
        torch.testing.assert_close(
            tensor, ranks[0][other].state[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m
        )
    torch.testing.assert_close(rows_of(ranks, one), rows_of(ranks, other), rtol=1e-3, atol=1e-4)


def rows_of(ranks: list[dict[str, Trained]], name: str) -> torch.Tensor:
    if name == "dense":
        return ranks[0][name].rows
    return whole_rows([{"rows": {"rows": rank[name].rows}} for rank in ranks], NUM_LABELS)


@pytest.mark.parametrize("world_size", [1, 2])
def test_psl_whose_pool_holds_every_label_is_pool_all(trained, world_size):
    ranks = trained(world_size)
    assert ranks[0]["psl_of_all"].pool_sizes == [NUM_LABELS] * STEPS
    assert_same(ranks, "psl_of_all", "all")
    assert ranks[0]["psl"].losses != pytest.approx(ranks[0]["all"].losses, rel=1e-2)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("objective", ["joint", "renee"])
def test_streamed_training_is_the_plain_one(trained, world_size, objective):
    assert_same(trained(world_size), objective, f"{objective}_streamed")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_bad_row_of_one_rank_stops_a_streamed_step_on_every_rank(trained, world_size):
    for rank in trained(world_size):
        error = rank["renee_streamed"].error
        assert f"the loss of step {STEPS} is nan; some classifier rows were updated" in error
        assert "nothing was saved" in error


@pytest.mark.parametrize("world_size", [1, 2])
def test_with_all_labels_the_row_sparse_table_trains_as_dense_zero_offload(trained, world_size):
    assert_same(trained(world_size), "all", "dense")


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_objective_is_independent_of_the_world_size(trained, name):
    one, two = trained(1), trained(2)
    assert one[0][name].losses == pytest.approx(two[0][name].losses, rel=1e-4)
    for key, tensor in one[0][name].state.items():
        torch.testing.assert_close(tensor, two[0][name].state[key], rtol=1e-3, atol=2e-4)


def test_communication_depends_neither_on_the_pool_nor_on_the_number_of_labels(trained):
    from rival_costs import comm_bytes

    ranks = trained(2)
    same = ["psl", "small_pool", "psl_of_all", "all", "psl_of_many", "all_of_many"]
    sizes = {name: ranks[0][name].pool_sizes for name in same}
    assert max(sizes["small_pool"]) <= 14 < min(sizes["psl"]) <= 24
    assert sizes["all"] == [NUM_LABELS] * STEPS
    assert sizes["all_of_many"] == [MANY_LABELS] * STEPS
    full = {
        (name, step)
        for name in same
        for step in range(STEPS)
        if ranks[0][name].batch_sizes[step] == ranks[0]["all"].batch_sizes[0]
    }
    assert {name for name, _ in full} == set(same)  # the last batches may be smaller
    found = {tuple(ranks[0][name].comm_bytes[step].items()) for name, step in full}
    assert len(found) == 1
    batch, width, padded = ranks[0]["all"].batch_sizes[0], 16, 12  # two ranks of at most 6
    assert batch == 11
    padding_bytes = 16 * (padded - batch) * width
    for name, system in (("all", "psl"), ("dexml", "dexml"), ("renee_streamed", "renee")):
        assert ranks[0][name].batch_sizes[0] == batch
        handed = ranks[0][name].comm_bytes[0]["unidec_ds"]
        assert handed == comm_bytes(batch, width, system) + padding_bytes
