"""Bootstrap over users: intervals for every figure, paired comparisons of runs, Holm's correction, effect sizes.

Everything here rests on one idea. A metric is a `Statistic`: additive features per test sample and a function of their
totals. NDCG is (sum of gains) / (number of samples); MGU is a function of the number of recommendations per item group;
coverage and Gini are functions of the number of recommendations per item. A bootstrap replicate draws users with
replacement, so its totals are `weights @ features`, and a thousand replicates are one matrix product.

Intervals are 95 % intervals of one of three kinds:
- `percentile` for ratios of sums (means), whose bootstrap distribution is centred on the estimate;
- `centred` for curved statistics (|differences|, maxima): noise makes |GP - GH| of a resample too large on average, so the
  spread is right and the place is not; the percentile interval is moved by (estimate - bootstrap mean) and cut to the range;
- `linearised` for statistics over single items (coverage, Gini, entropy): a resample holds 63 % of the users, so items that
  one user alone was shown vanish or are doubled, and the resampled statistic has neither the right place nor the right spread
  (a quarter of the variance for such items). Instead each user gets an influence, the value with minus the value without
  them, and the replicates are estimate + (weights - 1) @ influences: the bootstrap of the infinitesimal jackknife.

Legend: N test samples, U users, F features, B bootstrap replicates, M metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Mapping, Sequence

import numpy as np
from scipy import sparse
from scipy.special import ndtri

Matrix = np.ndarray | sparse.csr_matrix
CHUNK_BYTES = (
    64 << 20
)  # resampled totals of one chunk of replicates (float64); bounds memory for large catalogues


@dataclass(frozen=True, eq=False)
class Statistic:
    """A metric as a function of additive totals.

    features: [N, F], dense or CSR; metrics may share one matrix, whose totals are then resampled once.
    finish: totals [B, F] -> values [B]; NaN where the totals do not define the metric.
    smooth: True for ratios of sums (percentile interval), False for curved statistics (centred interval).
    influence: (user features [U, F], totals [F]) -> [U], what the value loses without each user; makes the interval linearised.
    bounds: range of the metric; centred intervals are cut to it.
    n: number of test samples that the value rests on.
    """

    features: Matrix
    finish: Callable[[np.ndarray], np.ndarray]
    n: int
    smooth: bool = True
    bounds: tuple[float, float] = (-np.inf, np.inf)
    influence: Callable[[Matrix, np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True, eq=False)
class Resampled:
    """Estimate and bootstrap replicates of one statistic."""

    value: float
    replicates: np.ndarray  # [B]
    n: int
    smooth: bool
    bounds: tuple[float, float]

    @property
    def standard_error(self) -> float:
        finite = self.replicates[np.isfinite(self.replicates)]
        return float(finite.std(ddof=1)) if finite.size > 1 else float("nan")


def ratio(totals_BF: np.ndarray) -> np.ndarray:
    """First total over second total; NaN where the second is zero. [B, 2] -> [B]."""
    numerator, denominator = totals_BF[:, 0], totals_BF[:, 1]
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0)


def mean_statistic(values_N: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Statistic:
    """Mean over the samples with a finite value (their number is the statistic's n)."""
    values = np.asarray(values_N, dtype=np.float64)
    finite = np.isfinite(values)
    return Statistic(
        np.stack([np.where(finite, values, 0.0), finite.astype(np.float64)], axis=1),
        ratio,
        int(finite.sum()),
        True,
        bounds,
    )


def user_weights(num_users: int, num_bootstrap: int, seed: int) -> np.ndarray:
    """How often each replicate draws each user: [B, U] float64, every row sums to U."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, num_users, size=(num_bootstrap, num_users))
    draws += np.arange(num_bootstrap)[:, None] * num_users
    return (
        np.bincount(draws.ravel(), minlength=num_bootstrap * num_users)
        .reshape(num_bootstrap, num_users)
        .astype(np.float64)
    )


def resample(
    statistics: Mapping[str, Statistic], user_of_sample: np.ndarray, num_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Resampled]:
    """Bootstrap all statistics over the same users with the same draws.

    user_of_sample: [N] index of each sample's user, 0..U-1; all samples of a user are drawn together (cluster bootstrap).
    Returns one `Resampled` per name. The same seed gives the same draws, whatever the set of statistics.
    """
    user_of_sample = np.asarray(user_of_sample)
    num_samples, num_users = user_of_sample.size, int(user_of_sample.max()) + 1
    by_user = None  # [U, N]; None when every sample is its own user, in order
    if num_users != num_samples or not np.array_equal(user_of_sample, np.arange(num_samples)):
        by_user = sparse.csr_matrix(
            (np.ones(num_samples), (user_of_sample, np.arange(num_samples))), shape=(num_users, num_samples)
        )
    weights = user_weights(num_users, num_bootstrap, seed)

    sharing: dict[int, list[str]] = {}
    for name, statistic in statistics.items():
        sharing.setdefault(id(statistic.features), []).append(name)
    values, replicates = {}, {name: np.empty(num_bootstrap) for name in statistics}
    for names in sharing.values():
        features = statistics[names[0]].features
        features = features if by_user is None else by_user @ features
        total_1F = np.asarray(features.sum(axis=0), dtype=np.float64).reshape(1, -1)
        for name in names:
            values[name] = float(_finish(statistics[name], total_1F)[0])
            if statistics[name].influence is not None:
                with np.errstate(invalid="ignore", divide="ignore"):
                    replicates[name] = values[name] + (weights - 1) @ statistics[name].influence(
                        features, total_1F[0]
                    )
        names = [name for name in names if statistics[name].influence is None]
        if not names:
            continue
        transposed = (
            features.T.tocsr() if sparse.issparse(features) else None
        )  # CSR @ dense is the fast direction
        chunk = max(1, CHUNK_BYTES // (8 * max(1, features.shape[1])))
        for start in range(0, num_bootstrap, chunk):
            part = weights[start : start + chunk]
            totals_BF = (
                part @ features
                if transposed is None
                else np.ascontiguousarray((transposed @ np.ascontiguousarray(part.T)).T)
            )
            for name in names:
                replicates[name][start : start + chunk] = _finish(statistics[name], totals_BF)
    return {
        name: Resampled(values[name], replicates[name], s.n, s.smooth, s.bounds)
        for name, s in statistics.items()
    }


def _finish(statistic: Statistic, totals: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(statistic.finish(totals), dtype=np.float64)


def interval(sample: Resampled, level: float = 0.95) -> tuple[float, float]:
    """Two-sided bootstrap interval (see the module's docstring for its kinds); NaN without replicates."""
    finite = sample.replicates[np.isfinite(sample.replicates)]
    if finite.size == 0 or not np.isfinite(sample.value):
        return float("nan"), float("nan")
    edge = [bound for bound in sample.bounds if np.isfinite(bound) and np.all(finite == bound)]
    if (
        edge and np.isfinite(sample.bounds).all()
    ):  # no hit in any replicate (or nothing but hits): resampling shows no spread
        if not sample.smooth:
            return float("nan"), float("nan")
        # n draws without a single success leave a success rate of up to 1 - (alpha/2)^(1/n) plausible (Clopper-Pearson);
        # a mean of values in [0, 1] is below its rate of non-zero values
        reach = (1 - ((1 - level) / 2) ** (1 / max(1, sample.n))) * (sample.bounds[1] - sample.bounds[0])
        return (
            (float(edge[0]), float(edge[0] + reach))
            if edge[0] == sample.bounds[0]
            else (float(edge[0] - reach), float(edge[0]))
        )
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    if not sample.smooth:
        shift = sample.value - finite.mean()
        low, high = np.clip([low + shift, high + shift], *sample.bounds)
    return float(low), float(high)


@dataclass
class Comparison:
    """One metric of a run against the baseline, same users, same draws."""

    baseline: float
    value: float
    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    effect_size: float  # difference / (standard error * sqrt(U)): Cohen's d_z for means, the same scale for curved statistics
    minimum_detectable: (
        float  # smallest true difference found with 80 % power at the 5 % level with these users
    )
    n: int
    family: bool = False
    p_holm: float | None = None
    ci_holm: tuple[float, float] | None = None
    verdict: str = field(default="")


def compare(baseline: Resampled, other: Resampled, num_users: int, level: float = 0.95) -> Comparison:
    """Paired bootstrap difference `other - baseline`; both must come from `resample` with the same seed and users."""
    difference = other.value - baseline.value
    paired = _paired(baseline, other)
    low, high = interval(paired, level)
    finite = paired.replicates[np.isfinite(paired.replicates)]
    error = paired.standard_error
    if finite.size == 0 or not np.isfinite(difference):
        p_value = float("nan")
    elif error == 0:
        p_value = 1.0 if difference == 0 else 1.0 / (finite.size + 1)
    else:  # the replicates moved to the null: how often is a difference this large met by chance?
        p_value = (1 + np.sum(np.abs(finite - finite.mean()) >= abs(difference))) / (finite.size + 1)
    # error below rounding noise: identical predictions, where no effect size is defined
    effect = (
        difference / (error * np.sqrt(num_users))
        if error > 1e-12
        else (0.0 if difference == 0 else float("nan"))
    )
    power = (ndtri((1 + level) / 2) + ndtri(0.8)) * error
    return Comparison(
        baseline.value,
        other.value,
        difference,
        low,
        high,
        float(p_value),
        float(effect),
        float(power),
        min(baseline.n, other.n),
    )


def _paired(baseline: Resampled, other: Resampled) -> Resampled:
    smooth = baseline.smooth and other.smooth
    return Resampled(
        other.value - baseline.value,
        other.replicates - baseline.replicates,
        min(baseline.n, other.n),
        smooth,
        (-np.inf, np.inf),
    )


def holm(p_values: Sequence[float], alpha: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Holm's step-down correction.

    Returns (adjusted p-values [M], level alpha / (M - j) that the j-th smallest p-value is tested at [M]). NaN p-values keep NaN
    and do not count as tests.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted, levels = np.full(p.shape, np.nan), np.full(p.shape, np.nan)
    tested = np.flatnonzero(np.isfinite(p))
    running = 0.0
    for j, index in enumerate(tested[np.argsort(p[tested], kind="stable")]):
        running = max(running, min(1.0, (tested.size - j) * p[index]))
        adjusted[index], levels[index] = running, alpha / (tested.size - j)
    return adjusted, levels


def compare_family(
    baseline: Mapping[str, Resampled],
    other: Mapping[str, Resampled],
    num_users: int,
    family: Sequence[str],
    higher_is_better: Mapping[str, bool | None],
    level: float = 0.95,
) -> dict[str, Comparison]:
    """Compare all shared metrics; Holm's correction runs over the metrics of `family` only, the rest is descriptive.

    An interval of a family member is also given at its Holm level (`ci_holm`), and the verdict in words follows the
    adjusted p-value: "interval spans zero", "better" or "worse" (or "differs" where neither direction is better).
    """
    names = [name for name in other if name in baseline]
    rows = {name: compare(baseline[name], other[name], num_users, level) for name in names}
    members = [name for name in names if name in set(family)]
    adjusted, levels = holm([rows[name].p_value for name in members], 1 - level)
    for name, p_holm, alpha in zip(members, adjusted, levels):
        rows[name].family, rows[name].p_holm = True, float(p_holm)
        if np.isfinite(alpha):
            rows[name].ci_holm = interval(_paired(baseline[name], other[name]), 1 - alpha)
    for name, row in rows.items():
        row.verdict = _verdict(row, higher_is_better.get(name), 1 - level)
    return rows


def _verdict(row: Comparison, higher_is_better: bool | None, alpha: float) -> str:
    if not np.isfinite(row.difference):
        return "not defined"
    if row.family and row.ci_holm is not None:
        low, high = row.ci_holm
        clear = row.p_holm is not None and row.p_holm <= alpha and (low > 0 or high < 0)
        if not clear:
            return (
                "interval spans zero"
                if row.ci_low <= 0 <= row.ci_high
                else "interval spans zero after Holm's correction"
            )
    elif row.ci_low <= 0 <= row.ci_high:
        return "interval spans zero"
    if higher_is_better is None:
        return "differs"
    word = "better" if (row.difference > 0) == higher_is_better else "worse"
    return word if row.family else f"{word} (uncorrected)"
