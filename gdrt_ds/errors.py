"""The one exception that users see for their own mistakes: it names the setting, its value, what is
allowed and the fix.

Entry points print it without a traceback and exit with status 2 (see `runtime.report_user_errors`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a setting, a file or a combination of them.

    Args:
        problem: one sentence that names the setting or file and its value.
        fix: one sentence that says what to do.
    """

    status = 2  # exit status

    def __init__(self, problem: str, fix: str = ""):
        self.problem, self.fix = problem, fix
        super().__init__(f"{problem}\n  fix: {fix}" if fix else problem)


class StorageError(UserError):
    """A file system that does not take a checkpoint (full, read-only).

    Nothing is wrong with the settings, and a restart can go on.
    """

    status = 74  # EX_IOERR of sysexits.h


class LostPeer(UserError):
    """Another rank died or hangs; nothing is wrong with the settings."""

    status = 70  # EX_SOFTWARE of sysexits.h


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean X?` for the nearest known name, or the list of what is known."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean `{close[0]}`?"
    return f"known: {', '.join(names)}"
