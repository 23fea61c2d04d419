"""The world size is not part of the method: every loss, pool and ZeRO stage on 1, 2 and 3 ranks.

A case takes 20 real steps of the trainer; all cases of a world size share one process group. Mined
negatives and clusters are discrete: what one rank has mined is supplied to the other world sizes,
and of bitwise equal weights (one checkpoint) they must be the same, and so must every evaluation.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from ranks import run_ranks
from tiny import make_inputs, write_recipe_file
from training import assert_same_weights, make_trainer

from unidec_ds.config import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.kernel]

NUM_LABELS, STEPS = 60, 20
KINDS = ("softmax", "decoupled", "balanced", "bce")
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
STAGES = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero1_offload": {"stage": 1, **OFFLOAD},
    "zero2": {"stage": 2},
    "zero2_offload": {"stage": 2, **OFFLOAD},
}
MINED = "mined"


class Case(NamedTuple):
    """What a case trains, and how DeepSpeed holds the encoder."""

    stage: str
    sections: dict[str, dict[str, Any]]


def objectives() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every loss in each head, with l2q and pool on and off; every pair of losses once."""
    settings = list(itertools.product((True, False), ("psl", "all")))
    for (i, de), (j, (l2q, pool)) in itertools.product(enumerate(KINDS), enumerate(settings)):
        classifier = KINDS[(i + j) % len(KINDS)]
        name = f"{de}-{classifier}-{pool}{'-l2q' if l2q else ''}"
        yield name, {"de": de, "classifier": classifier, "pool": pool, "l2q": l2q}


def sections_of(recipe: str) -> dict[str, dict[str, Any]]:
    """Returns what a rival's recipe says of losses, pool and rows, these in fp32."""
    content = load_recipe(recipe).as_yaml_object()
    classifier = {**content["classifier"], "format": "fp32"}
    return {"objective": content["objective"], "pool": content["pool"], "classifier": classifier}


def cases() -> dict[str, Case]:
    of_objectives = {
        name: Case(stage, {"objective": objective})
        for stage, (name, objective) in zip(itertools.cycle(STAGES), objectives(), strict=False)
    }
    mean = {"de": "bce", "classifier": "bce", "bce_reduction": "mean", "weight_de": 0.3}
    return {
        **{stage: Case(stage, {}) for stage in STAGES},
        **of_objectives,
        **{
            rival: Case(stage, sections_of(f"{rival}-lf-wordnet-verbs-9k"))
            for rival, stage in zip(("pol", "pal", "dexml", "renee"), STAGES, strict=False)
        },
        "classifier_by_sgd": Case(
            "zero1_offload", {"objective": {"de": "none"}, "classifier": {"optimizer": "sgd"}}
        ),
        "dropout_cosine_mean": Case(
            "zero2_offload",
            {
                "model": {"head_dropout": 0.3, "row_dropout": 0.2},
                "classifier": {"init": "label_text"},
                "objective": mean,
            },
        ),
        MINED: Case(
            "zero2_offload",
            {"mining": {"start_epoch": 1, "every_epochs": 1}, "batches": {"kind": "clustered"}},
        ),
    }


CASES = cases()


class Judged(NamedTuple):
    """What the ranks make of one checkpoint; predictions on rank 0 only."""

    metrics: dict[str, dict[str, float]]
    predictions: dict[str, tuple[Any, Any]]
    weight: Any
    shortlists: Any
    clusters: Any


def train_cases(folder: str) -> tuple[dict[str, dict[str, Any]], Judged]:
    """Trains every case, then judges what one rank has saved."""
    inputs = Path(folder)
    return {name: train_case(inputs, name) for name in CASES}, judge(inputs)


def train_case(inputs: Path, name: str) -> dict[str, Any]:
    from unidec_ds import comm
    from unidec_ds.monitor import StepTimer

    trainer = trainer_of(inputs, name, name)
    timer = StepTimer(trainer.device, synchronize=False)
    losses, hard_negatives = [], []
    for step in range(STEPS):
        if name == MINED and step and step % trainer.planner.steps_per_epoch == 0:
            trainer.planner = with_supplied_mining(trainer, inputs / "supplied")
        batch = trainer.make_batch(step)
        losses.append(trainer.train_step(batch, timer).losses["loss"])
        hard_negatives.append(batch.plan.num_hard_negatives)
        trainer.step += 1
    if name == MINED and comm.world_size() == 1:
        trainer.saver.save(STEPS)
    trainer.monitor.close()
    return {
        "losses": losses,
        "hard_negatives": hard_negatives,
        "state": trainer.engine.state(),
        "rows": trainer.table.state(),
    }


def with_supplied_mining(trainer: Any, supplied: Path) -> Any:
    """Mines on one rank and keeps the files; any more ranks get those instead of mining."""
    from unidec_ds import comm

    epoch = trainer.step // trainer.planner.steps_per_epoch
    if comm.world_size() == 1:
        planner = trainer.miner.refresh(trainer.planner, epoch, trainer.step)
        shutil.copytree(trainer.run / "mining", supplied, dirs_exist_ok=True)
        return planner
    return trainer.planner.with_mined(*open_mining(supplied, epoch))


