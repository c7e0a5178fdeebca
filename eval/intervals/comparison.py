"""Two runs on the same users: paired bootstrap, effect sizes, Holm's correction, and a verdict in words.

Legend: U users, M metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import ndtri, stdtr

from eval.intervals.interval import FEW_USERS, interval, small_sample
from eval.intervals.resampling import Resampled

POWER = 0.8  # a true difference of the detectable size is found in four of five test sets
ROUNDING = 1e-12  # a difference or standard error below this, for values up to 1, is rounding noise


@dataclass
class Comparison:
    """One metric of a run against the baseline, on the same users and the same draws of them.

    Attributes:
        baseline, value: the metric of the baseline and of the run.
        difference: value - baseline, with its 95 % interval `ci_low` to `ci_high` and its `p_value`.
        effect_size: difference / (standard error * sqrt(U)). For means this is Cohen's d_z, and curved
            statistics get the same scale.
        minimum_detectable: the smallest true difference that is found with 80 % power at the 5 % level with
            these users.
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


def compare(baseline: Resampled, other: Resampled, num_users: int, level: float = 0.95) -> Comparison:
    """Paired bootstrap difference `other - baseline`.

    Both must come from `resample` with the same seed and users.
    """
    difference = other.value - baseline.value
    paired = _paired(baseline, other)
    low, high = interval(paired, level)
    finite = paired.replicates[np.isfinite(paired.replicates)]
    # One user has no spread: neither an error nor a p-value.
    error = paired.standard_error * small_sample(paired.units) if paired.units > 1 else float("nan")
    rounding = _rounding(baseline.value, other.value)
    if error <= rounding:
        error = 0.0
    if finite.size == 0 or not np.isfinite(difference) or paired.units < 2:
        p_value = float("nan")
    elif error == 0:  # the same difference for every user: how often have all of them one sign by chance?
        one_sign = max(1.0 / (finite.size + 1), 2.0 ** (1 - paired.units))
        p_value = 1.0 if abs(difference) <= rounding else one_sign
    else:  # the replicates moved to the null: how often is a difference this large met by chance?
        moved = small_sample(paired.units) * np.abs(finite - finite.mean())
        p_value = _by_student((1 + np.sum(moved >= abs(difference))) / (finite.size + 1), paired.units)
    power = (ndtri((1 + level) / 2) + ndtri(POWER)) * error
    return Comparison(
        baseline=baseline.value,
        value=other.value,
        difference=difference,
        ci_low=low,
        ci_high=high,
        p_value=float(p_value),
        effect_size=_effect_size(0.0 if abs(difference) <= rounding else difference, error, num_users),
        minimum_detectable=float(power),
        n=min(baseline.n, other.n),
    )


def _rounding(baseline: float, value: float) -> float:
    """What the arithmetic may leave of a difference of zero between two values of this size."""
    return ROUNDING * max(1.0, abs(baseline), abs(value))


def _by_student(p_value: float, units: int) -> float:
    """The p-value of few users: what is this far out under a normal law, under Student's t."""
    if units >= FEW_USERS:
        return p_value
    return float(2 * stdtr(units - 1, ndtri(p_value / 2)))


def _effect_size(difference: float, error: float, num_users: int) -> float:
    """difference / (standard error * sqrt(U)); 0 for identical predictions, NaN where it is undefined."""
    if error > 0:
        return float(difference / (error * np.sqrt(num_users)))
    return 0.0 if difference == 0 else float("nan")


def _paired(baseline: Resampled, other: Resampled) -> Resampled:
    """The difference of two statistics, draw by draw."""
    return Resampled(
        other.value - baseline.value,
        other.replicates - baseline.replicates,
        min(baseline.n, other.n),
        baseline.smooth and other.smooth,
        (-np.inf, np.inf),
        min(baseline.units, other.units),
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
    num_users: int,
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
    correction".
    """
    names = [name for name in other if name in baseline]
    rows = {name: compare(baseline[name], other[name], num_users, level) for name in names}
    members = [name for name in names if name in set(family)]
    adjusted, levels = holm([rows[name].p_value for name in members], 1 - level)
    for name, p_holm, alpha in zip(members, adjusted, levels):
        rows[name].family = True
        rows[name].p_holm = float(p_holm)
        if np.isfinite(alpha):
            rows[name].ci_holm = interval(_paired(baseline[name], other[name]), 1 - alpha)
    for name, row in rows.items():
        row.verdict = _verdict(row, higher_is_better.get(name), 1 - level)
    return rows


def _verdict(row: Comparison, higher_is_better: bool | None, alpha: float) -> str:
    """The comparison in words; a metric outside the family is marked as uncorrected."""
    if not np.isfinite(row.difference):
        return "not defined"
    if not np.isfinite(row.p_value):
        return "too few users to say"
    zero = _rounding(row.baseline, row.value)
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
