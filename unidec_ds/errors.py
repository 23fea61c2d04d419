"""The errors that a user's input can cause.

Every message says what was found, what was needed and what to do. `train.py` and `unidec-ds`
print it without a traceback and leave with exit code 2; any other exception is our own fault
and leaves with exit code 1 and a traceback.
"""


class UserError(ValueError):
    """Something the user gave cannot be used."""

    exit_code = 2


class ConfigError(UserError):
    """A recipe, an override or a ds_config is wrong. Lists every fault found, not only the first.

    Args:
        source: the file or option that was read.
        faults: one sentence per fault, each starting with the dotted key.
    """

    def __init__(self, source: str, faults: list[str]) -> None:
        self.source = source
        self.faults = faults
        super().__init__(
            f"{source}: {len(faults)} fault{'s' if len(faults) != 1 else ''}\n  "
            + "\n  ".join(faults)
        )


class CorpusError(UserError):
    """A corpus file is missing, malformed or inconsistent."""


class CheckpointError(UserError):
    """A checkpoint or a run directory is missing, damaged or does not belong here."""
