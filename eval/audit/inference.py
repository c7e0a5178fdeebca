"""Estimates with intervals, permutation tests and the few statistics that several audits share. Pure numpy.

Legend: N units (users or items), B bootstrap replicates, F columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number with its bootstrap interval. `null` is its value where the bias is absent; None = no such value."""

    value: float
    low: float
    high: float
    n: int
    null: float | None = 0.0

    @property
    def spans_null(self) -> bool:
        """True also where the interval is not defined: then nothing is shown."""
        return self.null is None or not (self.low > self.null or self.high < self.null)

    def text(self, digits: int = 3) -> str:
        """`0.41 [0.30, 0.52]`, and says so when the interval spans the null value."""
        plain = f"{self.value:.{digits}g} [{self.low:.{digits}g}, {self.high:.{digits}g}]"
        return plain + (
            f" (the interval spans {self.null:g})" if self.null is not None and self.spans_null else ""
        )

    def as_dict(self) -> dict[str, float | int | None]:
        keep = lambda x: float(x) if x is not None and np.isfinite(x) else None  # noqa: E731
        return {
            "value": keep(self.value),
            "ci_low": keep(self.low),
            "ci_high": keep(self.high),
            "n": self.n,
            "null": keep(self.null),
        }


def bootstrap(
    rows: np.ndarray,
    statistic: Callable[[np.ndarray], float | np.ndarray] = None,
    *,
    null: float | None = 0.0,
    num: int = 1000,
    seed: int = 0,
) -> Estimate | list[Estimate]:
    """Percentile interval of a statistic over resampled rows.

    Args:
        rows: [N] or [N, F]; one row per independent unit (one per user, or one per item).
        statistic: rows -> number or vector; None = mean of a 1-D array, by one matrix product.
    Returns:
        an Estimate, or a list of them for a vector statistic.
    """
    rows = np.asarray(rows, dtype=np.float64)
    n, rng = len(rows), np.random.default_rng(seed)
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0, null)
    draws = rng.integers(0, n, size=(num, n))
    if statistic is None:
        value, replicates = np.mean(rows, axis=0), rows[draws].mean(axis=1)
    else:
        value, replicates = (
            np.asarray(statistic(rows), float),
            np.array([statistic(rows[d]) for d in draws], dtype=float),
        )
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    if np.ndim(value) == 0:
        return _estimate(float(value), replicates, tails, n, null)
    return [_estimate(float(v), replicates[:, j], tails, n, null) for j, v in enumerate(value)]


def _estimate(
    value: float, replicates: np.ndarray, tails: list[float], n: int, null: float | None
) -> Estimate:
    finite = replicates[np.isfinite(replicates)]
    low, high = np.quantile(finite, tails) if len(finite) else (np.nan, np.nan)
    return Estimate(value, float(low), float(high), n, null)


def ranks(values: np.ndarray) -> np.ndarray:
    """Average ranks 1..N; ties share theirs."""
    from scipy.stats import rankdata

    return rankdata(values)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson; 0 where one side is constant (nothing varies together)."""
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    return correlation(ranks(x), ranks(y))


def permutation_p(observed: float, null_values: np.ndarray) -> float:
    """One-sided p that a permuted value is at least the observed one; never 0 (Phipson & Smyth 2010)."""
    null_values = np.asarray(null_values)
    return float((1 + np.sum(null_values >= observed - 1e-12)) / (len(null_values) + 1))


def least_squares(predictors: np.ndarray, outcome: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Standardised regression.

    Args:
        predictors: [N, F]. outcome: [N].
    Returns:
        betas [F] (standard deviations of the outcome per standard deviation of the predictor), partial R^2 [F] (share of
        the variance left by the other predictors that this one explains), R^2.
    """
    x, y = _standardised(predictors), _standardised(outcome[:, None])[:, 0]
    betas = np.linalg.lstsq(x, y, rcond=None)[0]
    total, residual = float(y @ y), float(np.sum((y - x @ betas) ** 2))
    partial = np.zeros(x.shape[1])
    for j in range(x.shape[1]):
        others = np.delete(x, j, axis=1)
        left = y - others @ np.linalg.lstsq(others, y, rcond=None)[0] if others.shape[1] else y
        rest = float(left @ left)
        partial[j] = (rest - residual) / rest if rest > 0 else 0.0
    return betas, partial, 1 - residual / total if total > 0 else 0.0


def _standardised(columns: np.ndarray) -> np.ndarray:
    columns = columns - columns.mean(axis=0)
    spread = columns.std(axis=0)
    return columns / np.where(spread > 0, spread, 1.0)


def gini(counts: np.ndarray) -> float:
    """0 = even, near 1 = one takes all; zeros count."""
    values = np.sort(np.asarray(counts, dtype=float))
    n, total = len(values), values.sum()
    return float((2 * np.arange(1, n + 1) - n - 1) @ values / (n * total)) if total > 0 else float("nan")


def entropy(shares: np.ndarray) -> float:
    """Nats; zeros contribute nothing."""
    p = np.asarray(shares, dtype=float)
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Log scores [..., I] -> probabilities over the catalogue that sum to one (NaN scores count as impossible)."""
    scores = np.where(np.isnan(scores), -np.inf, scores)
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def top_lists(scores: np.ndarray, k: int) -> np.ndarray:
    """[U, I] -> [U, k] best first; ties in a fixed pseudo-random order of the items, so that none has an advantage by its place."""
    order = np.random.default_rng(0).permutation(scores.shape[1])
    keys = np.where(np.isnan(scores), -np.inf, scores)[:, order]
    return order[np.argsort(-keys, axis=1, kind="stable")[:, :k]]


def exposure(lists: np.ndarray, num_items: int) -> np.ndarray:
    """[U, k] -> [I] how many lists hold each item."""
    return np.bincount(lists.ravel(), minlength=num_items).astype(np.float64)


def target_ranks(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[U, I], [U] -> expected 1-based rank of each target under ties; NaN scores stand last."""
    keys = np.where(np.isnan(scores), -np.inf, scores)
    own = keys[np.arange(len(keys)), targets][:, None]
    better, equal = (keys > own).sum(axis=1), (keys == own).sum(axis=1)
    return 1 + better + (equal - 1) / 2


def ndcg(rank: np.ndarray, k: int = 10) -> np.ndarray:
    """Gain of one relevant item at each rank: 1 / log2(rank + 1) within the first k."""
    return np.where(rank <= k, 1 / np.log2(rank + 1), 0.0)
