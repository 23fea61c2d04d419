"""The errors whose message is all that people need.

A `UserError` is caused by what a user gave and says what was found, what was needed and what to do;
exit code 2. A `StoppedError` ends a run that was going well and says why and how it goes on.
`train.py` and `unidec-ds` print both without a traceback; any other exception is our own fault
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


class StoppedError(RuntimeError):
    """A run stopped; raised on every rank alike, so that all of them leave in order."""

    exit_code = 1


class SaveError(StoppedError):
    """A checkpoint could not be written; the one before it is intact."""


class NonFiniteError(StoppedError):
    """A loss or gradient is not finite; nothing was saved (which rows moved: `finite`)."""


class StopRequestedError(StoppedError):
    """A signal asked the run to stop; its state is saved.

    The exit code is sysexits' EX_TEMPFAIL, not 128 + signal: that is how a shell reports a process
    that a signal ended before it could save.
    """

    exit_code = 75
