"""Bytes of one rank, by place and by stage of a run.

A rank's memory is what it always holds and what its greediest stage (a step, an evaluation, a
mining, a checkpoint) needs on top; stages do not overlap, but for a checkpoint that is written
while steps go on, which counts among a step's parts. On a CPU, device and host are one.
Every part says how it is known: *exact* (shapes and dtypes), *traced* (`tracing`), *formula* (a
bound from the code it names), *measured* (on a CPU: the base memory, the heap's share), *assumed*.

DeepSpeed's part follows `deepspeed/runtime/zero/stage_1_and_2.py` of 0.19: see `_engine`.

Shape legend: B queries of the global batch, P pool labels of this rank, D width, N queries, L
labels, K kept, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from unidec_ds.assembly import table_placement, trained_views
from unidec_ds.classifier import partition
from unidec_ds.classifier.stream import block_size
from unidec_ds.config import Recipe
from unidec_ds.ds_config import DsConfig
from unidec_ds.embedding import BLOCK, chunk_size
from unidec_ds.evaluation import KS
from unidec_ds.mining.mine import label_block
from unidec_ds.preflight.tracing import ModelCost, chunk_working_bytes, heads_bytes
from unidec_ds.preflight.workload import Workload
from unidec_ds.search import query_block
from unidec_ds.unified import GRID

BASE_BYTES = {"cpu": 520 << 20, "cuda": 3 << 30}
"""Host memory of a rank before it has a model: Python, torch, DeepSpeed, transformers, datasets and
TensorBoard, their mapped libraries included. Measured on a CPU with the versions that
`scripts/bench/results/preflight.md` names; assumed for a CUDA process."""
BASE_NAME = "Python, torch, DeepSpeed"
CUDA_CONTEXT_BYTES = 512 << 20
"""What CUDA and its libraries take of an accelerator's memory; assumed."""

HEAP_SHARE = 0.08
"""What the C library's heap holds beyond a step's tensors, of their bytes, on a CPU: freed pieces
that the next batch, of other sizes, cannot use. 0.05 to 0.12 were measured."""

_STEPS_OF_A_SAVE = 10
"""Steps that are taken while a checkpoint is written in the background; assumed."""

_DEFAULT_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, elements
_FP32 = 4

Place = Literal["host", "device", "nvme"]
Stage = Literal["always", "step", "evaluation", "mining", "checkpoint"]
Origin = Literal["exact", "traced", "formula", "measured", "assumed"]


@dataclass(frozen=True)
class Part:
    """One use of memory by one rank."""

    place: Place
    """The host's memory, the accelerator's, or mapped files under nvme_path."""
    stage: Stage
    """When it is there."""
    name: str
    num_bytes: int
    origin: Origin
    """How it is known."""
    reclaimable: bool = False
    """Mapped from files: resident as long as there is room, so no reason not to fit."""


def predict_memory(
    recipe: Recipe, ds_config: DsConfig, workload: Workload, cost: ModelCost, device_type: str
) -> list[Part]:
    """Returns the parts of the memory of the rank that has most to do.

    Args:
        recipe: the run's.
        ds_config: the run's.
        workload: sizes and sample steps.
        cost: of `trace_model`, for the same device.
        device_type: "cpu" or "cuda".
    """
    parts = [
        *_always(recipe, ds_config, workload, cost, device_type),
        *_engine(ds_config, workload, cost, device_type),
        *_step(recipe, ds_config, workload, cost, device_type),
        *_evaluation(recipe, workload, cost, device_type),
        *_mining(recipe, workload, cost, device_type),
        *_checkpoint(recipe, ds_config, workload, cost, "checkpoint"),
        *_background_save(recipe, ds_config, workload, cost),
    ]
    if device_type == "cpu":
        tensors = sum(part.num_bytes for part in parts if part.stage == "step")
        lost = round(HEAP_SHARE * tensors)
        parts.append(Part("host", "step", "pieces the heap cannot use again", lost, "measured"))
        parts = [
            Part("host", p.stage, p.name, p.num_bytes, p.origin, p.reclaimable)
            if p.place == "device"
            else p
            for p in parts
        ]
    return [part for part in parts if part.num_bytes]


def peak_bytes(parts: list[Part], place: Place, *, with_reclaimable: bool) -> int:
    """Returns the most bytes at once in a place: what is always there and the greediest stage."""
    totals: dict[Stage, int] = {}
    for part in parts:
        if part.place == place and (with_reclaimable or not part.reclaimable):
            totals[part.stage] = totals.get(part.stage, 0) + part.num_bytes
    always = totals.pop("always", 0)
    return always + max(totals.values(), default=0)


