"""How `train.py`, `unidec-ds` and the scripts leave: one message, one exit code, over all ranks."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from unidec_ds.errors import StoppedError, StopRequestedError, UserError
from unidec_ds.lifeline import ALONE, Lifeline, PeerFailedError

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


def exit_with_message(main: Callable[[], None], lifeline: Lifeline = ALONE) -> int:
    """Runs `main` and returns the exit code: 0 done, 1 failed, 2 the input was wrong, 75 stopped.

    What the message says in full (a user's mistake, why a run stopped, a full disk) is printed
    without a traceback. Of several ranks the one that failed first prints; those that failed alike
    print nothing, the others a line that names it. All leave with its exit code.
    """
    try:
        main()
    except (UserError, StoppedError) as error:
        prefix = "" if isinstance(error, StopRequestedError) else "error: "
        return _leave(lifeline, error, str(error), f"{prefix}{error}\n", error.exit_code)
    except BrokenPipeError as error:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _leave(lifeline, error, "the reader of its output has gone", "", 1)
    except KeyboardInterrupt as error:
        return _leave(lifeline, error, "interrupted", "interrupted\n", 130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_IS_FULL:
            text = f"the disk is full: {error}; free disk space"
            return _leave(lifeline, error, text, f"error: {text}\n", 1)
        rank = os.environ.get("RANK", "0")
        lines = traceback.format_exc().splitlines(keepends=True)
        text = "".join(f"[rank {rank}] {line}" for line in lines)
        return _leave(lifeline, error, f"{type(error).__name__}: {error}", text, 1)
    finally:
        lifeline.close()
    return 0


def _leave(
    lifeline: Lifeline, error: BaseException, summary: str, text: str, exit_code: int
) -> int:
    """Prints a failure and returns the exit code; of several ranks, ends this one."""
    if lifeline.world_size > 1:
        from unidec_ds.comm import is_peer_failure  # imports torch: seconds

        with suppress(Exception):  # it may fail before it has met the others
            lifeline.open(timedelta(seconds=60))
        is_consequence = isinstance(error, PeerFailedError) or is_peer_failure(error)
        verdict = lifeline.fail(summary, exit_code, is_consequence=is_consequence)
        exit_code = verdict.exit_code
        if verdict.rank != lifeline.rank:
            is_alike = verdict.summary == summary
            text = "" if is_alike else f"[rank {lifeline.rank}] stopped: {verdict.describe()}\n"
    sys.stderr.write(text)
    lifeline.leave(exit_code)
    return exit_code
