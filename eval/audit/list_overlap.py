"""How much two lists have in common. Lists are rows of entry indices or ids, best first, without repeats."""

from __future__ import annotations

from collections.abc import Sequence


def jaccard(first: Sequence, second: Sequence) -> float:
    """|A and B| / |A or B| of two lists as sets; 1 for two empty lists."""
    a = set(first)
    b = set(second)
    if not a | b:
        return 1.0
    return len(a & b) / len(a | b)


def rank_biased_overlap(first: Sequence, second: Sequence, persistence: float = 0.9) -> float:
    """Rank-biased overlap of two lists cut to their shared length (Webber, Moffat & Zobel 2010, equation 23).

    The agreement at depth d is the share of the first d items that both lists hold; it weighs
    persistence^(d-1). Beyond the shared length the last agreement is assumed to go on. Identical lists give
    1, disjoint ones 0.
    """
    depth = min(len(first), len(second))
    if depth == 0:
        return 1.0 if len(first) == len(second) else 0.0
    seen_first: set = set()
    seen_second: set = set()
    shared = 0
    total = 0.0
    for d in range(1, depth + 1):
        a, b = first[d - 1], second[d - 1]
        if a == b:
            shared += 1
        else:
            shared += int(a in seen_second) + int(b in seen_first)
        seen_first.add(a)
        seen_second.add(b)
        total += shared / d * persistence**d
    return shared / depth * persistence**depth + (1 - persistence) / persistence * total
