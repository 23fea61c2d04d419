"""train.py, with a rank that fails in the middle: `python failing_rank.py HOW RANK OPTION...`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from unidec_ds.errors import UserError
from unidec_ds.exits import exit_with_message
from unidec_ds.lifeline import Lifeline

FAIL_AT = 3


def fail(how: str) -> None:
    """Dies, hangs, or raises."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(3600)
    raise UserError("this disk is full") if how == "user" else ZeroDivisionError("our own fault")


def make_training_fail(how: str) -> None:
    """Lets this process's training fail before its step FAIL_AT."""
    from unidec_ds.trainer import Trainer

    take_step = Trainer.train_step

    def step_or_fail(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.step == FAIL_AT:
            fail(how)
        return take_step(trainer, *arguments)

    Trainer.train_step = step_or_fail  # type: ignore[method-assign]


if __name__ == "__main__":
    how, rank = sys.argv.pop(1), sys.argv.pop(1)
    if os.environ["RANK"] == rank:
        make_training_fail(how)
    args, lifeline = train.parse_args(), Lifeline.of_launch()
    sys.exit(exit_with_message(lambda: train.main(args, lifeline), lifeline))
