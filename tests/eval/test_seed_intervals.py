"""Means over several seeds: how often equal rows are told apart, and what is found where they differ."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from eval.intervals import Resampled, compare, compare_family, interval
from eval.study.seeds import combine, t_interval


def several_seeds(rng, num_seeds, shift, of_seeds, of_users, num_replicates=100):
    """A row over several seeds: replicates as those of a mean over users that all rows are asked with."""
    values = shift + of_seeds * rng.normal(size=num_seeds)
    values += of_users * rng.normal(size=num_seeds)
    draws = of_users * rng.normal(size=(num_seeds, num_replicates))
    seeds = [
        Resampled(value, value + drawn, 500, True, (-math.inf, math.inf))
        for value, drawn in zip(values, draws, strict=True)
    ]
    return combine(seeds)


def share_called_different(num_seeds, shift, of_seeds, of_users, trials=600):
    """(by the p-value, by the interval, by the verdict) of two rows that differ by `shift`."""
    rng = np.random.default_rng(num_seeds)
    found = np.zeros(3)
    for _ in range(trials):
        pair = [several_seeds(rng, num_seeds, by, of_seeds, of_users) for by in (0, shift)]
        row = compare_family({"m": pair[0]}, {"m": pair[1]}, ["m"], {"m": True})["m"]
        found += [row.p_holm <= 0.05, not row.ci_low <= 0 <= row.ci_high, row.verdict in ("better", "worse")]
    return found / trials


@pytest.mark.parametrize("num_seeds", [2, 3, 4])
def test_equal_rows_of_few_seeds_are_told_apart_about_5_times_in_100(num_seeds):
    """With the spread between seeds alone corrected, and no degrees of freedom, it was 36 with two seeds."""
    shares = share_called_different(num_seeds, 0, of_seeds=1, of_users=0.002)
    assert np.all((0.025 <= shares) & (shares <= 0.08)), shares
    # Where seeds hardly differ, users decide.
    shares = share_called_different(num_seeds, 0, of_seeds=0.002, of_users=1)
    assert np.all(shares <= 0.08), shares


@pytest.mark.parametrize("num_seeds, shift", [(2, 60), (3, 12)])
def test_a_large_difference_of_few_seeds_is_still_found(num_seeds, shift):
    shares = share_called_different(num_seeds, shift, of_seeds=1, of_users=0.002, trials=200)
    assert np.all(shares >= 0.95), shares


def test_the_detectable_difference_of_three_seeds_is_found_about_80_times_in_100():
    """It follows from the true error: sqrt(2 / 3) for two rows of three seeds with a spread of one."""
    shift = 5.6535 * math.sqrt(2 / 3)  # noncentral t, two degrees of freedom
    shares = share_called_different(3, shift, of_seeds=1, of_users=0.002)
    assert np.all((0.75 <= shares) & (shares <= 0.85)), shares
    pair = [several_seeds(np.random.default_rng(0), 3, 0, 1, 0.002) for _ in range(2)]
    differences = pair[1].seed_values - pair[0].seed_values
    error = differences.std(ddof=1) / math.sqrt(3)
    assert compare(*pair).minimum_detectable == pytest.approx(5.6535 * error, rel=0.01)


def test_an_interval_over_seeds_keeps_the_shape_of_the_users_where_seeds_do_not_differ():
    users = np.random.default_rng(0).exponential(size=1000) - 1
    alone = Resampled(0.0, users, 100, True, (-math.inf, math.inf))
    same = combine([alone, alone, alone])
    assert interval(same) == pytest.approx(interval(alone))
    seeds = [replace(alone, value=value, replicates=value + 0 * users) for value in (1.0, 2.0, 4.0)]
    _, low, high = t_interval([1.0, 2.0, 4.0])
    assert interval(combine(seeds)) == pytest.approx((low, high))


def test_a_mean_over_seeds_is_not_paired_with_one_training():
    alone = Resampled(0.0, np.arange(10.0), 100, True, (-math.inf, math.inf))
    with pytest.raises(ValueError, match="several seeds"):
        compare(combine([alone, alone]), alone)
