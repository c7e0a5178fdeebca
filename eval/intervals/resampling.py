"""The bootstrap over users: a metric as a `Statistic`, and its values on many resampled sets of users.

Everything here rests on one idea. A metric is a `Statistic`: additive features per test sample and a
function of their totals. NDCG is (sum of gains) / (number of samples). MGU is a function of the number of
recommendations per label. Coverage and Gini are functions of the number of recommendations per item. A
bootstrap replicate draws users with replacement, so its totals are `weights @ features`, and a thousand
replicates are one matrix product.

Legend: N test samples, U users, F features, B bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import sparse

Matrix = np.ndarray | sparse.csr_matrix

# Resampled totals (float64) of one chunk of replicates: bounds the memory that a large catalogue takes.
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class Statistic:
    """A metric as a function of additive totals.

    Attributes:
        features: [N, F], dense or CSR. Metrics may share one matrix, whose totals are then resampled once.
        finish: totals [B, F] -> values [B]; NaN where the totals do not define the metric.
        n: number of test samples that the value rests on.
        smooth: True for ratios of sums (percentile interval), False for curved statistics (centred interval).
        bounds: range of the metric. Centred intervals are cut to it.
        influence: (user features [U, F], totals [F]) -> [U], what the value loses without each user. Where
            it is given, the interval is the linearised one.
    """

    features: Matrix
    finish: Callable[[np.ndarray], np.ndarray]
    n: int
    smooth: bool = True
    bounds: tuple[float, float] = (-np.inf, np.inf)
    influence: Callable[[Matrix, np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True, eq=False)
class Resampled:
    """Estimate and bootstrap replicates of one statistic.

    Attributes:
        value: the estimate on all users.
        replicates: float64 [B], the same statistic on each draw of users; NaN where a draw does not define
            it.
        n: number of test samples that the value rests on.
        smooth, bounds: of the `Statistic`.
        users: users that the value rests on, at most n; None where each sample is a user of its own.
        seed_values: float64 [S], the estimate of each of several trainings, whose mean is `value`; None for
            one training. The replicates are then those of the mean, so they hold no spread over seeds.
        linearised: whether the replicates come from influences.
    """

    value: float
    replicates: np.ndarray
    n: int
    smooth: bool
    bounds: tuple[float, float]
    users: int | None = None
    seed_values: np.ndarray | None = None
    linearised: bool = False

    @property
    def units(self) -> int:
        """Independent units that the value rests on."""
        return self.n if self.users is None else min(self.users, self.n)

    @property
    def standard_error(self) -> float:
        """Over users: standard deviation of the finite replicates; NaN with fewer than two."""
        finite = self.replicates[np.isfinite(self.replicates)]
        if finite.size < 2:
            return float("nan")
        return float(finite.std(ddof=1))

    @property
    def seed_variance(self) -> float:
        """Variance of the mean over seeds, from the spread between them; 0 for one training."""
        if self.seed_values is None:
            return 0.0
        return float(np.var(self.seed_values, ddof=1) / self.seed_values.size)


def ratio(totals_BF: np.ndarray) -> np.ndarray:
    """First total over second total; NaN where the second is zero. [B, 2] -> [B]."""
    numerator, denominator = totals_BF[:, 0], totals_BF[:, 1]
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0)


def mean_statistic(values_N: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Statistic:
    """Mean over the samples with a finite value. Their number is the statistic's n."""
    values = np.asarray(values_N, dtype=np.float64)
    finite = np.isfinite(values)
    features = np.stack([np.where(finite, values, 0.0), finite.astype(np.float64)], axis=1)
    return Statistic(features, ratio, int(finite.sum()), smooth=True, bounds=bounds)


