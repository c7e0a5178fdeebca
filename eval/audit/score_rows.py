"""What rows of catalogue scores say: probabilities, lists, ranks, exposure and how unequal it is.

Legend: U users, I catalogue entries, k length of the lists.
"""

from __future__ import annotations

import numpy as np


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
    """[U, I], [U] -> expected 1-based rank of each target under ties; NaN scores stand last."""
    keys = np.where(np.isnan(scores), -np.inf, scores)
    own = keys[np.arange(len(keys)), targets][:, None]
    better = (keys > own).sum(axis=1)
    equal = (keys == own).sum(axis=1)
    return 1 + better + (equal - 1) / 2


def ndcg(rank: np.ndarray, k: int = 10) -> np.ndarray:
    """Gain of one relevant item at each rank: 1 / log2(rank + 1) within the first k."""
    return np.where(rank <= k, 1 / np.log2(rank + 1), 0.0)


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
