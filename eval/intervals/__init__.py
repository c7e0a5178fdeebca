"""Intervals over users: resampling, interval, paired comparison of two runs, correction for many tests.

    samples = resample(statistics, user_of_sample)     # the same draws of users for every statistic
    low, high = interval(samples["ndcg@10"])
    rows = compare_family(baseline_samples, samples, family, higher_is_better)

`resampling.py` says how a metric becomes a `Statistic` and why a thousand draws are one matrix product.
`interval.py` has the three kinds of intervals, `comparison.py` the paired bootstrap and Holm's correction.
"""

from eval.intervals.comparison import Comparison, compare, compare_family, holm
from eval.intervals.interval import interval
from eval.intervals.resampling import (
    Resampled,
    Statistic,
    mean_statistic,
    ratio,
    resample,
    user_weights,
)

__all__ = [
    "Comparison",
    "Resampled",
    "Statistic",
    "compare",
    "compare_family",
    "holm",
    "interval",
    "mean_statistic",
    "ratio",
    "resample",
    "user_weights",
]