def user_weights(num_users: int, num_bootstrap: int, seed: int) -> np.ndarray:
    """How often each replicate draws each user: [B, U] float64, every row sums to U."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, num_users, size=(num_bootstrap, num_users))
    # Each replicate gets its own range of numbers, so that one count serves all replicates.
    draws += np.arange(num_bootstrap)[:, None] * num_users
    counts = np.bincount(draws.ravel(), minlength=num_bootstrap * num_users)
    return counts.reshape(num_bootstrap, num_users).astype(np.float64)


def resample(
    statistics: Mapping[str, Statistic], user_of_sample: np.ndarray, num_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Resampled]:
    """Bootstraps all statistics over the same users with the same draws.

    Args:
        user_of_sample: [N] index of each sample's user, 0..U-1. All samples of a user are drawn together
            (cluster bootstrap).
    Returns:
        one `Resampled` per name. The same seed gives the same draws, whatever the set of statistics.
    """
    user_of_sample = np.asarray(user_of_sample)
    num_users = int(user_of_sample.max()) + 1
    by_user = _sum_by_user(user_of_sample, num_users)
    weights = user_weights(num_users, num_bootstrap, seed)

    values: dict[str, float] = {}
    replicates: dict[str, np.ndarray] = {}
    users: dict[str, int] = {}
    for names in _sharing_features(statistics):
        features = statistics[names[0]].features
        if by_user is not None:
            features = by_user @ features
        total_1F = np.asarray(features.sum(axis=0), dtype=np.float64).reshape(1, -1)
        users |= dict.fromkeys(names, _users_in(features))
        redrawn = []
        for name in names:
            values[name] = float(_finish(statistics[name], total_1F)[0])
            influence = statistics[name].influence
            if influence is None:
                redrawn.append(name)
                continue
            with np.errstate(invalid="ignore", divide="ignore"):
                replicates[name] = values[name] + (weights - 1) @ influence(features, total_1F[0])
        replicates |= _redraw({name: statistics[name] for name in redrawn}, features, weights)
    return {
        name: Resampled(
            values[name],
            replicates[name],
            s.n,
            s.smooth,
            s.bounds,
            users[name],
            linearised=s.influence is not None,
        )
        for name, s in statistics.items()
    }


def _users_in(features: Matrix) -> int:
    """Users with a part in the totals: a sample that a statistic leaves out has features of zero."""
    filled = features.getnnz(axis=1) if sparse.issparse(features) else np.count_nonzero(features, axis=1)
    return int(np.count_nonzero(filled))


def _sum_by_user(user_of_sample: np.ndarray, num_users: int) -> sparse.csr_matrix | None:
    """[U, N] matrix that sums samples by user; None when every sample is its own user, in order."""
    num_samples = user_of_sample.size
    if num_users == num_samples and np.array_equal(user_of_sample, np.arange(num_samples)):
        return None
    return sparse.csr_matrix(
        (np.ones(num_samples), (user_of_sample, np.arange(num_samples))), shape=(num_users, num_samples)
    )


def _sharing_features(statistics: Mapping[str, Statistic]) -> list[list[str]]:
    """Names of the statistics, together where they share a feature matrix: its totals are resampled once."""
    sharing: dict[int, list[str]] = {}
    for name, statistic in statistics.items():
        sharing.setdefault(id(statistic.features), []).append(name)
    return list(sharing.values())


def _redraw(
    statistics: Mapping[str, Statistic], features: Matrix, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Values [B] of statistics that share `features` [U, F], on the draws of users in `weights` [B, U]."""
    if not statistics:
        return {}
    num_bootstrap = len(weights)
    replicates = {name: np.empty(num_bootstrap) for name in statistics}
    transposed = features.T.tocsr() if sparse.issparse(features) else None
    chunk = max(1, CHUNK_BYTES // (8 * max(1, features.shape[1])))
    for start in range(0, num_bootstrap, chunk):
        part = weights[start : start + chunk]
        if transposed is None:
            totals_BF = part @ features
        else:  # CSR @ dense is the fast direction of a sparse product
            totals_BF = np.ascontiguousarray((transposed @ np.ascontiguousarray(part.T)).T)
        for name, statistic in statistics.items():
            replicates[name][start : start + chunk] = _finish(statistic, totals_BF)
    return replicates


def _finish(statistic: Statistic, totals: np.ndarray) -> np.ndarray:
    """The statistic of totals [B, F]; undefined ones are NaN and no warning."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(statistic.finish(totals), dtype=np.float64)
