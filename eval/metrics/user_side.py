"""User-side metrics: for whom the model works. Groups of samples, the worst of them, gap, ratio, and the tail (CVaR).

Conventions are those of fairlearn's MetricFrame: group_min, group_max, difference = max - min, ratio = min / max.

Legend: N test samples, G groups of samples, Q measures.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import sparse

from eval.intervals import Statistic
from eval.metrics.accuracy import gains, hit_rates, reciprocal_ranks
from eval.metrics.inputs import Inputs

TAIL = 0.1  # CVaR looks at the worst tenth of the samples
MIN_GROUP_SIZE = 10  # smaller groups are pooled: the worst of many tiny groups is noise, not a finding
MAX_GROUPS = 12
SMALL = "(groups under 10)"
HISTORY_LENGTH_EDGES = (0, 1, 3, 6, 10, 20, 50)  # 0 | 1-2 | 3-5 | 6-9 | 10-19 | 20-49 | 50+


def tail_mean(values_N: np.ndarray, higher_is_better: bool, tail: float = TAIL) -> Statistic:
    """CVaR: mean over the worst `tail` share of the samples (the boundary sample counts with its fraction)."""
    values = np.asarray(values_N, dtype=np.float64)
    valid = np.flatnonzero(np.isfinite(values))
    order = valid[np.argsort(values[valid] if higher_is_better else -values[valid], kind="stable")]
    ordered = values[order]
    one_hot = sparse.csr_matrix(
        (np.ones(order.size), (order, np.arange(order.size))), shape=(values.size, order.size)
    )

    def finish(counts: np.ndarray) -> np.ndarray:  # [B, N] how often each sample, worst first, is drawn
        mass = tail * counts.sum(axis=1, keepdims=True)
        before = np.cumsum(counts, axis=1) - counts
        return (np.clip(mass - before, 0, counts) @ ordered) / mass[:, 0]

    return Statistic(one_hot, finish, int(valid.size), False)


def cvar_nll(inputs: Inputs, k: int | None = None) -> Statistic | None:
    return (
        tail_mean(inputs.target_nll, higher_is_better=False) if np.isfinite(inputs.target_nll).any() else None
    )


def cvar_rank_share(inputs: Inputs, k: int | None = None) -> Statistic:
    """Mean of (r - 1) / (I - 1) over the worst-ranked tenth of the samples."""
    return tail_mean((inputs.rank - 1) / max(1, inputs.num_items - 1), higher_is_better=False)


def relevance_worst_nll(inputs: Inputs, k: int | None = None) -> Statistic | None:
    """Largest mean NLL over the relevance groups: what Group DRO minimises."""
    return _over_relevance(inputs, "worst")


def relevance_gap_nll(inputs: Inputs, k: int | None = None) -> Statistic | None:
    """Largest minus smallest mean NLL over the relevance groups."""
    return _over_relevance(inputs, "gap")


def _over_relevance(inputs: Inputs, summary: str) -> Statistic | None:
    known = inputs.relevance_group >= 0
    if len(np.unique(inputs.relevance_group[known])) < 2 or not np.isfinite(inputs.target_nll).any():
        return None
    group = np.where(known, inputs.relevance_group.astype(str), None)
    return summary_statistics(inputs.target_nll, pool_small(group), higher_is_better=False)[summary]


def measures(inputs: Inputs) -> dict[str, tuple[np.ndarray, bool]]:
    """The per-sample measures that breakdowns show: name -> ([N] values, higher_is_better)."""
    found = {
        "ndcg@10": (gains(inputs, 10), True),
        "hr@10": (hit_rates(inputs, 10), True),
        "mrr": (reciprocal_ranks(inputs), True),
    }
    if np.isfinite(inputs.target_nll).any():
        found["nll"] = (inputs.target_nll, False)
    return found


def group_statistics(
    values_N: np.ndarray, groups_N: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)
) -> dict[str, Statistic]:
    """One mean per group, all from one feature matrix [N, 2G]. groups_N: strings, None where the sample has no group."""
    features, names, counts = _group_features(values_N, groups_N)
    size = len(names)
    return {
        name: Statistic(features, lambda t, g=g: _rates(t, size)[:, g], int(counts[g]), True, bounds)
        for g, name in enumerate(names)
    }


def summary_statistics(
    values_N: np.ndarray,
    groups_N: np.ndarray,
    higher_is_better: bool,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> dict[str, Statistic]:
    """worst, best, gap (max - min) and ratio (min / max) over the groups' means."""
    features, names, counts = _group_features(values_N, groups_N)
    size, n = len(names), int(counts.sum())
    low, high = (lambda t: np.nanmin(_rates(t, size), axis=1)), (lambda t: np.nanmax(_rates(t, size), axis=1))
    worst, best = (low, high) if higher_is_better else (high, low)
    return {
        "worst": Statistic(features, worst, n, False, bounds),
        "best": Statistic(features, best, n, False, bounds),
        "gap": Statistic(features, lambda t: high(t) - low(t), n, False, (0, np.inf)),
        "ratio": Statistic(features, lambda t: low(t) / high(t), n, False, (0, 1)),
    }


