"""Bytes of disk that a run takes: checkpoints, what mining finds, logs.

A new checkpoint is complete before the oldest is removed, so one more than `checkpoint.keep` has to
fit. What was mined is kept as long as a kept checkpoint may need it.

Shape legend: N train queries, L labels, D width, K shortlist length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from unidec_ds.assembly import table_placement
from unidec_ds.config import Recipe
from unidec_ds.ds_config import DsConfig
from unidec_ds.mining.mine import is_exact
from unidec_ds.preflight.memory import table_bytes
from unidec_ds.preflight.tracing import ModelCost
from unidec_ds.preflight.workload import Workload

_LOG_BYTES_A_STEP = 2_600  # a line of metrics.jsonl, and TensorBoard's some twenty scalars
_PROJECTOR_BYTES = 8  # per label and dimension, as text


@dataclass(frozen=True)
class DiskPart:
    """One use of disk space by all ranks together."""

    where: Literal["run", "nvme"]
    """The run directory, or `nvme_path`."""
    name: str
    num_bytes: int


def checkpoint_bytes(recipe: Recipe, num_labels: int, cost: ModelCost, world_size: int) -> int:
    """Returns the bytes of one checkpoint's tensors; headers and manifest add some kilobytes."""
    label_bytes = recipe.classifier.bytes_per_label(cost.width)
    encoder = 4 * (cost.num_parameters + 2 * cost.num_trainable)
    return encoder + num_labels * label_bytes + 8 * world_size


def num_checkpoints(recipe: Recipe, total_steps: int, steps_per_epoch: int) -> int:
    """Returns how many checkpoints there are at once, the one being written included."""
    config = recipe.checkpoint
    written = -(-total_steps // config.every_steps) if config.every_steps else 1
    if config.keep_best:  # at most one more for each evaluation
        written += -(-total_steps // steps_per_epoch) // recipe.evaluation.every_epochs
    return min(written, config.keep + 1 + config.keep_best)


def predict_disk(
    recipe: Recipe, ds_config: DsConfig, workload: Workload, cost: ModelCost, device_type: str
) -> list[DiskPart]:
    """Returns the parts of the disk space that a run takes at most at once."""
    sizes = workload.sizes
    copies = num_checkpoints(recipe, workload.total_steps, workload.steps_per_epoch)
    one = checkpoint_bytes(recipe, sizes.num_labels, cost, workload.world_size)
    projected = min(recipe.evaluation.projector_labels, sizes.num_labels)
    logs = _LOG_BYTES_A_STEP * (workload.total_steps // recipe.train.log_every_steps)
    logs += 16 * sizes.num_labels + _PROJECTOR_BYTES * projected * cost.width
    parts = [
        DiskPart("run", f"checkpoints, {copies} of {one:,} bytes", copies * one),
        *_mining(recipe, workload, cost, device_type),
        DiskPart("run", "logs, TensorBoard, label digests", logs),
    ]
    if table_placement(ds_config).kind == "nvme":
        shard = table_bytes(recipe, sizes.num_labels, cost.width, workload.world_size)
        parts.append(DiskPart("nvme", "classifier table, one rank's", shard))
    return [part for part in parts if part.num_bytes]


def folder_bytes(folder: Path) -> int:
    """Returns what the files under a folder take; 0 if it is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _mining(
    recipe: Recipe, workload: Workload, cost: ModelCost, device_type: str
) -> Iterator[DiskPart]:
    sizes, config, kept = workload.sizes, recipe.mining, workload.num_minings
    if not kept:
        return
    if not recipe.checkpoint.keep_best:  # the best may be of any epoch, and needs all from there
        spanned = recipe.checkpoint.keep * recipe.checkpoint.every_steps / workload.steps_per_epoch
        kept = min(kept, 2 + int(spanned / config.every_epochs))
    one = 4 * sizes.train_queries * config.shortlist_size
    if recipe.batches.kind == "clustered":
        one += 4 * sizes.trained_queries
    yield DiskPart("run", f"shortlists and clusters of {kept} minings", kept * one)
    if config.source == "cached":
        texts = sizes.train_queries + sizes.num_labels
        yield DiskPart("run", "vectors kept for mining", texts * (2 * cost.width + 4))
    queries_ND = torch.empty(1, device="cpu" if device_type == "cpu" else "meta")
    queries_ND = queries_ND.expand(sizes.trained_queries, cost.width)  # a shape: one number
    if not is_exact(config, queries_ND, sizes.num_labels):
        vectors = 4 * sizes.num_labels * cost.width
        yield DiskPart("run", "label vectors and index, while mining", vectors * 3 // 2)
