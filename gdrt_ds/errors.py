"""The one exception that users see for their own mistakes: it names the setting, its value and the fix.

Entry points print it without a traceback and exit with its status (see `runtime.report_user_errors`). The
statuses of a process are:

    0    finished
    1    a bug
    2    the user's mistake; NaN and out of memory too, because a setting has to change
    70   this rank hung, or a peer of it is dead
    74   no space for what has to be written
    75   interrupted after a checkpoint: please requeue
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_INTERRUPTED = 75
"""EX_TEMPFAIL of sysexits.h. The other statuses stand at the errors that they belong to."""


class UserError(Exception):
    """A mistake in a setting, a file or a combination of them.

    Args:
        problem: one sentence that names the setting or file and its value.
        fix: one sentence that says what to do.
    """

    status = 2  # exit status

    def __init__(self, problem: str, fix: str = ""):
        self.problem = problem
        self.fix = fix
        text = problem
        if fix:
            text += f"\n  fix: {fix}"
        super().__init__(text)


class StorageError(UserError):
    """A file system that does not take a checkpoint (full, read-only).

    Nothing is wrong with the settings, and a restart can go on.
    """

    status = 74  # EX_IOERR of sysexits.h


class LostPeer(UserError):
    """Another rank died or hangs; nothing is wrong with the settings."""

    status = 70  # EX_SOFTWARE of sysexits.h


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `did you mean X?` for the nearest known name, or the list of what is known."""
    names = list(known)
    close = nearest_name(name, names)
    if close is not None:
        return f"did you mean `{close}`?"
    return f"known: {', '.join(names)}"


def did_you_mean(name: str, known: Iterable[str], before: str = "") -> str:
    """Returns `; did you mean X?` for the end of a sentence, or nothing where no known name is near.

    Args:
        before: what stands before every known name, e.g. their folder.
    """
    close = nearest_name(name, known)
    if close is None:
        return ""
    return f"; did you mean `{before}{close}`?"


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that was probably meant, or None."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if not close:
        return None
    return close[0]


def similarity(first: str, second: str) -> float:
    """Returns how alike two names are, from 0 to 1."""
    return difflib.SequenceMatcher(None, first, second).ratio()
