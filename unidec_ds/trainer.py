"""Trains UniDEC; the only file that knows the order of things.

`Trainer.train_step` is the method in about twenty lines; each names the module to open next.
Every rank makes the same plan without talking, encodes its own queries and the texts of the pool
labels it owns, and updates the classifier rows it owns; what is communicated per step is the query
embeddings and a few floats per query, whatever the pool and the number of labels.

Shape legend: B queries of the global batch, P pool labels of this rank, D width.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from unidec_ds import checkpoint, comm
from unidec_ds.assembly import build_model, evaluate_split, table_placement, trained_views
from unidec_ds.batch import Batch, make_batch
from unidec_ds.classifier import partition
from unidec_ds.classifier.capacity import check_fits
from unidec_ds.classifier.table import ClassifierTable
from unidec_ds.config import Recipe
from unidec_ds.data.corpus import Corpus, split_validation
from unidec_ds.data.keyed import seed_of
from unidec_ds.data.pairs import Ids
from unidec_ds.data.pool import Planner
from unidec_ds.data.prefetch import Prefetcher
from unidec_ds.ds_config import DsConfig
from unidec_ds.embedding import BLOCK, embed_all
from unidec_ds.engine import Engine
from unidec_ds.evaluation import Evaluation
from unidec_ds.losses import HeadLoss, head_loss
from unidec_ds.mining import last_mined_epoch, mine, mines_at, open_mined, remove_mined
from unidec_ds.model import Masks, dropout_mask
from unidec_ds.monitor import Monitor, StepTimer, device_memory_gib, host_memory_gib
from unidec_ds.optim import learning_rates
from unidec_ds.run import UNTRAINED, write_json
from unidec_ds.search import fixed_blocks


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; raised on every rank before any row is updated."""


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
        resume_from: a complete checkpoint, or None to start anew.
    """

    def __init__(
        self,
        recipe: Recipe,
        ds_config: DsConfig,
        corpus: Corpus,
        engine: Engine,
        run: Path,
        resume_from: Path | None = None,
    ) -> None:
        self.recipe, self.corpus, self.engine, self.run = recipe, corpus, engine, run
        self.device = engine.device
        seed = recipe.train.seed
        self.model = build_model(recipe, self.device)
        placement = table_placement(ds_config)
        check_fits(
            corpus.num_labels,
            self.model.width,
            comm.world_size(),
            recipe.classifier.format,
            recipe.classifier.bias_correction,
            placement,
            self.device,
            comm.local_world_size(),
        )
        comm.barrier()  # no rank takes its memory while another still asks what is free
        engine.prepare(self.model, recipe.optimizer)
        self.table = ClassifierTable(
            num_labels=corpus.num_labels,
            width=self.model.width,
            rank=comm.rank(),
            world_size=comm.world_size(),
            config=recipe.classifier,
            placement=placement,
            device=self.device,
            seed=seed_of(seed, "classifier rows"),
            betas=recipe.optimizer.betas,
            eps=recipe.optimizer.eps,
            weight_decay=recipe.optimizer.weight_decay,
        )
        train_ids, self.validation_ids = split_validation(
            corpus, recipe.corpus.validation_fraction, seed
        )
        positives, filter_pairs = corpus.positives["train"], corpus.filter_pairs["train"]
        if recipe.pool.mask_filter_pairs:
            has_positive = positives.without(filter_pairs).row_counts(train_ids) > 0
            train_ids = train_ids[has_positive]
        self.train_ids = train_ids
        self.planner = Planner(
            query_ids=train_ids,
            positives=positives,
            filter_pairs=filter_pairs,
            pool=recipe.pool,
            batch_size=recipe.train.batch_size,
            seed=seed,
            all_labels=recipe.objective.pool == "all",
        )
        steps = self.planner.steps_per_epoch * recipe.train.epochs
        self.total_steps = min(steps, recipe.train.max_steps or steps)
        self.step = 0
        self._saved_step: int | None = None
        if resume_from is not None:
            self._restore(resume_from)
        elif recipe.classifier.init == "label_text":
            self._start_rows_from_label_texts()
        self.monitor = Monitor(run, self.step, self.total_steps)

    # ------------------------------------------------------------------ the run

    def fit(self) -> None:
        """Trains to the last step, evaluating, mining and saving on the way."""
        if self.step == 0:
            self._evaluate_untrained()
        while self.step < self.total_steps:
            epoch = self.step // self.planner.steps_per_epoch
            self._refresh_mining(epoch)
            epoch_end = min((epoch + 1) * self.planner.steps_per_epoch, self.total_steps)
            with Prefetcher(self._make_batch, self.step, epoch_end) as batches:
                for _ in range(self.step, epoch_end):
                    self._step(batches)
            self._after_epoch(epoch)
        if self._saved_step != self.step:
            self._save()

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
                self._head_masks(batch),
                self.recipe.train.recompute and self.recipe.train.encoder_chunk > 0,
            )
        with timer.part("gather"):
            both_heads = torch.cat([embeddings.query_de_BD, embeddings.query_classifier_BD], dim=1)
            both_heads = comm.all_gather_rows(both_heads, batch.query_sizes)
            query_de_BD, query_classifier_BD = both_heads.chunk(2, dim=1)
        with timer.part("rows"):
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
                heads["classifier"] = self._head_loss(
                    objective.classifier,
                    *self._classifier_logit_sides(query_classifier_BD, rows_PD, batch),
                    batch.classifier_targets,
                )
            weights = objective.head_weights
            share = torch.stack([weights[name] * heads[name].total for name in weights]).sum()
            losses = self._sum_shares(share, heads)
        self._stop_unless_finite("loss", losses["loss"], batch)
        with timer.part("backward"):
            self.engine.backward(share)
        with timer.part("update"):
            grad_norm = self.engine.step()
            self._stop_unless_finite("gradient norm", self._worst_norm(grad_norm, rows_PD), batch)
            if objective.classifier != "none":
                self.table.apply(rows_PD, lr=rates.row)
        return StepResult(losses, grad_norm)

    # ------------------------------------------------------------------ parts of a step

    def _make_batch(self, step: int) -> Batch:
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

    def _classifier_logit_sides(
        self, queries_BD: Tensor, rows_PD: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        if self.recipe.model.row_dropout:
            rows_PD = rows_PD * self._row_mask(batch)
        if self.recipe.objective.classifier_logits == "cosine":
            return normalize(queries_BD, dim=-1), normalize(rows_PD, dim=-1)
        return queries_BD, rows_PD

    def _head_masks(self, batch: Batch) -> Masks | None:
        rate = self.recipe.model.head_dropout
        if not rate:
            return None
        start = sum(batch.query_sizes[: comm.rank()])
        queries = np.arange(start, start + batch.query_sizes[comm.rank()])
        num_queries, num_labels = len(batch.plan.query_ids), len(batch.plan.label_ids)
        return Masks(
            self._mask("query de", rate, num_queries, queries),
            self._mask("query classifier", rate, num_queries, queries),
            self._mask("label de", rate, num_labels, batch.own_pool_with_text),
        )

    def _row_mask(self, batch: Batch) -> Tensor:
        rate = self.recipe.model.row_dropout
        return self._mask("rows", rate, len(batch.plan.label_ids), batch.own_pool)

    def _mask(self, site: str, rate: float, num_rows: int, own: Ids) -> Tensor:
        seed = seed_of(self.recipe.train.seed, f"dropout {site}", self.step)
        return dropout_mask(seed, rate, num_rows, own, self.model.width, self.device)

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

    def _worst_norm(self, grad_norm: float, rows_PD: Tensor) -> float:
        """Scales the rows' gradient; returns NaN on every rank if it is not finite on any."""
        bad = not math.isfinite(grad_norm)
        if rows_PD.grad is not None:
            if self.engine.row_gradient_scale != 1:
                rows_PD.grad.mul_(self.engine.row_gradient_scale)
            bad = bad or not bool(torch.linalg.vector_norm(rows_PD.grad).isfinite())
        return math.nan if comm.any_true(bad, self.device) else grad_norm

    def _stop_unless_finite(self, what: str, value: float, batch: Batch) -> None:
        if math.isfinite(value):
            return
        last = checkpoint.latest(self.run)
        raise NonFiniteError(
            f"the {what} of step {self.step} is {value}; no classifier row was updated and nothing "
            f"was saved. Queries of the step: {batch.plan.query_ids[:8].tolist()}... "
            f"({len(batch.plan.query_ids)}), labels: {batch.plan.label_ids[:8].tolist()}... "
            f"({len(batch.plan.label_ids)}). Last good checkpoint: {last or 'none'}. Try lower "
            "learning rates, a longer warm-up, or gradient_clipping in the ds_config."
        )

    # ------------------------------------------------------------------ around the steps

    def _step(self, batches: Prefetcher[Batch]) -> None:
        timer = StepTimer(self.device, synchronize=False)
        start = time.perf_counter()
        with timer.part("wait_for_batch"):
            batch = next(batches).to(self.device)
        result = self.train_step(batch, timer, batches.peek())
        seconds = time.perf_counter() - start
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
        every = self.recipe.checkpoint.every_steps
        if every and self.step % every == 0 and self.step < self.total_steps:
            self._save()

    def _refresh_mining(self, epoch: int) -> None:
        """Mines before the epochs that ask for it; after a resume re-opens what was mined last."""
        config, folder = self.recipe.mining, self.run / "mining"
        mined_epoch = last_mined_epoch(config, epoch)
        if mined_epoch is None:
            return
        clustered = self.recipe.batches.kind == "clustered"
        if mines_at(config, epoch) and self.step == epoch * self.planner.steps_per_epoch:
            mined = mine(
                self.model,
                self.corpus,
                self.train_ids,
                config=config,
                num_clusters=self.planner.steps_per_epoch if clustered else None,
                folder=folder,
                epoch=epoch,
                seed=self.recipe.train.seed,
            )
            seconds = {**asdict(mined.seconds), "total_s": mined.seconds.total_s}
            self.monitor.log_scalars(self.step, "mining", seconds)
            if comm.is_main():
                remove_mined(folder, keep={epoch, *self._epochs_to_resume_with()})
        else:
            mined = open_mined(folder, mined_epoch)
        self.planner = self.planner.with_mined(mined.shortlists, mined.clusters)

    def _epochs_to_resume_with(self) -> set[int]:
        """Returns the mined epochs that a kept checkpoint would open again."""
        steps = checkpoint.kept_steps(self.run)
        epochs = (step // self.planner.steps_per_epoch for step in steps)
        mined = (last_mined_epoch(self.recipe.mining, epoch) for epoch in epochs)
        return {epoch for epoch in mined if epoch is not None}

    def _after_epoch(self, epoch: int) -> None:
        every = self.recipe.evaluation.every_epochs
        if every and (epoch + 1) % every == 0 and len(self.validation_ids):
            result = self.evaluate("validation")
            self.monitor.log_evaluation(self.step, epoch, "validation", result.metrics)
            best = list(result.metrics)[-1]
            figures = ", ".join(
                f"{k} {result.metrics[best][k]:.2f}" for k in ("P@1", "P@5", "R@100")
            )
            self.monitor.say(f"epoch {epoch + 1}: validation ({best}): {figures}")

    def _save(self) -> None:
        checkpoint.save(
            self.run,
            self.step,
            self.engine.state(),
            self.table,
            keep=self.recipe.checkpoint.keep,
            details={
                "corpus_fingerprint": self.corpus.fingerprint,
                "total_steps": self.total_steps,
            },
        )

    def _restore(self, folder: Path) -> None:
        manifest = checkpoint.read_manifest(folder)
        self.step = int(manifest["step"])
        tensors = checkpoint.load_tensors(folder, manifest, checkpoint.ENCODER_FILE)
        self.engine.load_state(tensors, self.step)
        checkpoint.load_rows(folder, manifest, self.table)
        self._saved_step = self.step

    def _start_rows_from_label_texts(self) -> None:
        """Sets each row to its label's own classifier-head vector, L2-normalised."""
        table, corpus = self.table, self.corpus
        title = "rows from label texts"
        with tqdm(total=corpus.num_labels, desc=title, unit=" labels", leave=False,
                  disable=not comm.is_main()) as bar:  # fmt: skip
            for first, end in fixed_blocks(corpus.num_labels, BLOCK * comm.world_size()):
                ids = np.arange(first, end)[corpus.label_has_text[first:end]]
                (vectors,) = embed_all(
                    self.model, corpus.labels, ids, ("classifier",), corpus.pad_token_id
                )
                own = partition.owner(ids, table.world_size) == table.rank
                table.write(ids[own], vectors[torch.from_numpy(own).to(self.device)])
                bar.update(end - first)

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, split: str) -> Evaluation:
        """Evaluates every trained view on "test" or "validation"."""
        return evaluate_split(
            self.model, self.table, self.corpus, self.recipe, split, trained_views(self.recipe)
        )

    @property
    def final_split(self) -> str:
        """What the final figures are of: the test set, if the corpus has one."""
        return "test" if "test" in self.corpus.queries else "validation"

    def _evaluate_untrained(self) -> None:
        split = self.final_split
        untrained = evaluate_split(
            self.model, None, self.corpus, self.recipe, split, ("encoder",), "untrained encoder"
        )
        if comm.is_main():
            write_json(self.run / UNTRAINED, {split: untrained.metrics["encoder"]})