def greediest_stage(parts: list[Part], place: Place) -> Stage:
    """Returns the stage that needs most on top of what is always there."""
    totals: dict[Stage, int] = {}
    for part in parts:
        if part.place == place and part.stage != "always" and not part.reclaimable:
            totals[part.stage] = totals.get(part.stage, 0) + part.num_bytes
    return max(totals, key=lambda stage: totals[stage]) if totals else "always"


def table_bytes(recipe: Recipe, num_labels: int, width: int, world_size: int) -> int:
    """Returns the bytes of the largest shard of the classifier table."""
    label_bytes = recipe.classifier.bytes_per_label(width)
    return partition.num_local_rows(num_labels, 0, world_size) * label_bytes


def _always(
    recipe: Recipe, ds_config: DsConfig, workload: Workload, cost: ModelCost, device_type: str
) -> Iterator[Part]:
    sizes, world_size = workload.sizes, workload.world_size
    known: Origin = "measured" if device_type == "cpu" else "assumed"
    yield Part("host", "always", BASE_NAME, BASE_BYTES[device_type], known)
    if device_type == "cuda":
        yield Part("device", "always", "CUDA context", CUDA_CONTEXT_BYTES, "assumed")
    yield Part("host", "always", "corpus, mapped", sizes.corpus_bytes, "exact", reclaimable=True)
    yield Part("host", "always", "query ids and their order", 32 * sizes.train_queries, "formula")
    if workload.num_minings and recipe.batches.kind == "clustered":
        name = "queries by cluster"
        yield Part("host", "always", name, 24 * sizes.train_queries, "formula")
    place: dict[str, Place] = {"cpu": "host", "nvme": "nvme", "device": "device"}
    yield Part(
        place[table_placement(ds_config).kind],
        "always",
        f"classifier table, {recipe.classifier.format}",
        table_bytes(recipe, sizes.num_labels, cost.width, world_size),
        "exact",
        reclaimable=table_placement(ds_config).kind == "nvme",
    )
    tokens = max(step.num_padded_tokens for step in workload.steps)
    yield Part("host", "always", "batches made ahead", 3 * 16 * tokens, "formula")
    if workload.num_minings and recipe.mining.source == "cached":
        texts = (sizes.train_queries + sizes.num_labels) // world_size
        kept = texts * (2 * cost.width + 4)
        yield Part("host", "always", "vectors kept for mining, mapped", kept, "exact", True)


