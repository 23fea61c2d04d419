"""What a run saves and goes on from: the encoder and heads, the table, and which state was best."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unidec_ds import checkpoint, comm
from unidec_ds.checkpoint import CheckpointConfig
from unidec_ds.classifier.table import ClassifierTable
from unidec_ds.engine import Engine
from unidec_ds.manifest import ENCODER_FILE, load_tensors, read_manifest


class Saver:
    """The checkpoints of one run, on one rank.

    Args:
        run: the run directory.
        config: which to keep.
        engine: holds the encoder and heads.
        table: this rank's classifier rows.
        details: what the manifests say beside the state (plain data).

    Attributes:
        saved_step: the step whose state is in the run directory, None before the first one.
        is_writing_anywhere: whether any rank is still writing; for the ranks to agree on.
    """

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        engine: Engine,
        table: ClassifierTable,
        details: Mapping[str, Any],
    ) -> None:
        self._run, self._config, self._details = run, config, details
        self._engine, self._table = engine, table
        self.saved_step: int | None = None
        self.is_writing_anywhere = False
        self._save: checkpoint.Save | None = None

    def restore(self, folder: Path) -> int:
        """Takes over the state of a checkpoint found to be whole; returns its step."""
        manifest = read_manifest(folder)
        step = int(manifest["step"])
        tensors = load_tensors(folder, manifest, ENCODER_FILE, verify=False)
        self._engine.load_state(tensors, step)
        checkpoint.load_rows(folder, manifest, self._table)
        if folder.resolve() == checkpoint.place(self._run, step).resolve():
            self.saved_step = step
        return step

    def save(self, step: int) -> None:
        """Saves the state after `step` steps, unless that is on disk already.

        Raises:
            SaveError: on every rank.

        Collectives: those of `Engine.state` and `checkpoint.Save`; every rank must call.
        """
        self.begin(step)
        self.finish()

    def begin(self, step: int) -> None:
        """Begins to save the state after `step` steps; steps may be taken until it is written.

        Waits for the save before. Raises and communicates as `save` does.
        """
        self.finish()
        if self.saved_step == step:
            return
        self.is_writing_anywhere = True
        self._save = checkpoint.Save(
            self._run,
            step,
            self._engine.state(),
            self._table,
            keep=self._config.keep,
            details=self._details,
        )
        if not self._config.in_background:
            self.finish()

    def is_writing(self) -> bool:
        """Returns whether this rank is still writing."""
        return self._save is not None and not self._save.is_written()

    def finish_if_written(self) -> None:
        """Makes the save under way a checkpoint if no rank was writing when they last asked."""
        if not self.is_writing_anywhere:
            self.finish()

    def finish(self) -> None:
        """Waits for the save under way, if there is one, and makes it a checkpoint."""
        if self._save is None:
            return
        save, self._save = self._save, None
        save.finish()
        self.saved_step = save.step

    def keep_if_best(self, step: int, view: str, metrics: Mapping[str, float]) -> None:
        """Saves the state after `step` if it scored better than every one before; every rank calls.

        Args:
            step: number of steps taken.
            view: the view evaluated.
            metrics: what it scored on the validation queries, in percent; rank 0's count.
        """
        if not self._config.keep_best:
            return
        metric, value = f"{view} {self._config.best_metric}", metrics[self._config.best_metric]
        before = checkpoint.best(self._run)
        # One of a later step is of the steps that a resume from an earlier one runs again.
        is_past = before is not None and before.step < step and before.metric == metric
        if not comm.broadcast_object(before is None or not is_past or value > before.value):
            return
        self.save(step)
        if comm.is_main():
            checkpoint.write_best(self._run, step, metric, value, keep=self._config.keep)
