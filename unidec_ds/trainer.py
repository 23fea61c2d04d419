"""Trains UniDEC; the only file that knows the order of things.

`Trainer.train_step` is the method from top to bottom; its parts name the module to open next.
Every rank makes the same plan without talking, encodes its own queries and the texts of the pool
labels it owns, and updates the classifier rows it owns; what is communicated per step is the query
embeddings and a few floats per query, whatever the pool and the number of labels.

Shape legend: B queries of the global batch, P pool labels of this rank, D width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from unidec_ds import checkpoint, comm
from unidec_ds.assembly import (
    build_model,
    evaluate_split,
    make_planner,
    split_train_queries,
    table_placement,
    trained_views,
    tune_unified,
)
from unidec_ds.batch import Batch, make_batch
from unidec_ds.classifier.stream import block_size, train_by_block
from unidec_ds.classifier.table import ClassifierTable
from unidec_ds.config import Recipe
from unidec_ds.data.corpus import Corpus
from unidec_ds.data.keyed import seed_of
from unidec_ds.data.prefetch import Prefetcher
from unidec_ds.dropout import StepDropout
from unidec_ds.ds_config import DsConfig
from unidec_ds.engine import Engine
from unidec_ds.errors import StopRequestedError
from unidec_ds.evaluation import Evaluation
from unidec_ds.finite import Fault, stop_non_finite
from unidec_ds.interruption import StopRequests
from unidec_ds.losses import HeadLoss, head_loss
from unidec_ds.mining.miner import Miner
from unidec_ds.monitor import Monitor, StepTimer, device_memory_gib, host_memory_gib
from unidec_ds.optim import learning_rates
from unidec_ds.run import WARM_START, read_json, write_json, write_untrained
from unidec_ds.saver import Saver
from unidec_ds.targets import Targets
from unidec_ds.unified import UnifiedWeight
from unidec_ds.unit_rows import unit_rows
from unidec_ds.warm_start import WarmStart, start_rows_from_texts


@dataclass(frozen=True)
class StepResult:
    """One step's figures, the same on every rank."""

    losses: dict[str, float]
    """loss, and loss_HEAD, loss_HEAD_q2l, loss_HEAD_l2q of each trained head."""
    grad_norm: float
    """Global norm of the encoder's and the heads' gradients, before clipping."""


