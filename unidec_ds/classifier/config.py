"""The recipe's section `classifier`: what the table stores and how its rows are updated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unidec_ds.classifier.row_adam import KernelName
from unidec_ds.classifier.row_formats import (
    BiasCorrection,
    FormatName,
    RowOptimizer,
    bytes_per_label,
)
from unidec_ds.settings import Settings


class ClassifierConfig(Settings):
    """Recipe section `classifier`."""

    format: FormatName = "rowwise"
    """What a row and its moments are stored as; D is the width. fp32: 12·D bytes a label.
    bf16_moments: 8·D. bf16: rows too, 6·D. rowwise: bf16 rows and one second moment a row, no first
    moment, 2·D + 4: the smallest, and the most accurate where it was measured
    (`scripts/bench/results/accuracy_formats.md`)."""
    init: Literal["xavier", "label_text"] = "xavier"
    """Initial rows: Xavier-uniform, or the embeddings of the label texts."""
    kernel: KernelName = "cpu_adam"
    """DeepSpeed's CPUAdam, and for rowwise rows this project's own C; both need a compiler once. Or
    torch, which tables on the accelerator always use."""
    bias_correction: BiasCorrection = "global"
    """Adam's bias correction by the number of steps of the run, or of each row's own updates
    (4 bytes more a label). With global, a row first touched late moves 3.2 learning rates."""
    optimizer: RowOptimizer = "adamw"
    """Of the rows. `sgd` has `momentum` for its only state, adds its decay to the gradient, as
    torch's does, and needs a format other than rowwise."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of `optimizer: sgd`; without effect on adamw."""
    streamed: bool = False
    """Compute the loss in blocks of labels and update each block's rows at once, so that neither
    the rows nor the gradient of the whole pool exist (see `classifier.stream`). For bce alone."""
    prefetch_rows: Literal["auto", "always", "never"] = "auto"
    """Bring the next step's rows to the device while it computes this step; the numbers stay the
    same, bit for bit. auto: where the device is an accelerator and the table is not on it."""

    def bytes_per_label(self, width: int) -> int:
        """Returns what one label takes in the table, at width D."""
        return bytes_per_label(self.format, self.bias_correction, width, self.optimizer)

    def fetches_ahead(self, device_type: str) -> bool:
        """Returns whether rows of a table on the host come to the device a step early."""
        return self.prefetch_rows == "always" or (
            self.prefetch_rows == "auto" and device_type != "cpu"
        )

    @model_validator(mode="after")
    def _sgd_has_momentum_alone(self) -> ClassifierConfig:
        if self.optimizer == "sgd" and self.format == "rowwise":
            raise ValueError(
                "optimizer sgd with format rowwise, whose one second moment a row is AdamW's: set "
                "format to fp32, bf16_moments or bf16"
            )
        if self.optimizer == "sgd" and self.bias_correction == "per_row":
            raise ValueError("optimizer sgd has no bias to correct: set bias_correction to global")
        return self
