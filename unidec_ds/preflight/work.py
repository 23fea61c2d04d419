"""What one rank computes and moves in a step, a mining and an evaluation.

FLOPs are those of matrix products, a multiply-add counted as two, as torch's own counter has them:
the backward pass of a product is two of its size, recomputing a chunk one more forward pass.
Traffic is what has to cross a link, once each way; caches and overlap are not its business.

Shape legend: B queries of the global batch, P pool labels of this rank, D width, N queries, L
labels, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from unidec_ds.assembly import table_placement, trained_views
from unidec_ds.config import Recipe
from unidec_ds.ds_config import DsConfig
from unidec_ds.preflight.tracing import ModelCost
from unidec_ds.preflight.workload import StepShape, Workload

Link = Literal["device link", "host memory", "network"]
_FP32 = 4


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one rank's step, by what they are for."""

    encoder: int
    """Forward, backward and, with recompute, forward again; padding counted."""
    heads: int
    loss: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.encoder + self.heads + self.loss


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank moves in a step over one link."""

    link: Link
    """Between host and accelerator, between the host's memory and its cores, between ranks."""
    name: str
    num_bytes: int


def step_flops(recipe: Recipe, step: StepShape, cost: ModelCost) -> StepFlops:
    """Returns the FLOPs of one rank's step."""
    recomputes = recipe.train.recompute and recipe.train.encoder_chunk > 0
    forward = sum(cost.encoder_flops(*chunk) for chunk in step.chunks)
    heads = recipe.objective.head_weights
    head = 2 * cost.hidden_size * cost.width
    texts = step.own_queries + step.own_label_texts
    head_flops = head * texts * (3 if "de" in heads else 1)
    head_flops += head * step.own_queries * (3 if "classifier" in heads else 1)
    if recipe.model.head_dropout:
        head_flops += head * texts  # embeddings without dropout, for mining
    loss = 0
    for name in heads:
        labels = step.own_label_texts if name == "de" else step.own_labels
        product = 2 * step.batch_size * labels * cost.width
        kept = step.batch_size * labels * _FP32 <= recipe.train.loss_block_bytes
        is_bce = getattr(recipe.objective, name) == "bce"
        loss += product * (3 if kept or is_bce else 4)
    return StepFlops((4 if recomputes else 3) * forward, head_flops, loss)


def mining_flops(workload: Workload, cost: ModelCost) -> int:
    """Returns the FLOPs of one mining, all ranks together, by exact search of all texts."""
    sizes = workload.sizes
    encoded = _encode_flops(cost, sizes.trained_queries, sizes.query_tokens)
    encoded += _encode_flops(cost, sizes.labels_with_text, sizes.label_tokens)
    return encoded + 2 * sizes.trained_queries * sizes.num_labels * cost.width


def evaluation_flops(recipe: Recipe, workload: Workload, cost: ModelCost) -> int:
    """Returns the FLOPs of the final evaluation, all ranks together."""
    sizes = workload.sizes
    queries = sizes.evaluated_queries(recipe)
    encoded = _encode_flops(cost, queries, sizes.query_tokens)
    encoded += _encode_flops(cost, sizes.labels_with_text, sizes.label_tokens)
    heads = sum(view != "unified" for view in trained_views(recipe))
    return encoded + heads * 2 * queries * sizes.num_labels * cost.width


def step_traffic(
    recipe: Recipe,
    ds_config: DsConfig,
    step: StepShape,
    cost: ModelCost,
    *,
    world_size: int,
    device_type: str,
) -> list[Traffic]:
    """Returns what one rank moves in a step; the same moves in every step, some of 0 bytes."""
    return [
        *_row_traffic(recipe, ds_config, step, cost, device_type),
        *_optimizer_traffic(ds_config, cost, world_size, device_type),
        *_network_traffic(recipe, ds_config, step, cost, world_size),
    ]


def _row_traffic(
    recipe: Recipe, ds_config: DsConfig, step: StepShape, cost: ModelCost, device_type: str
) -> Iterator[Traffic]:
    if "classifier" not in recipe.objective.head_weights:
        return
    rows = step.own_labels * cost.width * _FP32
    on_host = table_placement(ds_config).kind != "device" or device_type == "cpu"
    if not on_host:
        return
    if device_type != "cpu":
        yield Traffic("device link", "rows to the device, their gradients back", 2 * rows)
    label_bytes = recipe.classifier.bytes_per_label(cost.width)
    # Stored columns are read and written, gradients read: in fp32 28·P·D bytes.
    updated = 2 * step.own_labels * label_bytes + rows
    yield Traffic("host memory", "row update", updated)


def _optimizer_traffic(
    ds_config: DsConfig, cost: ModelCost, world_size: int, device_type: str
) -> Iterator[Traffic]:
    own = -(-cost.num_trainable // world_size) if ds_config.zero_stage else cost.num_trainable
    offloaded = ds_config.offload.get("device", "none") != "none"
    if offloaded and device_type != "cpu":
        moved = 2 * cost.weight_bytes * own
        yield Traffic("device link", "gradients to the host, weights back", moved)
    if offloaded or device_type == "cpu":
        yield Traffic("host memory", "AdamW of encoder and heads", 28 * own)


def _network_traffic(
    recipe: Recipe, ds_config: DsConfig, step: StepShape, cost: ModelCost, world_size: int
) -> Iterator[Traffic]:
    """Yields what a rank sends, by ring collectives."""
    if world_size == 1:
        return
    others = (world_size - 1) / world_size
    gathered = 2 * step.batch_size * 2 * cost.width * _FP32
    yield Traffic("network", "query embeddings, and their gradients", round(others * gathered))
    # A log-sum-exp of each query and softmax head is gathered, its gradient all-reduced.
    kinds = [getattr(recipe.objective, name) for name in recipe.objective.head_weights]
    softmax_heads = sum(kind != "bce" for kind in kinds)
    floats = softmax_heads * step.batch_size * _FP32 * (world_size - 1 + 2 * others)
    yield Traffic("network", "log-sum-exps, and their gradients", round(floats))
    gradients = 2 * others * cost.weight_bytes * cost.num_trainable
    yield Traffic("network", "gradients and weights of encoder and heads", round(gradients))


def _encode_flops(cost: ModelCost, num_texts: int, mean_tokens: float) -> int:
    return num_texts * cost.forward_flops.at(max(1, round(mean_tokens)))