def _engine(
    ds_config: DsConfig, workload: Workload, cost: ModelCost, device_type: str
) -> Iterator[Part]:
    """Yields weights, gradients and AdamW's state of encoder and heads.

    ZeRO 1 and 2 keep the weights flat in the engine's dtype, an fp32 copy of this rank's partition
    and both moments of it; offloaded, also the partition's gradient in fp32 and a buffer of the
    partition in the engine's dtype on the host, and one buffer of the largest parameter on either
    side. Gradients are reduced through one or two buckets of `reduce_bucket_size`: all of it on an
    accelerator, on a CPU only the pages that are touched. Stage 0 is plain AdamW, with bf16 on an
    fp32 copy of the weights.
    """
    zero = ds_config.content["zero_optimization"]
    trainable, weight_bytes = cost.num_trainable, cost.weight_bytes
    own = -(-trainable // workload.world_size) if ds_config.zero_stage else trainable
    offloaded = ds_config.offload.get("device", "none") != "none"
    beside: Place = "host" if offloaded else "device"
    yield Part("device", "always", "encoder and heads", weight_bytes * cost.num_parameters, "exact")
    if ds_config.zero_stage or ds_config.dtype == "bf16":
        yield Part(beside, "always", "their fp32 copy", _FP32 * own, "exact")
    yield Part(beside, "always", "their Adam moments", 2 * _FP32 * own, "exact")
    if offloaded:
        name = "their gradient and buffer, offloaded"
        largest = weight_bytes * cost.largest_parameter
        num_bytes = (_FP32 + weight_bytes) * own + largest
        yield Part("host", "always", name, num_bytes, "exact")
        yield Part("device", "always", "buffer of the largest parameter", largest, "exact")
    gradients = weight_bytes * trainable
    if not offloaded and ds_config.zero_stage:
        gradients += (weight_bytes + _FP32) * own  # this rank's partition, then in fp32
    yield Part("device", "step", "gradients", gradients, "formula")
    if ds_config.zero_stage and zero.get("contiguous_gradients", True):
        buckets = 2 if zero.get("overlap_comm") else 1
        elements = int(float(zero.get("reduce_bucket_size", _DEFAULT_BUCKET)))
        if device_type == "cpu":
            elements = min(elements, trainable)
        name = f"reduce_bucket_size, {buckets} buckets" if buckets > 1 else "reduce_bucket_size"
        yield Part("device", "step", name, buckets * weight_bytes * elements, "formula")


def _step(
    recipe: Recipe, ds_config: DsConfig, workload: Workload, cost: ModelCost, device_type: str
) -> Iterator[Part]:
    """Yields activations, embeddings, rows and logits of a step."""
    model, width = cost.model, cost.width
    recomputes = recipe.train.recompute and recipe.train.encoder_chunk > 0
    kept, largest = 0, (1, 1)
    for step in workload.steps:
        by_chunk = [cost.kept(*chunk) for chunk in step.chunks]
        if (total := max(by_chunk) if recomputes else sum(by_chunk)) > kept:
            kept, largest = total, max(step.chunks, key=lambda chunk: cost.kept(*chunk))
    what = "of one chunk" if recomputes else "of all texts"
    yield Part("device", "step", f"activations {what}", kept, "traced")
    working, _ = chunk_working_bytes(model, *largest)
    yield Part("device", "step", "activations being computed", working, "traced")
    if any(len(step.chunks) > 1 for step in workload.steps):
        # Autograd sums the chunks' gradients of a parameter: one more of them, and the sum.
        name = "gradients of the largest parameter"
        summed = 2 * cost.weight_bytes * cost.largest_parameter
        yield Part("device", "step", name, summed, "formula")

    own_queries = max(step.own_queries for step in workload.steps)
    own_texts = max(step.own_label_texts for step in workload.steps)
    own_labels = max(step.own_labels for step in workload.steps)
    batch_size = max(step.batch_size for step in workload.steps)
    pool_size = max(step.pool_size for step in workload.steps)
    name = "embeddings and heads, with gradients"
    yield Part("device", "step", name, heads_bytes(model, own_queries, own_texts), "traced")
    copies = 2 if workload.world_size == 1 else 4  # joined, and gathered; their gradients
    gathered = copies * batch_size * 2 * width * _FP32
    yield Part("device", "step", "query embeddings of all ranks", gathered, "formula")
    if recipe.model.head_dropout or recipe.model.row_dropout:
        whole = max(batch_size, pool_size) * width * _FP32
        yield Part("device", "step", "dropout mask, whole", whole, "exact")

    heads = recipe.objective.head_weights
    if "classifier" in heads:
        rows = own_labels
        if recipe.classifier.streamed:
            rows = min(rows, block_size(batch_size, width, recipe.train.loss_block_bytes))
        yield from _rows(recipe, ds_config, rows, width, device_type)
    block = min(recipe.train.loss_block_bytes, batch_size * own_labels * _FP32)
    blocks = 0
    for head in heads:
        loss = getattr(recipe.objective, head)
        fits = batch_size * own_labels * _FP32 <= recipe.train.loss_block_bytes
        blocks = max(blocks, 3) if loss == "bce" else blocks + fits
    # Kept ones, and those in hand: the gradient's, one a direction.
    yield Part("device", "step", "blocks of logits", (blocks + 2) * block, "formula")


def _rows(
    recipe: Recipe, ds_config: DsConfig, num_rows: int, width: int, device_type: str
) -> Iterator[Part]:
    """Yields the rows that are fetched at once, as `classifier.staging` holds them."""
    rows = num_rows * width * _FP32
    with_gradient = 2 * rows
    if recipe.model.row_dropout:
        with_gradient += 3 * rows  # the mask, the product and its gradient
    if recipe.objective.classifier_logits == "cosine":
        with_gradient += 2 * rows
    staged = rows * 5 // 4
    on_host = table_placement(ds_config).kind != "device"
    ahead = on_host and recipe.classifier.fetches_ahead(device_type)
    if device_type == "cpu":
        yield Part("host", "step", "rows and their gradient", with_gradient + rows // 4, "exact")
        yield Part("host", "step", "rows packed ahead", ahead * staged, "exact")
        return
    yield Part("device", "step", "rows and their gradient", with_gradient + ahead * rows, "exact")
    name = "rows packed, and their gradient"
    yield Part("host" if on_host else "device", "step", name, (2 + ahead) * staged, "exact")


def _evaluation(
    recipe: Recipe, workload: Workload, cost: ModelCost, device_type: str
) -> Iterator[Part]:
    """Yields what the greediest of a run's evaluations holds.

    There are up to three: of the validation queries after an epoch, of the same in every weight of
    the unified view, and the final one.
    """
    sizes, views = workload.sizes, len(trained_views(recipe))
    validation = recipe.evaluation.sampled(sizes.validation_queries)
    tunes = recipe.evaluation.tune_unified and validation and "unified" in trained_views(recipe)
    rounds = [(validation, views), (sizes.evaluated_queries(recipe), views + bool(tunes))]
    if tunes:
        rounds.append((validation, len(GRID)))
    found = [list(_search(recipe, workload, cost, device_type, *size)) for size in rounds]
    yield from max(found, key=lambda parts: sum(part.num_bytes for part in parts))


def _search(
    recipe: Recipe,
    workload: Workload,
    cost: ModelCost,
    device_type: str,
    queries: int,
    rankings: int,
) -> Iterator[Part]:
    """Yields query vectors, running best and blocks, as `evaluation.search_labels` holds them."""
    sizes, views = workload.sizes, trained_views(recipe)
    heads = sum(view != "unified" for view in views)
    copies = 1 if workload.world_size == 1 else 2  # once more while they are summed over ranks
    vectors = copies * queries * heads * cost.width * _FP32
    yield Part("device", "evaluation", "query vectors", vectors, "exact")
    entries = queries * max(KS)
    best = 8 * entries * rankings
    yield Part("device", "evaluation", "best labels so far", best, "exact")
    yield Part("device", "evaluation", "a view's best, in order", 32 * entries, "formula")
    predictions = 12 * entries * rankings
    yield Part("host", "evaluation", "predictions", predictions, "exact")
    true_pairs = queries * sizes.train_positives // max(sizes.train_queries, 1)
    yield Part("host", "evaluation", "scoring of true labels", 100 * true_pairs, "formula")
    yield from _forward(recipe, cost, device_type, sizes.num_labels, "evaluation")
    label_rows = min(BLOCK, sizes.num_labels)
    query_rows = min(query_block(torch.device(device_type)), queries)
    scores = (heads + 3) * query_rows * label_rows * _FP32
    labels = 2 * heads * label_rows * cost.width * _FP32
    yield Part("device", "evaluation", "label and score blocks", scores + labels, "formula")


def _mining(
    recipe: Recipe, workload: Workload, cost: ModelCost, device_type: str
) -> Iterator[Part]:
    """Yields what `mining.mine` says it holds."""
    sizes, config = workload.sizes, recipe.mining
    if not workload.num_minings:
        return
    copies = 1 if workload.world_size == 1 else 2
    vectors = copies * sizes.trained_queries * cost.width * _FP32
    yield Part("device", "mining", "query vectors", vectors, "exact")
    best = sizes.trained_queries * config.shortlist_size * 8
    yield Part("device", "mining", "best labels so far", best, "exact")
    shortlists = sizes.train_queries * config.shortlist_size * _FP32
    yield Part("host", "mining", "shortlists", shortlists, "exact")
    yield Part("host", "mining", "positives by query", 28 * sizes.train_positives, "formula")
    yield from _forward(recipe, cost, device_type, sizes.num_labels, "mining")
    label_rows = min(label_block(sizes.num_labels), sizes.num_labels)
    query_rows = min(query_block(torch.device(device_type)), sizes.trained_queries)
    scores = query_rows * label_rows * _FP32 * 5 // 4
    labels = 2 * label_rows * cost.width * _FP32
    yield Part("device", "mining", "label and score blocks", scores + labels, "formula")
    if recipe.batches.kind == "clustered":
        sample = 4 * (16384 + 4096) * cost.width
        clusters = 40 * sizes.trained_queries + sample
        yield Part("host", "mining", "clustering", clusters, "formula")


def _forward(
    recipe: Recipe, cost: ModelCost, device_type: str, num_texts: int, stage: Stage
) -> Iterator[Part]:
    texts = min(chunk_size(torch.device(device_type)), num_texts)
    _, forward = chunk_working_bytes(cost.model, texts, recipe.encoder.max_length)
    yield Part("device", stage, "one chunk of texts", forward, "traced")


def _checkpoint(
    recipe: Recipe, ds_config: DsConfig, workload: Workload, cost: ModelCost, stage: Stage
) -> Iterator[Part]:
    """Yields the copies that are written; rows in host memory are written from where they are."""
    copies = _FP32 * (cost.num_parameters + 2 * cost.num_trainable)
    yield Part("host", stage, "encoder and moments, copied to be saved", copies, "exact")
    if table_placement(ds_config).kind == "device":
        shard = table_bytes(recipe, workload.sizes.num_labels, cost.width, workload.world_size)
        yield Part("host", stage, "rows, copied to be saved", shard, "exact")


def _background_save(
    recipe: Recipe, ds_config: DsConfig, workload: Workload, cost: ModelCost
) -> Iterator[Part]:
    """Yields what a save holds while steps go on: its copies, and the rows they change."""
    config = recipe.checkpoint
    if not (config.in_background and 0 < config.every_steps < workload.total_steps):
        return
    yield from _checkpoint(recipe, ds_config, workload, cost, "step")
    if table_placement(ds_config).kind != "device":
        num_labels, world_size = workload.sizes.num_labels, workload.world_size
        rows = _STEPS_OF_A_SAVE * max(step.own_labels for step in workload.steps)
        rows = min(rows, partition.num_local_rows(num_labels, 0, world_size))
        changed = rows * recipe.classifier.bytes_per_label(cost.width)
        yield Part("host", "step", "rows changed during a save", changed, "assumed")
