"""train.py, with a rank that fails in the middle: `python failing_rank.py HOW RANK OPTION...`.

With the HOW "kill and stop" the others are told to stop then, as launchers do; with "impatient"
none fails, and all soon give up looking for what another rank has written.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from unidec_ds import shared_storage
from unidec_ds.errors import UserError
from unidec_ds.exits import exit_with_message
from unidec_ds.lifeline import Lifeline

FAIL_AT = 3


def fail(how: str) -> None:
    """Dies, hangs, or raises."""
    if how in ("kill", "kill and stop"):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(3600)
    raise UserError("this disk is full") if how == "user" else ZeroDivisionError("our own fault")


def be_told_to_stop(lifeline: Lifeline) -> None:
    """Gets SIGTERM as soon as it is known that another rank has failed."""
    while lifeline.verdict is None:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def let_happen(what: Callable[[], None]) -> None:
    """Lets something happen in this process before its training's step FAIL_AT."""
    from unidec_ds.trainer import Trainer

    take_step = Trainer.train_step

    def step_or_fail(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.step == FAIL_AT:
            what()
        return take_step(trainer, *arguments)

    Trainer.train_step = step_or_fail  # type: ignore[method-assign]


if __name__ == "__main__":
    how, rank = sys.argv.pop(1), sys.argv.pop(1)
    args, lifeline = train.parse_args(), Lifeline.of_launch()
    if how == "impatient":
        shared_storage.PATIENCE_S = 1.0
    elif os.environ["RANK"] == rank:
        let_happen(lambda: fail(how))
    elif how == "kill and stop":
        let_happen(lambda: be_told_to_stop(lifeline))
    sys.exit(exit_with_message(lambda: train.main(args, lifeline), lifeline))
