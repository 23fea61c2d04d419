"""`unidec-ds plan`: from the command line's values to the page."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from unidec_ds.config import Recipe, load_recipe
from unidec_ds.data.prepare import resolve_corpus
from unidec_ds.ds_config import load_ds_config
from unidec_ds.encoders import check_encoder
from unidec_ds.errors import UserError
from unidec_ds.preflight.fits import Room, needs, room_here
from unidec_ds.preflight.measure import Measured, measure
from unidec_ds.preflight.plan import as_json, as_text, make_plan
from unidec_ds.preflight.prediction import Prediction, WorkloadOf, predict
from unidec_ds.preflight.workload import corpus_workload, given_sizes, sizes_workload
from unidec_ds.run import default_run


@dataclass(frozen=True)
class PlanRequest:
    """What `unidec-ds plan` was asked for."""

    recipe: str
    ds_config: Path
    overrides: list[str] = field(default_factory=list)
    world_size: int = 1
    ranks_per_machine: int | None = None
    """None: all ranks share one machine."""
    labels: int | None = None
    """With `queries`, stands in for a corpus; None reads the recipe's."""
    queries: int | None = None
    test_queries: int = 0
    positives: float = 5.0
    query_tokens: float | None = None
    label_tokens: float | None = None
    device: str | None = None
    """"cpu" or "cuda"; None: what is here."""
    host_gib: float | None = None
    """Memory of the machine to plan for; None: this one's, as it is free now."""
    device_gib: float | None = None
    measured_steps: int = 0
    json_file: Path | None = None


def plan_run(request: PlanRequest) -> str:
    """Returns the page, and writes the JSON if that is asked for.

    Raises:
        UserError: an option, the recipe, the ds_config or the corpus is wrong.
    """
    _check(request)
    recipe = load_recipe(request.recipe, request.overrides)
    if request.world_size > recipe.train.batch_size:
        raise UserError(
            f"--world-size: found {request.world_size}; needs at most train.batch_size, "
            f"{recipe.train.batch_size}: every rank has a query of each step"
        )
    ds_config = load_ds_config(
        request.ds_config, batch_size=recipe.train.batch_size, world_size=request.world_size
    )
    check_encoder(recipe.encoder.name)
    device_here = "cuda" if torch.cuda.is_available() else "cpu"
    device_type = request.device or device_here
    workload_of = _workload_of(request, recipe)
    prediction = predict(
        recipe, ds_config, workload_of, world_size=request.world_size, device_type=device_type
    )
    here = room_here(default_run(request.recipe), _ranks(request), num_running=1)
    room = _room(request, here, is_here=device_type == device_here)
    no_time_because = _no_time_because(request, prediction, here, device_here)
    measured: Measured | None = None
    if not no_time_because:
        measured = measure(recipe, request.ds_config, request.measured_steps)
    plan = make_plan(prediction, room, workload_of, measured, no_time_because)
    if request.json_file is not None:
        text = json.dumps(as_json(plan), indent=2) + "\n"
        request.json_file.write_text(text, encoding="utf-8")
    title = f"plan for {request.recipe} with {request.ds_config}"
    return f"{title}\n{as_text(plan)}"


def _check(request: PlanRequest) -> None:
    if (request.labels is None) != (request.queries is None):
        raise UserError("--labels and --queries: give both, or neither and a corpus")
    ranks = request.ranks_per_machine
    for option, value, least in (
        ("--world-size", request.world_size, 1),
        ("--ranks-per-machine", request.world_size if ranks is None else ranks, 1),
        ("--measure", request.measured_steps, 0),
    ):
        if value < least:
            raise UserError(f"{option}: found {value}; needs at least {least}")
    if ranks is not None and ranks > request.world_size:
        raise UserError(
            f"--ranks-per-machine: found {ranks}; needs at most the {request.world_size} ranks of "
            "--world-size"
        )


def _workload_of(request: PlanRequest, recipe: Recipe) -> WorkloadOf:
    if request.labels is None or request.queries is None:
        corpus = resolve_corpus(recipe.corpus, recipe.encoder.name, recipe.encoder.max_length)
        return lambda recipe, world_size: corpus_workload(corpus, recipe, world_size)
    sizes = given_sizes(
        recipe,
        labels=request.labels,
        queries=request.queries,
        test_queries=request.test_queries,
        positives=request.positives,
        query_tokens=request.query_tokens,
        label_tokens=request.label_tokens,
    )
    return lambda recipe, world_size: sizes_workload(sizes, recipe, world_size)


def _ranks(request: PlanRequest) -> int:
    """Returns how many ranks share the machine."""
    return request.ranks_per_machine or request.world_size


def _room(request: PlanRequest, here: Room, is_here: bool) -> Room:
    """Returns what the machine has: this one, or the one that is described."""
    if request.host_gib is None and request.device_gib is None and is_here:
        return here
    return Room(
        host_bytes=None if request.host_gib is None else int(request.host_gib * 2**30),
        device_bytes=None if request.device_gib is None else int(request.device_gib * 2**30),
        run_disk_bytes=None,
        ranks=here.ranks,
    )


def _no_time_because(
    request: PlanRequest, prediction: Prediction, here: Room, device_here: str
) -> str:
    """Returns why no time can be measured; "" if it can."""
    if request.measured_steps == 0:
        return "--measure 0"
    if request.labels is not None:
        return "there is no corpus yet"
    if prediction.device_type != device_here:
        return f"this machine has no {prediction.device_type}"
    if request.world_size > 1:
        return "only one rank is measured; use --world-size 1"
    # Steps leave nothing on the disk.
    if any(need.cannot_fit for need in needs(prediction, here) if need.place != "disk"):
        return "it does not fit this machine"
    return ""
