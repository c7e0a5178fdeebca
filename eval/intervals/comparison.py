"""Two runs on the same users: paired bootstrap, effect sizes, Holm's correction, and a verdict in words.

Legend: U users, M metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import nctdtrinc, ndtri, stdtr, stdtrit

from eval.intervals.interval import (
    FEW_USERS,
    interval,
    rounding,
    shows_no_spread,
    small_sample,
    total_error,
)
from eval.intervals.resampling import Resampled

POWER = 0.8  # a true difference of the detectable size is found in four of five test sets
FEW = "too few users to say"
NO_SPREAD = "no user alone changes it"
NEARLY_NORMAL = 1e4  # degrees of freedom from which on the noncentral t distribution is a moved normal one


@dataclass
class Comparison:
    """One metric of a run against the baseline, on the same users and the same draws of them.

    Attributes:
        baseline, value: the metric of the baseline and of the run.
        difference: value - baseline, with its 95 % interval `ci_low` to `ci_high` and its `p_value`.
        effect_size: difference / (standard error * sqrt(U)), U the users that both values rest on. For means
            this is Cohen's d_z, and curved statistics get the same scale.
        minimum_detectable: the smallest true difference that is found with 80 % power at the 5 % level with
            these users and seeds.
        n: samples that the smaller of the two values rests on.
        family: whether Holm's correction runs over this metric.
        p_holm, ci_holm: the corrected p-value, and the interval at the corrected level; None outside the
            family.
        verdict: the result in words.
    """

    baseline: float
    value: float
    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    effect_size: float
    minimum_detectable: float
    n: int
    family: bool = False
    p_holm: float | None = None
    ci_holm: tuple[float, float] | None = None
    verdict: str = field(default="")


def compare(baseline: Resampled, other: Resampled, level: float = 0.95) -> Comparison:
    """Paired bootstrap difference `other - baseline`.

    Both must come from `resample` with the same seed and users, or be means over the same trainings' seeds
    of such values.
    """
    difference = other.value - baseline.value
    paired = _paired(baseline, other)
    low, high = interval(paired, level)
    # One user has no spread: neither an error nor a p-value.
    error, degrees = total_error(paired)
    zero = rounding(baseline.value, other.value)
    if error <= zero:
        error = 0.0
    if error == 0 and shows_no_spread(paired):
        if abs(difference) <= zero:  # there is nothing to explain
            low, high = difference, difference
        else:  # other users could well show nothing of it
            error = float("nan")
    return Comparison(
        baseline=baseline.value,
        value=other.value,
        difference=difference,
        ci_low=low,
        ci_high=high,
        p_value=_p_value(paired, error, degrees, zero),
        effect_size=_effect_size(0.0 if abs(difference) <= zero else difference, error, paired.units),
        minimum_detectable=_detectable(paired, error, degrees, level),
        n=min(baseline.n, other.n),
    )


def _p_value(paired: Resampled, error: float, degrees: float, zero: float) -> float:
    """How often a difference at least as large is met by chance; NaN where nothing says it.

    Args:
        error, degrees: of the difference, from `total_error`; an error of rounding is 0, one that nothing
            shows is NaN.
        zero: up to which a difference is rounding.
    """
    finite = paired.replicates[np.isfinite(paired.replicates)]
    size = abs(paired.value)
    if not np.isfinite(size) or not np.isfinite(error):
        return float("nan")
    smallest = 1.0 / (finite.size + 1)  # replicates cannot show more
    if error == 0:
        if size <= zero:
            return 1.0
        # The same difference for every user: how often have all of them one sign by chance?
        return max(smallest, 2.0 ** (1 - paired.units))
    if paired.seed_values is not None:
        return max(smallest, float(2 * stdtr(degrees, -size / error)))
    # The replicates moved to the null.
    moved = small_sample(paired.units) * np.abs(finite - finite.mean())
    return _by_student((1 + np.sum(moved >= size)) / (finite.size + 1), paired.units)


def _detectable(paired: Resampled, error: float, degrees: float, level: float) -> float:
    """The true difference that is found with the probability POWER.

    With several seeds the statistic follows the noncentral t distribution.
    """
    tail = (1 + level) / 2
    if paired.seed_values is None or error == 0 or not np.isfinite(degrees):
        return float((ndtri(tail) + ndtri(POWER)) * error)
    return float(nctdtrinc(min(degrees, NEARLY_NORMAL), 1 - POWER, stdtrit(degrees, tail)) * error)


def _by_student(p_value: float, units: int) -> float:
    """The p-value of few users: what is this far out under a normal law, under Student's t."""
    if units >= FEW_USERS:
        return float(p_value)
    return float(2 * stdtr(units - 1, ndtri(p_value / 2)))


