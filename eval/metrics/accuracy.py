"""Accuracy metrics: functions of the target's rank r and of its negative log-likelihood.

Ties. When the scorer says that t items share the target's score (`num_tied`), the metric is its expectation
over a random order of those t positions, so that a constant scorer scores exactly like chance (HR@K = K /
I). A fractional rank without num_tied is used as it is.

Legend: N test samples, I catalogue entries.
"""

from __future__ import annotations

import numpy as np

from eval.intervals import Statistic, mean_statistic
from eval.metrics.base import Metric
from eval.metrics.inputs import Inputs


def _expected_gain(inputs: Inputs, gain_at: np.ndarray, num_counted: int) -> np.ndarray:
    """Mean gain [N] over the tied positions.

    Args:
        gain_at: [num_counted] gain at positions 1..num_counted; it is zero beyond.
    """
    first = np.rint(inputs.rank - (inputs.num_tied - 1) / 2).astype(int)  # best position of the tied block
    last = (first + inputs.num_tied - 1).astype(int)
    cumulative = np.concatenate([[0.0], np.cumsum(gain_at)])
    blocks = cumulative[np.minimum(last, num_counted)] - cumulative[np.minimum(first - 1, num_counted)]
    return blocks / inputs.num_tied


def _untied(inputs: Inputs) -> np.ndarray:
    return inputs.num_tied == 1


def hit_rates(inputs: Inputs, k: int) -> np.ndarray:
    """[N] probability that the target is in the top k: 1[r <= k]."""
    return np.where(_untied(inputs), inputs.rank <= k, _expected_gain(inputs, np.ones(k), k)).astype(float)


def gains(inputs: Inputs, k: int) -> np.ndarray:
    """[N] normalised discounted gain of a single target: 1[r <= k] / log2(r + 1)."""
    direct = np.where(inputs.rank <= k, 1 / np.log2(inputs.rank + 1), 0.0)
    return np.where(_untied(inputs), direct, _expected_gain(inputs, 1 / np.log2(np.arange(k) + 2), k))


def reciprocal_ranks(inputs: Inputs) -> np.ndarray:
    """[N] 1 / r over the whole catalogue, no cut-off."""
    size = inputs.num_items
    tied = _expected_gain(inputs, 1 / np.arange(1, size + 1), size)
    return np.where(_untied(inputs), 1 / inputs.rank, tied)


def rank_shares(inputs: Inputs) -> np.ndarray:
    """[N] (r - 1) / (I - 1): 0 is first, 1 is last, 0.5 is chance."""
    return (inputs.rank - 1) / max(1, inputs.num_items - 1)


def hr(inputs: Inputs, k: int) -> Statistic:
    return mean_statistic(hit_rates(inputs, k), (0, 1))


def ndcg(inputs: Inputs, k: int) -> Statistic:
    return mean_statistic(gains(inputs, k), (0, 1))


def mrr(inputs: Inputs, k: int | None = None) -> Statistic:
    return mean_statistic(reciprocal_ranks(inputs), (0, 1))


def nll(inputs: Inputs, k: int | None = None) -> Statistic | None:
    if not np.isfinite(inputs.target_nll).any():
        return None
    return mean_statistic(inputs.target_nll, (0, np.inf))


def mean_rank_share(inputs: Inputs, k: int | None = None) -> Statistic:
    return mean_statistic(rank_shares(inputs), (0, 1))


METRICS = (
    Metric(
        "ndcg@{k}",
        ndcg,
        "accuracy",
        "how high the target stands in the top K",
        True,
        ks="all",
        primary=10,
        needs_ranks=True,
    ),
    Metric(
        "hr@{k}",
        hr,
        "accuracy",
        "share of targets in the top K",
        True,
        ks="all",
        primary=10,
        needs_ranks=True,
    ),
    Metric(
        "mrr",
        mrr,
        "accuracy",
        "mean of 1 / rank over the whole catalogue",
        True,
        primary=True,
        needs_ranks=True,
    ),
    Metric("nll", nll, "accuracy", "negative log-likelihood of the target item, nats", False, primary=True),
    Metric(
        "mean_rank_share",
        mean_rank_share,
        "accuracy",
        "mean rank: 0 first, 0.5 chance, 1 last",
        False,
        needs_ranks=True,
    ),
)