class Trainer:
    """One run, on one rank.

    Args:
        recipe: all settings.
        ds_config: precision, ZeRO and where the classifier table lives.
        corpus: prepared with the recipe's tokenizer.
        engine: started, without a model.
        run: the run directory.
        resume_from: a checkpoint found to be whole, or None to start anew.
        warm_start: what to start anew from, None for the pretrained encoder.
    """

    def __init__(
        self,
        recipe: Recipe,
        ds_config: DsConfig,
        corpus: Corpus,
        engine: Engine,
        run: Path,
        resume_from: Path | None = None,
        warm_start: WarmStart | None = None,
    ) -> None:
        self.recipe, self.corpus, self.engine, self.run = recipe, corpus, engine, run
        self.device = engine.device
        seed = recipe.train.seed
        self.model = build_model(recipe, self.device)
        self.dropout = StepDropout(recipe.model, self.model.width, seed, comm.rank(), self.device)
        engine.prepare(self.model, recipe.optimizer)
        self.table = ClassifierTable(
            num_labels=corpus.num_labels,
            width=self.model.width,
            rank=comm.rank(),
            world_size=comm.world_size(),
            config=recipe.classifier,
            placement=table_placement(ds_config),
            device=self.device,
            seed=seed_of(seed, "classifier rows"),
            betas=recipe.optimizer.betas,
            eps=recipe.optimizer.eps,
            weight_decay=recipe.optimizer.decay_of_rows,
        )
        self.train_ids, self.validation_ids = split_train_queries(corpus, recipe)
        self.planner = make_planner(corpus, recipe, self.train_ids)
        steps = self.planner.steps_per_epoch * recipe.train.epochs
        self.total_steps = min(steps, recipe.train.max_steps or steps)
        self.step = 0
        details = {"corpus_fingerprint": corpus.fingerprint, "total_steps": self.total_steps}
        self.saver = Saver(run, recipe.checkpoint, engine, self.table, details)
        self.stop_requests = StopRequests()
        if resume_from is not None:
            self.step = self.saver.restore(resume_from)
        elif warm_start is not None:
            warm_start.load_model(engine)
            cosine = recipe.objective.classifier_logits == "cosine"
            warm_start.fill_rows(self.table, self.model, corpus, cosine=cosine)
        elif recipe.classifier.init == "label_text":
            with_text = np.flatnonzero(corpus.label_has_text)
            start_rows_from_texts(self.model, self.table, corpus, with_text)
        self._is_warm = warm_start is not None
        self.monitor = Monitor(run, self.step, self.total_steps)
        self.miner = Miner(recipe, self.model, corpus, self.train_ids, run, self.monitor, self.step)

    # ------------------------------------------------------------------ the run

    def fit(self) -> None:
        """Trains to the last step, evaluating, mining and saving on the way."""
        with self.stop_requests:
            if self.step == 0:
                self._evaluate_start()
            elif self.step % self.planner.steps_per_epoch == 0 or self.step == self.total_steps:
                self._evaluate_epoch((self.step - 1) // self.planner.steps_per_epoch)
            while self.step < self.total_steps:
                epoch = self.step // self.planner.steps_per_epoch
                self.planner = self.miner.refresh(self.planner, epoch, self.step)
                self._stop_if_asked()
                epoch_end = min((epoch + 1) * self.planner.steps_per_epoch, self.total_steps)
                with Prefetcher(self.make_batch, self.step, epoch_end) as batches:
                    for _ in range(self.step, epoch_end):
                        self._step(batches)
                self.saver.finish()
                self.miner.log_share(self.step)
                self._evaluate_epoch(epoch)
                self._stop_if_asked()
            self._save()
            self._stop_if_asked()

    def train_step(
        self, batch: Batch, timer: StepTimer, upcoming: Batch | None = None
    ) -> StepResult:
        """Takes one optimizer step on `batch`, made from the step's plan (`data.pool`, `batch`).

        `upcoming` is the next step's batch, if it is made: its rows come while this one computes.
        """
        objective = self.recipe.objective
        rates = learning_rates(self.recipe.optimizer, self.step, self.total_steps)
        self.engine.set_learning_rates(rates)
        with timer.part("forward"):
            embeddings = self.engine.forward(
                batch.chunks,
                batch.order,
                batch.query_sizes[comm.rank()],
                len(batch.own_pool_with_text),
                self.dropout.head_masks(batch, self.step),
                self.recipe.train.recompute and self.recipe.train.encoder_chunk > 0,
            )
        with timer.part("gather"):
            both_heads = torch.cat([embeddings.query_de_BD, embeddings.query_classifier_BD], dim=1)
            both_heads = comm.all_gather_rows(both_heads, batch.query_sizes)
            query_de_BD, query_classifier_BD = both_heads.chunk(2, dim=1)
        rows_PD: Tensor | None = None  # streamed, they are fetched and updated within the loss
        with timer.part("rows"):
            if objective.classifier != "none" and not self.recipe.classifier.streamed:
                rows_PD = self.table.fetch(batch.own_label_ids)
                if upcoming is not None:
                    self.table.fetch_ahead(upcoming.own_label_ids)
        with timer.part("loss"):
            heads: dict[str, HeadLoss] = {}
            if objective.de != "none":
                heads["de"] = self._head_loss(
                    objective.de, query_de_BD, embeddings.label_de_PD, batch.de_targets
                )
            if objective.classifier != "none":
                heads["classifier"] = self._classifier_loss(
                    query_classifier_BD, rows_PD, batch, rates.row
                )
            weights = objective.head_weights
            share = torch.stack([weights[name] * heads[name].total for name in weights]).sum()
            losses = self._sum_shares(share, heads)
        evidence = (batch, embeddings, rows_PD, share)
        if not math.isfinite(losses["loss"]):
            self._stop_non_finite("loss", losses["loss"], *evidence)
        with timer.part("backward"):
            self.engine.backward(share)
        with timer.part("update"):
            grad_norm = self.engine.step()
            if self._is_bad_on_any_rank(grad_norm, rows_PD):
                self._stop_non_finite("gradient norm", grad_norm, *evidence)
            if rows_PD is not None:
                self.table.apply(rows_PD, lr=rates.row)
            self.miner.keep_vectors(batch, embeddings, self.step)
        return StepResult(losses, grad_norm)

    # ------------------------------------------------------------------ parts of a step

    def make_batch(self, step: int) -> Batch:
        """Returns this rank's share of a step, with what was mined last; in any thread."""
        return make_batch(
            self.planner.plan(step),
            self.corpus,
            rank=comm.rank(),
            world_size=comm.world_size(),
            encoder_chunk=self.recipe.train.encoder_chunk,
            with_label_texts=self.recipe.objective.de != "none",
        )

    def _head_loss(self, kind: Any, queries: Tensor, labels: Tensor, targets: Any) -> HeadLoss:
        objective = self.recipe.objective
        return head_loss(
            kind,
            queries,
            labels,
            targets,
            temperature=objective.temperature,
            l2q=objective.l2q,
            bce_reduction=objective.bce_reduction,
            block_bytes=self.recipe.train.loss_block_bytes,
            combine_logsumexp=comm.combine_logsumexp,
        )

    def _classifier_loss(
        self, queries_BD: Tensor, rows_PD: Tensor | None, batch: Batch, lr: float
    ) -> HeadLoss:
        """Returns the classifier's loss; without rows it streams and updates them itself."""
        objective, block_bytes = self.recipe.objective, self.recipe.train.loss_block_bytes

        def loss(queries_BD: Tensor, rows_PD: Tensor, targets: Targets) -> HeadLoss:
            rows_PD = self.dropout.drop_rows(rows_PD, batch, self.step)
            if objective.classifier_logits == "cosine":
                queries_BD, rows_PD = unit_rows(queries_BD), unit_rows(rows_PD)
            return self._head_loss(objective.classifier, queries_BD, rows_PD, targets)

        if rows_PD is not None:
            return loss(queries_BD, rows_PD, batch.classifier_targets)
        return train_by_block(
            self.table,
            batch.own_label_ids,
            queries_BD,
            batch.classifier_targets,
            loss,
            size=block_size(len(queries_BD), self.model.width, block_bytes),
            weight=objective.head_weights["classifier"],
            lr=lr,
        )

    def _sum_shares(self, share: Tensor, heads: dict[str, HeadLoss]) -> dict[str, float]:
        """Adds the ranks' shares of every logged loss. Collectives: one all-reduce."""
        parts = {"loss": share}
        for name, head in heads.items():
            parts[f"loss_{name}"] = head.total
            parts[f"loss_{name}_q2l"] = head.q2l
            if self.recipe.objective.l2q:
                parts[f"loss_{name}_l2q"] = head.l2q
        totals = comm.all_reduce_sum(torch.stack([part.detach() for part in parts.values()]))
        return dict(zip(parts, totals.tolist(), strict=True))  # waits for the device

    def _is_bad_on_any_rank(self, grad_norm: float, rows_PD: Tensor | None) -> bool:
        """Scales the rows' gradient; returns whether it or the norm is not finite on any rank.

        The ranks also tell each other whether they were asked to stop or are still saving.
        """
        bad = not math.isfinite(grad_norm)
        if rows_PD is not None and rows_PD.grad is not None:
            if self.engine.row_gradient_scale != 1:
                rows_PD.grad.mul_(self.engine.row_gradient_scale)
            bad = bad or not bool(torch.linalg.vector_norm(rows_PD.grad).isfinite())
        flags = [bad, self.saver.is_writing()]
        is_bad, self.saver.is_writing_anywhere = self.stop_requests.exchange(flags, self.device)
        return is_bad

    def _stop_non_finite(self, what: str, value: float, *evidence: Any) -> NoReturn:
        self.saver.finish()
        last_good, rows_moved = checkpoint.latest(self.run), self.recipe.classifier.streamed
        stop_non_finite(Fault(what, value, self.step, last_good, rows_moved), *evidence)

    # ------------------------------------------------------------------ around the steps

    def _step(self, batches: Prefetcher[Batch]) -> None:
        timer = StepTimer(self.device, synchronize=False)
        start = time.perf_counter()
        with timer.part("wait_for_batch"):
            batch = next(batches).to(self.device)
        result = self.train_step(batch, timer, batches.peek())
        seconds = time.perf_counter() - start
        self.miner.add_step(seconds)
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": batch.plan.epoch,
            **result.losses,
            "grad_norm": result.grad_norm,
            **learning_rates(self.recipe.optimizer, self.step, self.total_steps).logged(),
            **batch.figures(self.recipe.pool.num_positives, comm.world_size(), seconds),
            "host_memory_gib": host_memory_gib(),
            "device_memory_gib": device_memory_gib(self.device),
            "step_s": seconds,
            "time_s": timer.seconds,
        }
        if self.step % self.recipe.train.log_every_steps == 0:
            self.monitor.log_step(record)
        self.step += 1
        self.monitor.advance(result.losses["loss"], record["texts_per_s"])
        self.saver.finish_if_written()
        every = self.recipe.checkpoint.every_steps
        if every and self.step % every == 0 and self.step < self.total_steps:
            self._flush()
            self.saver.begin(self.step)
        self._leave_if_asked()

    def _evaluate_epoch(self, epoch: int) -> None:
        """Evaluates after an epoch, unless it was done before a resume, and keeps the best."""
        every = self.recipe.evaluation.every_epochs
        is_due = every and (epoch + 1) % every == 0 and len(self.validation_ids)
        if not is_due or self.monitor.has_evaluation(self.step, epoch, "validation"):
            return
        result = self.evaluate("validation")
        view = list(result.metrics)[-1]
        self._flush()
        self.saver.keep_if_best(self.step, view, result.metrics[view])
        # Only now: what is logged is not evaluated again if the run is killed here.
        self.monitor.log_evaluation(
            self.step, epoch, "validation", result.metrics, result.breakdown
        )
        figures = ", ".join(f"{k} {result.metrics[view][k]:.2f}" for k in ("P@1", "P@5", "R@100"))
        self.monitor.say(f"epoch {epoch + 1}: validation ({view}): {figures}")

    def _stop_if_asked(self) -> None:
        """Saves and leaves if a signal came to any rank. Collectives: one all-reduce."""
        self.stop_requests.exchange([], self.device)
        self._leave_if_asked()

    def _leave_if_asked(self) -> None:
        if not self.stop_requests.agreed:
            return
        if self.step:
            self._save()
        raise StopRequestedError(
            f"stopped by {' and '.join(self.stop_requests.agreed)} after step {self.step} of "
            f"{self.total_steps}; saved as {checkpoint.latest(self.run) or 'nothing yet'}. Go on "
            "with the same command and --resume auto."
        )

    def _save(self) -> None:
        self._flush()
        self.saver.save(self.step)

    def _flush(self) -> None:
        """Makes durable what a run that goes on from here needs beside its checkpoint."""
        self.miner.sync(self.step)
        self.monitor.flush()

    # ------------------------------------------------------------------ evaluation

    def evaluate(
        self, split: str, unified_weights: Mapping[str, float] | None = None
    ) -> Evaluation:
        """Evaluates every trained view on "test" or "validation", and further weightings."""
        parts, views = (
            (self.model, self.table, self.corpus, self.recipe),
            trained_views(self.recipe),
        )
        return evaluate_split(*parts, split, views, unified_weights=unified_weights)

    def tune_unified(self) -> UnifiedWeight | None:
        """Chooses the unified view's weight on the validation queries, if there are any."""
        return tune_unified(self.model, self.table, self.corpus, self.recipe)

    @property
    def final_split(self) -> str:
        """What the final figures are of: the test set, if the corpus has one."""
        return "test" if "test" in self.corpus.queries else "validation"

    def _evaluate_start(self) -> None:
        """Measures what training starts from: the untrained encoder, or the warm start's views."""
        split = self.final_split
        if self._is_warm:
            start = self.evaluate(split).metrics
            self.monitor.log_evaluation(self.step, 0, split, start)
            if comm.is_main():
                record = read_json(self.run / WARM_START)
                write_json(self.run / WARM_START, {**record, "evaluation": {split: start}})
            return
        untrained = evaluate_split(
            self.model, None, self.corpus, self.recipe, split, ("encoder",), "untrained encoder"
        )
        if comm.is_main():
            write_untrained(self.run, split, untrained)
