"""What rows of catalogue scores say: probabilities, lists, ranks, exposure and how unequal it is.

Legend: U users, I catalogue entries, k length of the lists.
"""

from __future__ import annotations

import numpy as np

from eval.scoring.ranking import TIE


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Log scores [..., I] -> probabilities that sum to one over the catalogue. NaN counts as impossible."""
    scores = np.where(np.isnan(scores), -np.inf, scores)
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def top_lists(scores: np.ndarray, k: int) -> np.ndarray:
    """[U, I] -> entry indices [U, k], best first.

    Ties stand in a fixed pseudo-random order of the items, so that no item has an advantage by its place in
    the catalogue.
    """
    order = np.random.default_rng(0).permutation(scores.shape[1])
    keys = np.where(np.isnan(scores), -np.inf, scores)[:, order]
    return order[np.argsort(-keys, axis=1, kind="stable")[:, :k]]


def exposure(lists: np.ndarray, num_items: int) -> np.ndarray:
    """[U, k] -> [I] how many lists hold each item."""
    return np.bincount(lists.ravel(), minlength=num_items).astype(np.float64)


def target_ranks(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[U, I], [U] -> expected 1-based rank of each target under ties; a NaN score is the worst rank."""
    better, equal = _places(scores, targets)
    return 1 + better + (equal - 1) / 2


def target_gains(scores: np.ndarray, targets: np.ndarray, k: int = 10) -> np.ndarray:
    """[U, I], [U] -> NDCG@k of each target: 1 / log2(rank + 1) within the first k, expected under ties."""
    return _expected(scores, targets, 1 / np.log2(np.arange(k) + 2))


def target_hits(scores: np.ndarray, targets: np.ndarray, k: int = 10) -> np.ndarray:
    """[U, I], [U] -> probability that each target is among the first k under ties."""
    return _expected(scores, targets, np.ones(k))


def _expected(scores: np.ndarray, targets: np.ndarray, gain_at: np.ndarray) -> np.ndarray:
    """Mean gain [U] over the places that each target shares with its ties, as in `eval.metrics.accuracy`.

    Args:
        gain_at: gain at the places 1, 2, ...; it is zero beyond.
    """
    better, equal = _places(scores, targets)
    count = gain_at.size
    cumulative = np.concatenate([[0.0], np.cumsum(gain_at)])
    shared = cumulative[np.minimum(better + equal, count)] - cumulative[np.minimum(better, count)]
    # Without a tie the gain is that of one place, which a difference of sums would round.
    alone = np.append(gain_at, 0.0)[np.minimum(better, count)]
    return np.where(equal == 1, alone, shared / equal)


def _places(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[U] entries above each target, and [U] entries with its score (at most TIE away), itself included."""
    own = scores[np.arange(len(scores)), targets][:, None]
    with np.errstate(invalid="ignore"):  # infinite minus infinite
        equal = np.where(np.isfinite(own), np.abs(scores - own) <= TIE, scores == own)
    better = ((scores > own) & ~equal).sum(axis=1)
    unknown = np.isnan(own[:, 0])
    return np.where(unknown, scores.shape[1] - 1, better), np.where(unknown, 1, equal.sum(axis=1))


def gini(counts: np.ndarray) -> float:
    """Gini index: 0 = even, near 1 = one item takes all. Zeros count."""
    values = np.sort(np.asarray(counts, dtype=float))
    n = len(values)
    total = values.sum()
    if total <= 0:
        return float("nan")
    return float((2 * np.arange(1, n + 1) - n - 1) @ values / (n * total))


def entropy(shares: np.ndarray) -> float:
    """Shannon entropy in nats; zeros contribute nothing."""
    p = np.asarray(shares, dtype=float)
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())