def _group_features(values_N: np.ndarray, groups_N: np.ndarray) -> tuple[np.ndarray, list[str], np.ndarray]:
    names = group_names(groups_N)
    index = {name: g for g, name in enumerate(names)}
    valid = np.isfinite(values_N) & np.array([g is not None for g in groups_N])
    rows = np.flatnonzero(valid)
    columns = np.array([index[groups_N[r]] for r in rows], dtype=int)
    features = np.zeros((values_N.size, 2 * len(names)))
    features[rows, columns], features[rows, len(names) + columns] = values_N[rows], 1.0
    return features, names, features[:, len(names) :].sum(axis=0)


def _rates(totals: np.ndarray, size: int) -> np.ndarray:
    sums, counts = totals[:, :size], totals[:, size:]
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def group_names(groups_N: np.ndarray) -> list[str]:
    """Names in reading order: numbers by value, text by alphabet, pooled groups last."""

    def key(name: str) -> tuple[bool, float, str]:
        number = name.split("-")[0].rstrip("+").split(" ")[0]
        return (
            name.startswith("("),
            float(number) if number.replace(".", "", 1).isdigit() else float("inf"),
            name,
        )

    return sorted({g for g in groups_N if g is not None}, key=key)


def pool_small(groups_N: np.ndarray) -> np.ndarray:
    """Groups under MIN_GROUP_SIZE samples, and all but the MAX_GROUPS largest, become one group; a single small one keeps its name."""
    names, counts = np.unique([g for g in groups_N if g is not None], return_counts=True)
    ranked = sorted(zip(-counts, names))[:MAX_GROUPS]
    keep = {str(name) for count, name in ranked if -count >= MIN_GROUP_SIZE}
    if len(names) - len(keep) == 1:
        return groups_N
    pooled = "(other)" if len(names) > MAX_GROUPS else SMALL
    return np.array([None if g is None else g if g in keep else pooled for g in groups_N], dtype=object)


def dimensions(inputs: Inputs) -> dict[str, np.ndarray]:
    """All ways in which breakdowns cut the samples: name -> [N] group names (None = not known)."""
    found: dict[str, np.ndarray] = {}
    if (inputs.relevance_group >= 0).any():
        found["relevance_group"] = np.array(
            [None if g < 0 else str(g) for g in inputs.relevance_group], dtype=object
        )
    bins = inputs.groups("popularity_5")
    found["target_popularity"] = np.array(bins.names, dtype=object)[
        np.asarray(bins.membership[inputs.target].argmax(axis=1)).ravel()
    ]
    warm = inputs.train_count[inputs.target] > 0
    found["target_in_train"] = np.where(warm, "warm", "cold").astype(object)
    found["history_length"] = length_buckets(np.asarray(inputs.history.sum(axis=1)).ravel())
    for name, values in inputs.labels.items():
        found[f"label:{name}"] = bin_numbers(values)
    for name, values in inputs.attributes.items():
        found[f"user:{name}"] = bin_numbers(values)
    return {name: pool_small(groups) for name, groups in found.items()}


def length_buckets(lengths: np.ndarray) -> np.ndarray:
    edges = HISTORY_LENGTH_EDGES
    names = [f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in zip(edges, edges[1:])] + [f"{edges[-1]}+"]
    return np.array(names, dtype=object)[np.searchsorted(edges, lengths, side="right") - 1]


def bin_numbers(values: np.ndarray) -> np.ndarray:
    """An attribute with more than MAX_GROUPS distinct numbers (an age) is cut at its quartiles; others stay as they are."""
    known = [v for v in values if v is not None]
    if len(set(known)) <= MAX_GROUPS:
        return values
    try:
        numbers = np.array([np.nan if v is None else float(v) for v in values])
    except ValueError:
        return values
    edges = np.unique(np.nanquantile(numbers, [0, 0.25, 0.5, 0.75, 1]))
    place = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, max(0, len(edges) - 2))
    last = len(edges) - 2
    names = [
        f"{a:g}-{b:g}{'' if i == last else ' (excl.)'}" for i, (a, b) in enumerate(zip(edges, edges[1:]))
    ]
    return np.array([None if np.isnan(x) else names[p] for x, p in zip(numbers, place)], dtype=object)


def breakdown_statistics(inputs: Inputs) -> dict[str, dict[str, Mapping[str, Mapping[str, Statistic]]]]:
    """dimension -> {"groups": {group: {measure: Statistic}}, "summary": {measure: {worst|best|gap|ratio: Statistic}}}.

    Dimensions with one group only have groups and no summary.
    """
    result = {}
    for dimension, groups in dimensions(inputs).items():
        if not any(g is not None for g in groups):
            continue
        by_group: dict[str, dict[str, Statistic]] = {name: {} for name in group_names(groups)}
        summary = {}
        for measure, (values, higher_is_better) in measures(inputs).items():
            bounds = (0, 1) if higher_is_better else (0, np.inf)
            for name, statistic in group_statistics(values, groups, bounds).items():
                by_group[name][measure] = statistic
            if len(by_group) > 1:
                summary[measure] = summary_statistics(values, groups, higher_is_better, bounds)
        result[dimension] = {"groups": by_group, "summary": summary}
    return result
