"""From scores to ranks and lists: ties, NaN and order, in one place.

A tie shares its places: the rank is the expected one under random order (1 + better + equal others / 2), so
that a constant scorer scores like chance. Scores closer than `TIE` count as equal: they are sums of the same
log-probabilities in another order. NaN is the worst rank, and counted by the caller.
"""

from __future__ import annotations

import numpy as np

TIE = 1e-9


def expected_rank(scores: np.ndarray, target: int) -> float:
    """1-based expected rank of entry `target` in float64 [items]; NaN entries stand behind all others."""
    if np.isnan(scores[target]):
        return float(len(scores))
    equal = _equal(scores, target)
    better = (scores > scores[target]) & ~equal
    return 1.0 + float(better.sum()) + (float(equal.sum()) - 1.0) / 2.0


def num_tied(scores: np.ndarray, target: int) -> int:
    """Entries that share the target's score, itself included (1 for NaN, which has the worst rank for
    certain).
    """
    return 1 if np.isnan(scores[target]) else int(_equal(scores, target).sum())


def _equal(scores: np.ndarray, target: int) -> np.ndarray:
    own = scores[target]
    with np.errstate(invalid="ignore"):
        return np.abs(scores - own) <= TIE if np.isfinite(own) else scores == own


def top_entries(scores: np.ndarray, k: int, order: np.ndarray) -> np.ndarray:
    """The k best entries, best first; equal scores by `order` (a rank per entry that does not depend on the
    catalogue's order, e.g. of its item ids). k larger than the catalogue gives all; NaN entries come last.
    """
    keys = np.where(np.isnan(scores), -np.inf, scores)
    k = min(k, len(keys))
    if k < len(keys):
        threshold = np.partition(keys, len(keys) - k)[len(keys) - k]
        candidates = np.flatnonzero(keys >= threshold)
    else:
        candidates = np.arange(len(keys))
    nan_last = np.isnan(scores[candidates])
    return candidates[np.lexsort((order[candidates], -keys[candidates], nan_last))][:k]
