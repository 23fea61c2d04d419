"""The reference: UniDEC with its classifier as an ordinary parameter inside the DeepSpeed engine.

What ZeRO-Offload does when it is left to itself: the L x D matrix is one more weight, its gradient
is dense, its AdamW steps every row. `DenseOffload` takes the same steps as `trainer.Trainer` on the
same batches, for correctness and for cost (`scripts/bench/rivals.py`).

Its rows equal the row-sparse table's to rounding where every step touches every row
(`objective.pool: all`). Elsewhere they must differ: dense Adam moves untouched rows on by their
moments and decays them. No dropout, no mining, fp32.

Cost beside the encoder: 24·L·D bytes of host memory at ZeRO 2 (the weight, its fp32 master copy,
two moments, two gradients) and as much traffic a step, on every rank divided by W but for weight
and gradient, which every rank holds whole.

Shape legend: B queries of the global batch, P pool labels of this rank, D width, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from unidec_ds import comm
from unidec_ds.assembly import build_model, make_planner, split_train_queries
from unidec_ds.batch import Batch, make_batch
from unidec_ds.classifier.row_formats import xavier_rows
from unidec_ds.config import Recipe
from unidec_ds.data.corpus import Corpus
from unidec_ds.data.keyed import seed_of
from unidec_ds.engine import Engine
from unidec_ds.losses import head_loss
from unidec_ds.model import Chunk, Embeddings, UniDEC
from unidec_ds.optim import learning_rates, parameter_groups


class DenseUniDEC(nn.Module):
    """Encoder, heads and the whole classifier."""

    def __init__(self, model: UniDEC, rows_LD: Tensor) -> None:
        super().__init__()
        self.model = model
        self.rows = nn.Parameter(rows_LD)

    def forward(
        self,
        chunks: Sequence[Chunk],
        order: Tensor,
        num_queries: int,
        num_labels: int,
        recompute: bool,
        label_ids: Tensor,
    ) -> tuple[Embeddings, Tensor]:
        """Returns the texts' embeddings and the labels' rows, [P, D]."""
        made = self.model(chunks, order, num_queries, num_labels, None, recompute)
        return made, self.rows.index_select(0, label_ids)


class DenseOffload:
    """Trains as `Trainer` does, all rows inside the engine.

    Args:
        recipe: without dropout in the heads or the rows; both heads trained.
        corpus: prepared.
        engine: started, without a model.
    """

    def __init__(self, recipe: Recipe, corpus: Corpus, engine: Engine) -> None:
        assert recipe.model.head_dropout == recipe.model.row_dropout == 0
        self.recipe, self.corpus, self.engine = recipe, corpus, engine
        model = build_model(recipe, engine.device)
        seed = seed_of(recipe.train.seed, "classifier rows")
        label_ids = np.arange(corpus.num_labels)
        rows_LD = xavier_rows(label_ids, corpus.num_labels, model.width, seed)
        self.module = DenseUniDEC(model, rows_LD.to(engine.device))
        optimizer = recipe.optimizer
        rows = {
            "params": [self.module.rows],
            "role": "row",
            "lr": optimizer.row_lr,
            "weight_decay": optimizer.decay_of_rows,
        }
        adam = torch.optim.AdamW(
            [*parameter_groups(model, optimizer), rows], betas=optimizer.betas, eps=optimizer.eps
        )
        engine._engine, _ = engine._accelerator.prepare(self.module, adam)
        self.planner = make_planner(corpus, recipe, split_train_queries(corpus, recipe)[0])
        steps = self.planner.steps_per_epoch * recipe.train.epochs
        self.total_steps = min(steps, recipe.train.max_steps or steps)
        self.step = 0

    def make_batch(self, step: int) -> Batch:
        """Returns this rank's part of a step."""
        return make_batch(
            self.planner.plan(step),
            self.corpus,
            rank=comm.rank(),
            world_size=comm.world_size(),
            encoder_chunk=self.recipe.train.encoder_chunk,
        ).to(self.engine.device)

    def train_step(self, batch: Batch) -> float:
        """Takes one step; returns the loss."""
        recipe, objective = self.recipe, self.recipe.objective
        rates = learning_rates(recipe.optimizer, self.step, self.total_steps)
        self.engine.set_learning_rates(rates)
        for group in self.engine._engine.optimizer.param_groups:
            if group["role"] == "row":
                group["lr"] = rates.row
        embeddings, rows_PD = self.engine.forward(
            batch.chunks,
            batch.order,
            batch.query_sizes[comm.rank()],
            len(batch.own_pool_with_text),
            recipe.train.recompute and recipe.train.encoder_chunk > 0,
            torch.from_numpy(batch.own_label_ids).to(self.engine.device),
        )
        both = torch.cat([embeddings.query_de_BD, embeddings.query_classifier_BD], dim=1)
        de_BD, classifier_BD = comm.all_gather_rows(both, batch.query_sizes).chunk(2, dim=1)
        if objective.classifier_logits == "cosine":
            classifier_BD, rows_PD = normalize(classifier_BD, dim=-1), normalize(rows_PD, dim=-1)
        sides = {
            "de": (objective.de, de_BD, embeddings.label_de_PD, batch.de_targets),
            "classifier": (objective.classifier, classifier_BD, rows_PD, batch.classifier_targets),
        }
        shares = [
            weight
            * head_loss(
                *sides[head],  # type: ignore[arg-type]
                temperature=objective.temperature,
                l2q=objective.l2q,
                bce_reduction=objective.bce_reduction,
                block_bytes=recipe.train.loss_block_bytes,
                combine_logsumexp=comm.combine_logsumexp,
            ).total
            for head, weight in objective.head_weights.items()
        ]
        share = torch.stack(shares).sum()
        loss = float(comm.all_reduce_sum(share))
        self.engine.backward(share)
        self.engine.step()
        self.step += 1
        return loss
