"""Estimates with intervals, permutation tests, correlation and regression: the statistics that audits share.

Legend: N units (users or items), F columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from eval.intervals import Resampled, interval

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its bootstrap interval.

    Attributes:
        value, low, high: the number and the ends of its interval.
        n: independent units that it rests on.
        null: its value where the bias is absent; None = there is no such value.
    """

    value: float
    low: float
    high: float
    n: int
    null: float | None = 0.0

    @property
    def spans_null(self) -> bool:
        """True also where the interval is not defined: then nothing is shown."""
        if self.null is None:
            return True
        return not (self.low > self.null or self.high < self.null)

    @property
    def not_above_null(self) -> bool:
        """Whether the interval is known and does not lie above the null value.

        False where it is not defined: what was not measured is no finding that nothing is there.
        """
        assert self.null is not None
        return bool(np.isfinite(self.low) and self.low <= self.null)

    def minus(self, number: float) -> Estimate:
        """The estimate moved by a number that is known without error; its null value is then 0."""
        return Estimate(self.value - number, self.low - number, self.high - number, self.n, 0.0)

    def text(self, digits: int = 3) -> str:
        """`0.41 [0.30, 0.52]`, and says so when the interval spans the null value or is not defined."""
        if not (np.isfinite(self.low) and np.isfinite(self.high)):
            return f"{self.value:.{digits}g} (no interval)"
        plain = f"{self.value:.{digits}g} [{self.low:.{digits}g}, {self.high:.{digits}g}]"
        if self.null is not None and self.spans_null:
            return f"{plain} (the interval spans {self.null:.{digits}g})"
        return plain

    def as_dict(self) -> dict[str, float | int | None]:
        """As it stands in results.json; undefined numbers are None."""
        return {
            "value": _finite(self.value),
            "ci_low": _finite(self.low),
            "ci_high": _finite(self.high),
            "n": self.n,
            "null": _finite(self.null),
        }


def _finite(number: float | None) -> float | None:
    if number is None or not np.isfinite(number):
        return None
    return float(number)


def bootstrap(
    rows: np.ndarray,
    statistic: Callable[[np.ndarray], float | np.ndarray] | None = None,
    *,
    null: float | None = 0.0,
    num: int = 1000,
    seed: int = 0,
    bounds: tuple[float, float] | None = None,
) -> Estimate | list[Estimate]:
    """Interval of a statistic over resampled rows: the quantiles of the replicates.

    Below FEW_USERS rows it is widened as the intervals of metrics are (`eval.intervals.interval`).

    Args:
        rows: [N] or [N, F]; one row per independent unit (one per user, or one per item).
        statistic: rows -> number or vector; None = mean of a 1-D array, by one matrix product.
        null: the statistic's value where the bias is absent.
        num, seed: of the resamples.
        bounds: given for a curved statistic (a distance, a share of the largest, Gini, a maximum), the range
            of its values. Repeated rows make it too large on average, so its interval is moved by estimate -
            mean of the replicates and cut to this range. Where every replicate lies on one end of a finite
            range, resampling shows no spread, and the interval is undefined.
    Returns:
        an Estimate, or a list of them for a vector statistic.
    """
    rows = np.asarray(rows, dtype=np.float64)
    n = len(rows)
    rng = np.random.default_rng(seed)
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0, null)
    draws = rng.integers(0, n, size=(num, n))
    if statistic is None:
        value = np.mean(rows, axis=0)
        replicates = rows[draws].mean(axis=1)
    else:
        value = np.asarray(statistic(rows), float)
        replicates = np.array([statistic(rows[draw]) for draw in draws], dtype=float)
    if np.ndim(value) == 0:
        return of_replicates(float(value), replicates, n, null, bounds)
    return [of_replicates(float(v), replicates[:, j], n, null, bounds) for j, v in enumerate(value)]


def of_replicates(
    value: float,
    replicates: np.ndarray,
    n: int,
    null: float | None = 0.0,
    bounds: tuple[float, float] | None = None,
) -> Estimate:
    """An estimate with the interval that its replicates give; see `bootstrap`.

    Args:
        replicates: [B] the same number on resamples of the n units.
    """
    within = (-np.inf, np.inf) if bounds is None else bounds
    low, high = interval(Resampled(value, replicates, n, bounds is None, within), LEVEL)
    return Estimate(value, low, high, n, null)


def permutation_p(observed: float, null_values: np.ndarray) -> float:
    """One-sided p that a permuted value is at least the observed one; never 0 (Phipson & Smyth 2010)."""
    null_values = np.asarray(null_values)
    return float((1 + np.sum(null_values >= observed - 1e-12)) / (len(null_values) + 1))


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 where one side is constant, because then nothing varies together."""
    x = x - x.mean()
    y = y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation of the ranks 1..N; ties share their average rank."""
    return correlation(rankdata(x), rankdata(y))


def least_squares(predictors: np.ndarray, outcome: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Standardised regression.

    Args:
        predictors: [N, F].
        outcome: [N].
    Returns:
        betas [F]: standard deviations of the outcome per standard deviation of the predictor.
        partial R^2 [F]: share of the variance left by the other predictors that this one explains.
        R^2.
    """
    x = _standardised(predictors)
    y = _standardised(outcome[:, None])[:, 0]
    betas = np.linalg.lstsq(x, y, rcond=None)[0]
    total = float(y @ y)
    residual = float(np.sum((y - x @ betas) ** 2))
    partial = np.zeros(x.shape[1])
    for j in range(x.shape[1]):
        others = np.delete(x, j, axis=1)
        left = y
        if others.shape[1]:
            left = y - others @ np.linalg.lstsq(others, y, rcond=None)[0]
        rest = float(left @ left)
        partial[j] = (rest - residual) / rest if rest > 0 else 0.0
    return betas, partial, 1 - residual / total if total > 0 else 0.0


def _standardised(columns: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and standard deviation 1; constant columns become 0."""
    columns = columns - columns.mean(axis=0)
    spread = columns.std(axis=0)
    return columns / np.where(spread > 0, spread, 1.0)
