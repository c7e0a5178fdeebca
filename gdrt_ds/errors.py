"""The one exception that users see for their own mistakes: it names the setting, its value, what is allowed and the fix.

Entry points print it without a traceback and exit with status 2 (see `runtime.report_user_errors`).
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a setting, a file or a combination of them.

    Args:
        problem: one sentence that names the setting or file and its value.
        fix: one sentence that says what to do.
    """

    def __init__(self, problem: str, fix: str = ""):
        self.problem, self.fix = problem, fix
        super().__init__(f"{problem}\n  fix: {fix}" if fix else problem)
