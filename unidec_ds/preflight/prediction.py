"""Everything that is known of a run before it starts, in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unidec_ds.config import Recipe
from unidec_ds.ds_config import DsConfig
from unidec_ds.preflight.disk import DiskPart, predict_disk
from unidec_ds.preflight.memory import Part, predict_memory
from unidec_ds.preflight.tracing import ModelCost, trace_model
from unidec_ds.preflight.workload import Workload

WorkloadOf = Callable[[Recipe, int], Workload]
"""What there is to do with a recipe at a world size: a corpus's or that of given sizes."""


@dataclass(frozen=True)
class Prediction:
    """What one run will take."""

    recipe: Recipe
    ds_config: DsConfig
    device_type: str
    """"cpu" or "cuda"."""
    workload: Workload
    cost: ModelCost
    memory: list[Part]
    """Of one rank."""
    disk: list[DiskPart]
    """Of all ranks together."""


def predict(
    recipe: Recipe,
    ds_config: DsConfig,
    workload_of: WorkloadOf,
    *,
    world_size: int,
    device_type: str,
    cost: ModelCost | None = None,
) -> Prediction:
    """Returns the prediction; about a second, and no more memory than a few batches of token ids.

    Args:
        recipe: the run's.
        ds_config: the run's.
        workload_of: makes the workload.
        world_size: number of ranks.
        device_type: "cpu" or "cuda".
        cost: of the same encoder, heads, precision and device, where that is known already.

    Raises:
        UserError: the encoder's configuration cannot be loaded.
        UntraceableError: it can, but does not run on the meta device.
    """
    workload = workload_of(recipe, world_size)
    cost = cost or trace_model(recipe, ds_config, device_type)
    return Prediction(
        recipe=recipe,
        ds_config=ds_config,
        device_type=device_type,
        workload=workload,
        cost=cost,
        memory=predict_memory(recipe, ds_config, workload, cost, device_type),
        disk=predict_disk(recipe, ds_config, workload, cost, device_type),
    )
