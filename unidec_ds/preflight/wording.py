"""Words that the page, the warnings and the refusals share."""

from __future__ import annotations

from unidec_ds.preflight.memory import Place, Stage

STAGES: dict[Stage, str] = {
    "always": "all the time",
    "step": "in a training step",
    "evaluation": "in an evaluation",
    "mining": "while mining",
    "checkpoint": "while a checkpoint is written",
}
"""When memory is needed, in the order of the page."""

PLACES: dict[Place, str] = {
    "host": "host memory",
    "device": "accelerator memory",
    "nvme": "mapped files under nvme_path",
}
"""Where it is needed, likewise."""


def in_words(num_bytes: int) -> str:
    """Returns such as "1.87 GiB"."""
    for exponent, unit in ((30, "GiB"), (20, "MiB")):
        if num_bytes >= 1 << exponent:
            return f"{num_bytes / 2**exponent:,.2f} {unit}"
    return f"{num_bytes / 1024:,.2f} KiB"
