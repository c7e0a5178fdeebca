"""95 % bootstrap intervals of one of three kinds, chosen by what a `Statistic` says about itself.

- `percentile` for ratios of sums (means). Their bootstrap distribution is centred on the estimate.
- `centred` for curved statistics (absolute differences, maxima). Noise makes |GP - GH| of a resample too
  large on average, so the spread of the replicates is right and their place is not. The percentile interval
  is moved by (estimate - bootstrap mean) and cut to the metric's range.
- `linearised` for statistics over single items (coverage, Gini, entropy). A resample holds 63 % of the
  users, so items that one user alone was shown vanish or are doubled, and the resampled statistic has
  neither the right place nor the right spread (a quarter of the variance for such items). Instead each user
  gets an influence, the value with them minus the value without them, and the replicates are estimate +
  (weights - 1) @ influences. This is the bootstrap of the infinitesimal jackknife; `resample` makes the
  replicates, and the interval is then centred.

With few users the bootstrap is too sure: its spread is that of U users and not of U - 1, and its quantiles
are nearly those of a normal distribution. Below FEW_USERS an interval is therefore widened to Student's t.
One user has no spread at all, so there is no interval.

The mean over S trainings (`Resampled.seed_values`) varies over users and over seeds. The variances add up,
but that over seeds is known from S values only. Student's t with Satterthwaite's degrees of freedom
(Satterthwaite 1946, Biometrics Bulletin 2:110-114) allows for that:

    degrees = (V_users + V_seeds)^2 / (V_seeds^2 / (S - 1) + V_users^2 / (U - 1))

The term of the users counts below FEW_USERS alone; from there on their variance is taken as known. Each side
of the interval is the root of the squares of what the users' replicates reach and of what a normal law of the
seeds reaches, times Student's quantile over the normal one. Where seeds hardly differ this is the interval
over users in its own shape; where users hardly differ it is Student's interval over the seeds' values.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri, stdtrit

from eval.intervals.resampling import Resampled

UNDEFINED = (float("nan"), float("nan"))

ROUNDING = 1e-12
"""A difference or standard error below this, for values up to 1, is rounding noise."""

FEW_USERS = 30
"""Below this a comparison of two equal runs would too often find a difference: with 10 users in 18 % of the
cases instead of 5 %, with 20 in 7 % (four metrics, Holm's correction). At 30 the widening is 6 %."""


def small_sample(units: int) -> float:
    """What the spread of replicates is multiplied with so that it is that of U - 1 units: sqrt(U / (U - 1)).

    1 from FEW_USERS on.

    Args:
        units: at least 2; a single unit has no spread.
    """
    return 1.0 if units >= FEW_USERS else float(np.sqrt(units / (units - 1)))


def widening(units: int, level: float = 0.95) -> float:
    """By what an interval of fewer than FEW_USERS units is wider than the quantiles of its replicates say."""
    tail = (1 + level) / 2
    return small_sample(units) * float(stdtrit(units - 1, tail) / ndtri(tail))


def total_error(sample: Resampled) -> tuple[float, float]:
    """(standard error over users and seeds, its degrees of freedom); see the module's docstring.

    The degrees are infinite where the error is taken as known. Both are NaN for a single user.
    """
    if sample.units < 2:
        return float("nan"), float("nan")
    of_users = (sample.standard_error * small_sample(sample.units)) ** 2
    of_seeds = sample.seed_variance
    unknown = 0.0
    if sample.units < FEW_USERS:
        unknown += of_users**2 / (sample.units - 1)
    if sample.seed_values is not None:
        unknown += of_seeds**2 / (sample.seed_values.size - 1)
    total = of_users + of_seeds
    degrees = total**2 / unknown if unknown > 0 else float("inf")
    return float(np.sqrt(total)), float(degrees)


def _over_seeds_too(sample: Resampled, bounds: np.ndarray, mean: float, level: float) -> np.ndarray:
    """Widens quantiles of the replicates [2] around their mean by the spread over seeds."""
    tail = (1 + level) / 2
    _, degrees = total_error(sample)
    student = float(stdtrit(degrees, tail) / ndtri(tail))
    of_users = small_sample(sample.units) * (bounds - mean)
    reach = student * np.hypot(of_users, ndtri(tail) * np.sqrt(sample.seed_variance))
    return mean + np.array([-1.0, 1.0]) * reach


def interval(sample: Resampled, level: float = 0.95) -> tuple[float, float]:
    """Two-sided bootstrap interval (see the module's docstring for its kinds).

    NaN without replicates, and for a linearised statistic that no single user changes: an influence of zero
    is no proof that other users would leave the value where it is.
    """
    finite = sample.replicates[np.isfinite(sample.replicates)]
    if finite.size == 0 or not np.isfinite(sample.value):
        return UNDEFINED
    edge = _edge_of_range(sample, finite)
    if edge is not None:
        if not sample.smooth:
            return UNDEFINED
        return _reach_from_edge(sample, edge, level)
    if sample.units < 2 or shows_no_spread(sample):
        return UNDEFINED
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    mean = finite.mean()
    if sample.seed_values is not None:
        low, high = _over_seeds_too(sample, np.array([low, high]), mean, level)
    elif sample.units < FEW_USERS:
        low, high = mean + widening(sample.units, level) * (np.array([low, high]) - mean)
    if not sample.smooth:
        low, high = np.array([low, high]) + (sample.value - mean)
    low, high = np.clip([low, high], *sample.bounds)
    return float(low), float(high)


def shows_no_spread(sample: Resampled) -> bool:
    """Whether a linearised statistic has the same value in every replicate and for every seed.

    Coverage is such a case where every item that is shown at all is shown to two users or more.
    """
    if not sample.linearised or sample.seed_variance > 0:
        return False
    finite = sample.replicates[np.isfinite(sample.replicates)]
    return bool(np.ptp(finite) <= rounding(sample.value)) if finite.size else True


def rounding(*values: float) -> float:
    """What the arithmetic may leave of a difference of zero between values of this size."""
    return ROUNDING * max(1.0, *(abs(value) for value in values))


def _edge_of_range(sample: Resampled, finite: np.ndarray) -> float | None:
    """The end of a bounded metric's range on which every replicate lies; None otherwise.

    No hit in any replicate, or nothing but hits: resampling then shows no spread.
    """
    if not np.isfinite(sample.bounds).all():
        return None
    for bound in sample.bounds:
        if np.all(finite == bound):
            return float(bound)
    return None


def _reach_from_edge(sample: Resampled, edge: float, level: float) -> tuple[float, float]:
    """The interval of a mean whose replicates all lie on an end of its range.

    U users without a single success leave a success rate of up to 1 - (alpha / 2)^(1 / U) plausible
    (Clopper-Pearson). Samples of one user may share their fate, so it is users that count. A mean of values
    in [0, 1] is below its rate of non-zero values.
    """
    lowest, highest = sample.bounds
    reach = (1 - ((1 - level) / 2) ** (1 / max(1, sample.units))) * (highest - lowest)
    if edge == lowest:
        return edge, float(edge + reach)
    return float(edge - reach), edge