def judge(inputs: Path) -> Judged:
    """Evaluates and mines with the weights that one rank has saved; leaves the process group."""
    from unidec_ds import checkpoint

    saved = checkpoint.latest(inputs / f"{MINED}_1")
    trainer = trainer_of(inputs, MINED, "judged", saved)
    evaluation, weight = trainer.evaluate("test"), trainer.tune_unified()
    steps_per_epoch = trainer.planner.steps_per_epoch
    epoch = 1 + STEPS // steps_per_epoch
    trainer.miner.refresh(trainer.planner, epoch, epoch * steps_per_epoch)
    mined = open_mining(trainer.run / "mining", epoch)
    trainer.monitor.close()
    trainer.engine.close()
    predictions = {
        view: (found.label_ids, found.scores) for view, found in evaluation.predictions.items()
    }
    return Judged(evaluation.metrics, predictions, weight, *mined)


def trainer_of(inputs: Path, name: str, run_name: str, resume_from: Path | None = None) -> Any:
    from unidec_ds.engine import launched_world_size

    recipe_file, ds_config_file = inputs / f"{name}.yaml", inputs / f"{CASES[name].stage}.json"
    run = inputs / f"{run_name}_{launched_world_size()}"
    return make_trainer(recipe_file, ds_config_file, run, resume_from)


def open_mining(folder: Path, epoch: int) -> tuple[Any, Any]:
    from unidec_ds.mining.mined import open_mined

    mined = open_mined(folder, epoch)
    return np.array(mined.shortlists), np.array(mined.clusters)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a function that gives every rank's results at a world size."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=1)
    for stage, zero in STAGES.items():
        config = {"zero_optimization": zero, "gradient_clipping": 1.0}
        (folder / f"{stage}.json").write_text(json.dumps(config))
    for name, case in CASES.items():
        chunk = {} if name in (*STAGES, MINED) else {"encoder_chunk": 0}  # faster
        sections = {**case.sections, "train": {"max_steps": STEPS, **chunk}}
        write_recipe_file(folder, f"{name}.yaml", **sections)

    @cache
    def at(world_size: int) -> list[tuple[dict[str, dict[str, Any]], Judged]]:
        if world_size > 1:
            at(1)  # they need what it has mined and saved
        return run_ranks(world_size, train_cases, str(folder), join=False)

    return at


def results_of(trained, world_size: int, name: str) -> list[dict[str, Any]]:
    return [cases[name] for cases, _ in trained(world_size)]


def assert_same_training(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one[0]["losses"]) == STEPS
    assert other[0]["losses"] == pytest.approx(one[0]["losses"], rel=1e-4)
    assert_same_weights(one, other, NUM_LABELS)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_any_world_size_trains_the_same_model(trained, name, world_size):
    one, many = results_of(trained, 1, name), results_of(trained, world_size, name)
    assert_same_training(one, many)
    for rank in many[1:]:
        assert rank["losses"] == many[0]["losses"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_any_zero_stage_trains_the_same_model_and_every_parameter_moves(trained, stage, world_size):
    reference, other = results_of(trained, 1, "zero0"), results_of(trained, world_size, stage)
    assert_same_training(reference, other)
    state = other[0]["state"]
    weights = [name for name in state if "exp_avg" not in name and "key.bias" not in name]
    assert len(weights) == 24
    for name in weights:
        assert state[f"{name}.exp_avg"].any(), name


def test_the_cases_are_many_and_different(trained):
    """Each loss of each head meets both pools with l2q on and off; each pair of losses meets."""
    found = [objective for _, objective in objectives()]
    for head in ("de", "classifier"):
        assert len({(o[head], o["pool"], o["l2q"]) for o in found}) == len(found) == 16
    assert len({(o["de"], o["classifier"]) for o in found}) == 16
    assert {CASES[name].stage for name, _ in objectives()} == set(STAGES)
    others = [name for name in CASES if name not in STAGES]
    assert len({tuple(results_of(trained, 1, name)[0]["losses"]) for name in others}) == len(others)


@pytest.mark.parametrize("world_size", [2, 3])
def test_with_what_one_rank_mined_the_curve_is_the_same_after_every_refresh(trained, world_size):
    one, many = results_of(trained, 1, MINED)[0], results_of(trained, world_size, MINED)[0]
    assert one["hard_negatives"] == many["hard_negatives"]
    assert not any(one["hard_negatives"][:7])
    assert all(one["hard_negatives"][7:])
    unmined = results_of(trained, 1, "zero2_offload")[0]["losses"]
    assert one["losses"][:7] == unmined[:7]
    assert one["losses"][7:] != pytest.approx(unmined[7:], rel=1e-2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_checkpoint_scores_and_mines_bitwise_the_same_at_any_world_size(trained, world_size):
    (_, one), *_ = trained(1)
    (_, first), *others = trained(world_size)
    assert one.metrics.keys() == {"de", "classifier", "unified"}
    for judged in (first, *(judged for _, judged in others)):
        assert judged.metrics == one.metrics
        assert judged.weight == one.weight
        np.testing.assert_array_equal(judged.shortlists, one.shortlists)
        np.testing.assert_array_equal(judged.clusters, one.clusters)
    for view, (label_ids, scores) in one.predictions.items():
        np.testing.assert_array_equal(first.predictions[view][0], label_ids)
        np.testing.assert_array_equal(first.predictions[view][1], scores)
    assert (one.shortlists >= 0).any()
    assert len(set(one.clusters)) > 1
    assert np.isfinite(one.predictions["unified"][1]).any()