def _effect_size(difference: float, error: float, units: int) -> float:
    """difference / (standard error * sqrt(U)); 0 for identical predictions, NaN where it is undefined."""
    if error > 0:
        return float(difference / (error * np.sqrt(units)))
    return 0.0 if difference == 0 else float("nan")


def _paired(baseline: Resampled, other: Resampled) -> Resampled:
    """The difference of two statistics, draw by draw and seed by seed."""
    seed_values = None
    if baseline.seed_values is not None and other.seed_values is not None:
        seed_values = other.seed_values - baseline.seed_values
    elif baseline.seed_values is not None or other.seed_values is not None:
        raise ValueError("a mean over several seeds cannot be paired with the value of one training")
    return Resampled(
        other.value - baseline.value,
        other.replicates - baseline.replicates,
        min(baseline.n, other.n),
        baseline.smooth and other.smooth,
        (-np.inf, np.inf),
        min(baseline.units, other.units),
        seed_values,
        baseline.linearised or other.linearised,
    )


def holm(p_values: Sequence[float], alpha: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Holm's step-down correction (Holm 1979).

    Returns:
        adjusted p-values [M], and the level alpha / (M - j) that the j-th smallest p-value is tested at [M].
        NaN p-values keep NaN and do not count as tests.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    levels = np.full(p.shape, np.nan)
    tested = np.flatnonzero(np.isfinite(p))
    running = 0.0
    for j, index in enumerate(tested[np.argsort(p[tested], kind="stable")]):
        running = max(running, min(1.0, (tested.size - j) * p[index]))
        adjusted[index] = running
        levels[index] = alpha / (tested.size - j)
    return adjusted, levels


def compare_family(
    baseline: Mapping[str, Resampled],
    other: Mapping[str, Resampled],
    family: Sequence[str],
    higher_is_better: Mapping[str, bool | None],
    level: float = 0.95,
) -> dict[str, Comparison]:
    """Compares all shared metrics.

    Holm's correction runs over the metrics of `family` only; the rest is descriptive. An interval of a
    family member is also given at its Holm level (`ci_holm`), and the verdict in words follows the adjusted
    p-value: "interval spans zero", "better" or "worse" (or "differs" where neither direction is better). What
    only the correction takes away is called "interval spans zero after Holm's correction". Where the
    corrected interval excludes zero and the corrected p-value is too large, it is "not shown after Holm's
    correction". A difference without a p-value is called "too few users to say" or "no user alone changes
    it".
    """
    names = [name for name in other if name in baseline]
    rows = {name: compare(baseline[name], other[name], level) for name in names}
    members = [name for name in names if name in set(family)]
    adjusted, levels = holm([rows[name].p_value for name in members], 1 - level)
    for name, p_holm, alpha in zip(members, adjusted, levels):
        rows[name].family = True
        rows[name].p_holm = float(p_holm)
        if np.isfinite(alpha):
            rows[name].ci_holm = interval(_paired(baseline[name], other[name]), 1 - alpha)
    for name, row in rows.items():
        unknown = NO_SPREAD
        if min(baseline[name].units, other[name].units) < 2:
            unknown = FEW
        row.verdict = _verdict(row, higher_is_better.get(name), 1 - level, unknown)
    return rows


def _verdict(row: Comparison, higher_is_better: bool | None, alpha: float, unknown: str) -> str:
    """The comparison in words; a metric outside the family is marked as uncorrected.

    Args:
        unknown: the verdict where there is no p-value.
    """
    if not np.isfinite(row.difference):
        return "not defined"
    if not np.isfinite(row.p_value):
        return unknown
    zero = rounding(row.baseline, row.value)
    # Near-identical runs have intervals of curved statistics that begin at zero and miss it by a hair.
    spans_zero = row.ci_low <= zero and row.ci_high >= -zero or row.p_value > alpha
    if row.family and row.ci_holm is not None:
        low, high = row.ci_holm
        excludes_zero = low > zero or high < -zero
        significant = row.p_holm is not None and row.p_holm <= alpha
        if excludes_zero and not significant:
            return "not shown after Holm's correction"
        if not excludes_zero:
            return "interval spans zero" if spans_zero else "interval spans zero after Holm's correction"
    elif spans_zero:
        return "interval spans zero"
    if higher_is_better is None:
        return "differs"
    word = "better" if (row.difference > 0) == higher_is_better else "worse"
    return word if row.family else f"{word} (uncorrected)"
