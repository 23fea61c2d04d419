"""Learning rates as a pure function of the step, and AdamW parameter groups.

There is no scheduler object: `trainer` asks `learning_rates(step, total_steps)` before each step
and writes the values into the engine's parameter groups and the classifier table. Resume at
any step is exact, and Accelerate's scheduler wrapper, which advances world-size times a step,
is not involved.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from pydantic import Field
from torch import nn

from unidec_ds.settings import Settings

Rate = Annotated[float, Field(ge=0, le=1)]


class OptimizerConfig(Settings):
    """AdamW for encoder, heads and classifier rows; linear warm-up, then linear to 0."""

    encoder_lr: Rate = 1e-4
    """Peak learning rate of the encoder."""
    head_lr: Rate = 2e-4
    """Peak learning rate of both heads."""
    row_lr: Annotated[float, Field(ge=0, le=1000)] = 1e-3
    """Peak learning rate of the classifier rows. Above 1 only with `classifier.optimizer: sgd`,
    whose step is in proportion to a gradient that is a mean over the batch's queries."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled; not on biases and norms. A classifier row decays in the steps that touch it."""
    row_weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Of the classifier rows; without it, `weight_decay`."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(gt=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Adam's decay rates of the first and the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's eps."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps from 0 to the peak; overrides `warmup_fraction`."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Share of all steps from 0 to the peak."""

    @property
    def decay_of_rows(self) -> float:
        """Weight decay of the classifier rows."""
        return self.weight_decay if self.row_weight_decay is None else self.row_weight_decay


class LearningRates(NamedTuple):
    """The three learning rates of one step."""

    encoder: float
    head: float
    row: float

    def logged(self) -> dict[str, float]:
        """Returns the rates under the names of `metrics.jsonl`."""
        return {"lr": self.encoder, "lr_head": self.head, "lr_row": self.row}


def learning_rates(config: OptimizerConfig, step: int, total_steps: int) -> LearningRates:
    """Returns the rates of `step` (0-based): linear from 0 to the peak, then linear to 0.

    Step 0 already moves (its factor is 1 / warm-up steps) and so does the last one.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_fraction * total_steps)
    if step < warmup:
        factor = (step + 1) / warmup
    else:
        factor = max(0.0, (total_steps - step) / max(1, total_steps - warmup))
    return LearningRates(
        config.encoder_lr * factor, config.head_lr * factor, config.row_lr * factor
    )


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Returns AdamW groups in a fixed order; each has `role` ("encoder" or "head") for its rate.

    Biases and the one-dimensional parameters of norms get no weight decay.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role = "encoder" if name.startswith("encoder.") else "head"
            groups.setdefault((role, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "role": role,
            "lr": config.encoder_lr if role == "encoder" else config.head_lr,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (role, decays), parameters in groups.items()
    ]
