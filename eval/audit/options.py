"""Settings that all audits share."""

from __future__ import annotations

from dataclasses import dataclass

from eval.numbers import FEWEST_RESAMPLES, USUAL_RESAMPLES, refuse_below


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
        batch_size: prompts in one pass.
        max_score_bytes: bound on the working memory of a scoring of the catalogue, as in `ScoringOptions`.

    Raises:
        UserError: fewer than 2 users or permutations, or too few resamples for an interval.
    """

    users: int | None = None
    permutations: int = 8
    runs: tuple[str, ...] = ()
    num_bootstrap: int = 1000
    seed: int = 0
    batch_size: int = 8
    max_score_bytes: int = 2 << 30

    def __post_init__(self):
        refuse_below(2, "--audit-users", self.users, "an audit compares users")
        refuse_below(2, "--permutations", self.permutations, "one order has no spread")
        refuse_below(FEWEST_RESAMPLES, "--bootstrap", self.num_bootstrap, USUAL_RESAMPLES)


DEFAULT_OPTIONS = AuditOptions()
