"""Settings that all audits share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AuditOptions:
    """Settings that audits share.

    Attributes:
        users: number of users that are looked at; None = the audit's own default.
        permutations: random orders of every history (`position`). Controls permute labels 200 times, whatever
            this number is.
        runs: other run or evaluation folders, for audits over several of them.
        num_bootstrap: resamples of the intervals.
        seed: of the choice of users, of permutations and of resamples.
    """

    users: int | None = None
    permutations: int = 8
    runs: tuple[str, ...] = ()
    num_bootstrap: int = 1000
    seed: int = 0


DEFAULT_OPTIONS = AuditOptions()
