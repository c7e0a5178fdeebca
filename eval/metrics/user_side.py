"""User-side metrics: whom the model serves badly. The tail of samples (CVaR) and the worst relevance group.

Legend: N test samples, B bootstrap replicates.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from eval.intervals import Statistic
from eval.metrics.accuracy import rank_shares
from eval.metrics.base import Metric
from eval.metrics.inputs import Inputs
from eval.metrics.slices import pool_small, relevance_names, summary_statistics

TAIL = 0.1  # CVaR looks at the worst tenth of the samples


def tail_mean(
    values_N: np.ndarray,
    higher_is_better: bool,
    tail: float = TAIL,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Statistic:
    """CVaR: mean over the worst `tail` share of the samples. The boundary sample counts with its fraction."""
    values = np.asarray(values_N, dtype=np.float64)
    valid = np.flatnonzero(np.isfinite(values))
    order = valid[np.argsort(values[valid] if higher_is_better else -values[valid], kind="stable")]
    ordered = values[order]
    one_hot = sparse.csr_matrix(
        (np.ones(order.size), (order, np.arange(order.size))), shape=(values.size, order.size)
    )

    def finish(counts: np.ndarray) -> np.ndarray:  # [B, N] how often each sample, worst first, is drawn
        mass = tail * counts.sum(axis=1, keepdims=True)
        before = np.cumsum(counts, axis=1) - counts
        return (np.clip(mass - before, 0, counts) @ ordered) / mass[:, 0]

    return Statistic(one_hot, finish, int(valid.size), smooth=False, bounds=bounds)


def cvar_nll(inputs: Inputs, k: int | None = None) -> Statistic | None:
    """Mean NLL of the worst tenth of the samples."""
    if not np.isfinite(inputs.target_nll).any():
        return None
    return tail_mean(inputs.target_nll, higher_is_better=False, bounds=(0, np.inf))


def cvar_rank_share(inputs: Inputs, k: int | None = None) -> Statistic:
    """Mean of (r - 1) / (I - 1) over the worst-ranked tenth of the samples."""
    return tail_mean(rank_shares(inputs), higher_is_better=False, bounds=(0, 1))


def relevance_worst_nll(inputs: Inputs, k: int | None = None) -> Statistic | None:
    """Largest mean NLL over the relevance groups: what Group DRO minimises."""
    return _over_relevance(inputs, "worst")


def relevance_gap_nll(inputs: Inputs, k: int | None = None) -> Statistic | None:
    """Largest minus smallest mean NLL over the relevance groups."""
    return _over_relevance(inputs, "gap")


def _over_relevance(inputs: Inputs, summary: str) -> Statistic | None:
    known = inputs.relevance_group >= 0
    if len(np.unique(inputs.relevance_group[known])) < 2 or not np.isfinite(inputs.target_nll).any():
        return None
    names = pool_small(relevance_names(inputs))
    return summary_statistics(inputs.target_nll, names, higher_is_better=False)[summary]


METRICS = (
    Metric("cvar_nll", cvar_nll, "user", "mean NLL of the worst tenth of the samples", False, primary=True),
    Metric(
        "cvar_rank_share",
        cvar_rank_share,
        "user",
        "mean rank share of the worst-ranked tenth",
        False,
        needs_ranks=True,
    ),
    Metric(
        "nll_worst_relevance_group", relevance_worst_nll, "user", "NLL of the worst relevance group", False
    ),
    Metric(
        "nll_gap_relevance_group",
        relevance_gap_nll,
        "user",
        "largest minus smallest relevance group NLL",
        False,
    ),
)
