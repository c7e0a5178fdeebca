"""Robustness: how far lists move when something that should not matter changes, and how much accuracy a shift costs.

For audits that score the same samples several times (histories permuted, titles noised) or in several environments
(temporal bins, cold items). Lists are rows of entry indices or ids, best first, without repeats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def jaccard(first: Sequence, second: Sequence) -> float:
    """|A and B| / |A or B| of two lists as sets; 1 for two empty lists."""
    a, b = set(first), set(second)
    return len(a & b) / len(a | b) if a | b else 1.0


def rank_biased_overlap(first: Sequence, second: Sequence, persistence: float = 0.9) -> float:
    """RBO of two lists cut to their shared length, extrapolated (Webber, Moffat & Zobel 2010, equation 23 for even lists).

    The agreement at depth d (shared share of the first d items) weighs persistence^(d-1); identical lists give 1, disjoint ones 0.
    """
    depth = min(len(first), len(second))
    if depth == 0:
        return 1.0 if len(first) == len(second) else 0.0
    seen_a, seen_b, shared, total = set(), set(), 0, 0.0
    for d in range(1, depth + 1):
        a, b = first[d - 1], second[d - 1]
        shared += 1 if a == b else int(a in seen_b) + int(b in seen_a)
        seen_a.add(a)
        seen_b.add(b)
        total += shared / d * persistence**d
    return shared / depth * persistence**depth + (1 - persistence) / persistence * total


def kendall_tau(first: Sequence, second: Sequence) -> float:
    """Kendall's tau of the items that both lists hold: (concordant - discordant) pairs / pairs; NaN for fewer than two."""
    place = {item: position for position, item in enumerate(second)}
    order = np.array([place[item] for item in first if item in place])
    pairs = order.size * (order.size - 1) / 2
    return (
        float(np.triu(np.sign(order[None, :] - order[:, None]), 1).sum() / pairs) if pairs else float("nan")
    )


def relative_drop(before: float, after: float) -> float:
    """(before - after) / before: 0.1 is a tenth lost; NaN where nothing was there to lose."""
    return (before - after) / before if before else float("nan")


def worst_environment(values: Mapping[str, float], higher_is_better: bool = True) -> tuple[str, float]:
    """Name and value of the environment that is served worst; ties go to the first."""
    finite = {name: v for name, v in values.items() if v is not None and np.isfinite(v)}
    if not finite:
        raise ValueError("no environment has a value")
    name = (min if higher_is_better else max)(finite, key=finite.get)
    return name, finite[name]
