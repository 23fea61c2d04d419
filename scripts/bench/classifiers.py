"""The classifiers that `label_scaling` compares, and the training step that they are all part of.

Every system is two functions: one gives the rows of some labels, the other updates the classifier
once the rows have their gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers import BertConfig, BertModel

from unidec_ds.classifier.config import ClassifierConfig
from unidec_ds.classifier.storage import Placement
from unidec_ds.classifier.table import ClassifierTable
from unidec_ds.losses import Targets, head_loss
from unidec_ds.model import Chunk, ModelConfig, UniDEC

LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.05
OURS, DENSE = "row_sparse", ("deepspeed_dense", "torch_fused")
SYSTEMS = (OURS, *DENSE, "sparse_adam")
QUERIES, QUERY_TOKENS, ENCODER_WIDTH, POSITIVES, TEMPERATURE = 256, 12, 64, 4, 18.0


class System(NamedTuple):
    """One system at one size."""

    rows: Callable[[np.ndarray], Tensor]
    """Returns the labels' rows [R, D], which want a gradient."""
    update: Callable[[np.ndarray, Tensor], None]
    """Updates the classifier; the rows have their gradient."""


class Encoder:
    """The part of the step that has nothing to do with L: encoder, loss and their backward."""

    def __init__(self, width: int, rows: int) -> None:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=1000,
            hidden_size=ENCODER_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * ENCODER_WIDTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        )
        bert = BertModel(config, add_pooling_layer=False)
        self._model = UniDEC(bert, ENCODER_WIDTH, ModelConfig(width=width, head_dropout=0.0))
        self._model.de_head.requires_grad_(False)
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, fused=True)
        ids = torch.randint(1000, (QUERIES, QUERY_TOKENS))
        self._chunk = Chunk(ids, torch.ones_like(ids))
        positives = np.unique(np.random.default_rng(0).integers(QUERIES * rows, size=4 * QUERIES))
        none = np.zeros(0, np.int64)
        self._targets = Targets.from_plan(
            batch_size=QUERIES,
            positive_query=positives // rows,
            positive_pool=positives % rows,
            ignored_query=none,
            ignored_pool=none,
            columns=np.arange(rows),
            eligible=np.ones(rows, bool),
        )

    def step(self, system: System, label_ids: np.ndarray) -> tuple[float, float, float]:
        """Takes one training step; returns the seconds of fetch, update and the whole."""
        start = time.perf_counter()
        rows_RD = system.rows(label_ids)
        fetched = time.perf_counter()
        embeddings = self._model([self._chunk], torch.arange(QUERIES), QUERIES, 0)
        head_loss(
            "softmax",
            embeddings.query_classifier_BD,
            rows_RD,
            self._targets,
            temperature=TEMPERATURE,
            l2q=True,
            block_bytes=64 << 20,
            combine_logsumexp=lambda local: local,
        ).total.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        before_update = time.perf_counter()
        system.update(label_ids, rows_RD)
        end = time.perf_counter()
        return fetched - start, end - before_update, end - start


def new_table(labels: int, width: int, row_format: str, placement: Placement) -> ClassifierTable:
    """Returns a table whose moments have been written once: no step pays for fresh pages."""
    table = ClassifierTable(
        num_labels=labels,
        width=width,
        rank=0,
        world_size=1,
        config=ClassifierConfig.model_validate({"format": row_format}),
        placement=placement,
        device=torch.device("cpu"),
        seed=0,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
    )
    for name, column in table.state().items():
        if name.startswith("exp_avg"):
            column.zero_()
    return table


def row_sparse(table: ClassifierTable) -> System:
    """Returns ours."""
    return System(table.fetch, lambda _, rows_RD: table.apply(rows_RD, lr=LR))


def rival(system: str, state: dict[str, Tensor], gradient: Tensor) -> System:
    """Returns a rival over one [L, D] parameter.

    Args:
        system: which.
        state: its rows and moments, of `ClassifierTable.state`.
        gradient: flat memory of at least L·D elements, for the dense ones.
    """
    weight = torch.nn.Parameter(state["rows"])
    moments = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
    options: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS}
    if system == "sparse_adam":
        sparse = torch.optim.SparseAdam([weight], **options)
        sparse.state[weight] = {"step": 0, **moments}

        def sparse_update(_: np.ndarray, __: Tensor) -> None:
            sparse.step()
            weight.grad = None

        return System(
            lambda label_ids: embedding(torch.from_numpy(label_ids), weight, sparse=True),
            sparse_update,
        )
    optimizer: torch.optim.Optimizer
    if system == "deepspeed_dense":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam([weight], weight_decay=WEIGHT_DECAY, **options)
        optimizer.state[weight] = {"step": 0, **moments}
    else:
        optimizer = torch.optim.AdamW([weight], fused=True, weight_decay=WEIGHT_DECAY, **options)
        optimizer.state[weight] = {"step": torch.tensor(0.0), **moments}
    dense_LD = gradient[: weight.numel()].view_as(weight)

    def rows(label_ids: np.ndarray) -> Tensor:
        picked = weight.detach().index_select(0, torch.from_numpy(label_ids))
        return picked.requires_grad_()

    def update(label_ids: np.ndarray, rows_RD: Tensor) -> None:
        weight.grad = dense_LD.zero_()
        dense_LD[torch.from_numpy(label_ids)] = rows_RD.grad
        optimizer.step()

    return System(rows, update)
