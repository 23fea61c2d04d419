"""When a run mines, what it keeps in between, and what it has to find again after a resume.

`Trainer` calls it around its steps: `refresh` before an epoch, `keep_vectors` after a step,
`sync` before a checkpoint, `log_share` after an epoch. `mining` does the work.

Shape legend: B queries of the global batch, D width.
"""

from __future__ import annotations

from pathlib import Path

import torch

from unidec_ds import checkpoint, comm
from unidec_ds.batch import Batch
from unidec_ds.config import Recipe
from unidec_ds.data.corpus import Corpus
from unidec_ds.data.pairs import Ids
from unidec_ds.data.pool import Planner
from unidec_ds.mining.mine import last_mined_epoch, mine, mines_at
from unidec_ds.mining.mined import is_mined, open_mined, remove_mined
from unidec_ds.mining.vector_cache import VectorCache
from unidec_ds.model import Embeddings, UniDEC
from unidec_ds.monitor import Monitor


class Miner:
    """Mining in the course of one run, on one rank.

    Args:
        recipe: all settings.
        model: the model in training.
        corpus: the corpus.
        train_ids: int64 [N], the queries to train on.
        run: the run directory.
        monitor: where figures and notes go.
        first_step: the step the run starts or resumes at.

    Collectives: those of `VectorCache`; every rank must make it.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: UniDEC,
        corpus: Corpus,
        train_ids: Ids,
        run: Path,
        monitor: Monitor,
        first_step: int,
    ) -> None:
        self._recipe, self._model, self._corpus, self._train_ids = recipe, model, corpus, train_ids
        self._run, self._folder, self._monitor = run, run / "mining", monitor
        self._mining_s: float | None = None  # of the mining now in use, if this process did it
        self._steps_s = 0.0
        self._vectors: VectorCache | None = None
        if recipe.mining.source == "cached" and recipe.mining.every_epochs:
            if first_step == 0 and comm.is_main():
                remove_mined(self._folder, keep=())
            self._vectors = VectorCache(
                self._folder / "vectors",
                {"queries": len(corpus.queries["train"]), "labels": corpus.num_labels},
                model.width,
                {"corpus_fingerprint": corpus.fingerprint},
                first_step,
            )
            if self._vectors.note is not None:
                monitor.say(self._vectors.note)

    def refresh(self, planner: Planner, epoch: int, step: int) -> Planner:
        """Mines if `epoch` asks for it; after a resume re-opens what was mined last.

        Args:
            planner: the run's planner.
            epoch: the epoch to come, counted from 0.
            step: the step to come; not the epoch's first after a resume in its middle.

        Returns:
            The planner with what was mined, unchanged before the first mining.

        Collectives: those of `mine`; every rank must call.
        """
        config, steps_per_epoch = self._recipe.mining, planner.steps_per_epoch
        mined_epoch = last_mined_epoch(config, epoch)
        if mined_epoch is None:
            return planner
        # Vectors that a run which had come further has overwritten are lost, but what it mined
        # with them is there.
        # Only rank 0 looks: over NFS a rank that did not find a file may go on not finding it.
        is_done = comm.is_main() and self._vectors is not None and is_mined(self._folder, epoch)
        is_due = mines_at(config, epoch) and step == epoch * steps_per_epoch
        if is_due and not comm.broadcast_object(is_done):
            kept = None
            if self._vectors is not None:
                kept = self._vectors.fresh(step, config.every_epochs * steps_per_epoch)
            clustered = self._recipe.batches.kind == "clustered"
            mined = mine(
                self._model,
                self._corpus,
                self._train_ids,
                config=config,
                num_clusters=steps_per_epoch if clustered else None,
                folder=self._folder,
                epoch=epoch,
                seed=self._recipe.train.seed,
                kept=kept,
            )
            self._mining_s, self._steps_s = mined.seconds.total_s, 0.0
            if comm.is_main():
                oldest = self._oldest_epoch_to_resume_with(steps_per_epoch, epoch)
                remove_mined(self._folder, keep=range(oldest, epoch + 1))
        else:
            mined = open_mined(self._folder, mined_epoch)
        if is_due:
            self._monitor.log_scalars(step, "mining", mined.figures())
        return planner.with_mined(mined.shortlists, mined.clusters)

    def keep_vectors(self, batch: Batch, embeddings: Embeddings, step: int) -> None:
        """Keeps a step's vectors, if mining wants them.

        Collectives: with `mining.source: cached` an all-gather of B·D half floats.
        """
        if self._vectors is None:
            return
        with torch.no_grad():
            queries_BD = comm.all_gather_rows(
                embeddings.query_de_clean_BD.half(), batch.query_sizes
            )
        self._vectors.keep("queries", batch.plan.query_ids, queries_BD, step)
        label_ids = batch.plan.label_ids[batch.own_pool_with_text]
        self._vectors.keep("labels", label_ids, embeddings.label_de_clean_PD, step)

    def add_step(self, seconds: float) -> None:
        """Notes what a step took."""
        self._steps_s += seconds

    def log_share(self, step: int) -> None:
        """Logs how much of the time since the last mining, its own included, the mining took.

        A run that resumed since then has not seen all of that time and logs nothing.
        """
        if self._mining_s is not None:
            share = self._mining_s / (self._mining_s + self._steps_s)
            self._monitor.log_scalars(step, "mining", {"share_of_epoch": share})

    def sync(self, step: int) -> None:
        """Makes what was kept before `step` durable; before a checkpoint of that step."""
        if self._vectors is not None:
            self._vectors.sync(step)

    def _oldest_epoch_to_resume_with(self, steps_per_epoch: int, epoch: int) -> int:
        """Returns the first epoch whose mining a kept checkpoint may need, `epoch` if none does.

        A checkpoint opens the mining it was trained on; with cached vectors also those after it.
        """
        epochs = (step // steps_per_epoch for step in checkpoint.kept_steps(self._run))
        return min((last_mined_epoch(self._recipe.mining, e) or 0 for e in epochs), default=epoch)
