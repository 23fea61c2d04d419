"""What a run directory holds, read for the report page; finished or not, nothing need be there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from unidec_ds import checkpoint
from unidec_ds.errors import CheckpointError
from unidec_ds.manifest import read_manifest
from unidec_ds.run import BREAKDOWN, EVALUATION, SAMPLES, UNTRAINED, read_json

Record = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """A run's files, as plain data; empty where a file is not there yet."""

    folder: Path
    recipe: Record
    """The resolved recipe, section by section."""
    ds_config: Record
    environment: Record
    steps: list[Record]
    """The logged training steps."""
    validations: list[Record]
    """Evaluations of the validation queries during training."""
    minings: list[Record]
    """What each mining took."""
    evaluation: Record
    untrained: Record
    samples: Record
    saved_step: int | None
    """Step of the newest checkpoint; None without one."""
    total_steps: int | None
    """Of the whole run; None before the first checkpoint."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def details(self) -> Record:
        """What the final figures depend on; empty before there are any."""
        details: Record = self.evaluation.get("details", {})
        return details

    @property
    def final_split(self) -> str | None:
        """What the final figures are of; None before there are any."""
        return next((name for name in ("test", "validation") if name in self.evaluation), None)

    @property
    def metrics(self) -> Record:
        """The final figures by view; before there are any, the untrained encoder's alone."""
        if self.final_split is not None:
            final: Record = self.evaluation[self.final_split]
            return final
        before = next((self.untrained[s] for s in ("test", "validation") if s in self.untrained), 0)
        return {"untrained": before} if before else {}

    @property
    def breakdown(self) -> Record:
        """The final figures' parts by label frequency, by view; empty before there are any."""
        parts: Record = self.evaluation.get(BREAKDOWN, {}).get(self.final_split, {})
        return parts

    @property
    def is_finished(self) -> bool:
        """Whether the last step and the final evaluation are done."""
        return self.total_steps is not None and self.details.get("step") == self.total_steps

    @property
    def num_steps(self) -> int:
        """Steps known to be done."""
        logged = self.steps[-1]["step"] + 1 if self.steps else 0
        return max(logged, self.saved_step or 0)


def read_record(run: Path) -> RunRecord:
    """Reads a run directory.

    Raises:
        CheckpointError: it is none, or its newest checkpoint is damaged.
    """
    if not (run / "config.yaml").is_file():
        raise CheckpointError(
            f"{run} is not a run directory: it has no config.yaml; give the --output of train.py"
        )
    recipe = YAML(typ="safe", pure=True).load((run / "config.yaml").read_text(encoding="utf-8"))
    records = _read_lines(run / "metrics.jsonl")
    num_epochs = (recipe or {}).get("train", {}).get("epochs", 0)
    newest = checkpoint.latest(run)
    manifest = read_manifest(newest) if newest else {}
    return RunRecord(
        folder=run,
        recipe=recipe or {},
        ds_config=read_json(run / "ds_config.json"),
        environment=read_json(run / "environment.json"),
        steps=[record for record in records if "loss" in record],
        validations=[
            record
            for record in records
            # The final evaluation is logged as that of the epoch after the last.
            if record.get("split") == "validation" and record["epoch"] < num_epochs
        ],
        minings=[record for record in records if "mining_total_s" in record],
        evaluation=read_json(run / EVALUATION),
        untrained=read_json(run / UNTRAINED),
        samples=read_json(run / SAMPLES),
        saved_step=manifest.get("step"),
        total_steps=manifest.get("total_steps"),
    )


def _read_lines(path: Path) -> list[Record]:
    """Returns a JSON Lines file's objects, up to a line that is still being written."""
    records: list[Record] = []
    if not path.is_file():
        return records
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            records.append(json.loads(line))  # noqa: PERF401  keeps what came before a bad line
    except json.JSONDecodeError:
        pass
    return records
