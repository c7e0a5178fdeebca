"""Item-side metrics: which items the lists show, against the histories and against the catalogue.

Legend: I catalogue entries, G item groups, GP group shares in the top-K lists, GH group shares in the histories.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import sparse
from scipy.stats import rankdata

from eval.intervals import Statistic, mean_statistic, ratio
from eval.metrics.accuracy import hit_rates
from eval.metrics.inputs import HEAD_SHARE, Inputs, popularity_order


def _shares(totals: np.ndarray) -> np.ndarray:
    """Rows to shares; NaN rows where a row is empty."""
    return totals / totals.sum(axis=1, keepdims=True)


def _group_features(inputs: Inputs, k: int, groups: str, histories: bool) -> np.ndarray:
    """[N, G] recommendations per group, and with `histories` [N, 2G] the sample's own history per group beside them."""

    def make() -> np.ndarray:
        membership = inputs.groups(groups).membership
        shown = (inputs.exposure(k) @ membership).toarray()
        return np.hstack([shown, (inputs.history @ membership).toarray()]) if histories else shown

    return inputs.cached(("group_features", k, groups, histories), make)


def _group_unfairness(
    inputs: Inputs,
    k: int,
    groups: str,
    histories: bool,
    summary: Callable[[np.ndarray], np.ndarray],
    bounds: tuple[float, float],
) -> Statistic | None:
    grouping = inputs.groups(groups)
    if grouping is None:
        return None
    if histories:
        if inputs.history.nnz == 0:
            return None
        num_groups = len(grouping.names)

        def finish(totals: np.ndarray) -> np.ndarray:
            return summary(_shares(totals[:, :num_groups]) - _shares(totals[:, num_groups:]))
    else:
        if inputs.history_count.sum() == 0:
            return None
        train_share = _shares(np.asarray(inputs.history_count[None, :] @ grouping.membership))

        def finish(totals: np.ndarray) -> np.ndarray:
            return summary(_shares(totals) - train_share)

    return Statistic(_group_features(inputs, k, groups, histories), finish, inputs.num_samples, False, bounds)


def mgu(inputs: Inputs, k: int, groups: str = "popularity_8", histories: bool = False) -> Statistic | None:
    """Mean group unfairness: mean over groups of |GP_g - GH_g|. GH: train histories, or the test samples' own (`histories`)."""
    return _group_unfairness(inputs, k, groups, histories, lambda gap: np.abs(gap).mean(axis=1), (0, 2))


def dgu(inputs: Inputs, k: int, groups: str = "popularity_8", histories: bool = False) -> Statistic | None:
    """Disparity of group unfairness: max over groups of (GP_g - GH_g) minus their min."""
    return _group_unfairness(
        inputs, k, groups, histories, lambda gap: gap.max(axis=1) - gap.min(axis=1), (0, 2)
    )


def coverage_of(totals: np.ndarray) -> np.ndarray:
    """Share of columns with any exposure. [B, n] -> [B]"""
    return (totals > 0).mean(axis=1)


def coverage_influence(features: sparse.csr_matrix, totals: np.ndarray) -> np.ndarray:
    """What coverage loses without each user: the columns that no other user reaches. [U, n], [n] -> [U]"""
    only_one = np.bincount(features.indices, minlength=totals.size) == 1  # features hold no explicit zeros
    return (features > 0).astype(float) @ only_one.astype(float) / totals.size


def coverage(inputs: Inputs, k: int) -> Statistic:
    """Share of the catalogue that is in at least one list."""
    return Statistic(inputs.exposure(k), coverage_of, inputs.num_samples, False, (0, 1), coverage_influence)


def gini_of(totals: np.ndarray) -> np.ndarray:
    """Gini index of each row, zeros included: sum_j (2j - n - 1) x_(j) / (n sum x), x sorted ascending. [B, n] -> [B]"""
    size = totals.shape[1]
    ordered = np.sort(
        totals.astype(np.float32), axis=1
    )  # counts below 2^24 are exact, and float32 sorts twice as fast
    return ordered.astype(np.float64) @ (2 * np.arange(1, size + 1) - size - 1) / (size * totals.sum(axis=1))


def gini_influence(features: sparse.csr_matrix, totals: np.ndarray) -> np.ndarray:
    """Derivative of the Gini index along each user's features; of tied columns the lowest place, which a column takes when it loses.

    [U, n], [n] -> [U]
    """
    size, total = totals.size, totals.sum()
    places = rankdata(totals, method="min")
    return features @ ((2 * places - size - 1) / (size * total) - gini_of(totals[None, :])[0] / total)


def gini(inputs: Inputs, k: int) -> Statistic:
    return Statistic(inputs.exposure(k), gini_of, inputs.num_samples, False, (0, 1), gini_influence)


def entropy_of(totals: np.ndarray) -> np.ndarray:
    """Shannon entropy of each row's shares, in nats. [B, n] -> [B]"""
    sums = totals.sum(axis=1)
    terms = np.einsum("bi,bi->b", totals, np.log(np.maximum(totals, 1)))  # counts are 0 or at least 1
    return np.log(sums) - terms / sums


def entropy_influence(features: sparse.csr_matrix, totals: np.ndarray) -> np.ndarray:
    """What the entropy loses without each user, exactly. [U, n], [n] -> [U]"""

    def weigh(x: np.ndarray) -> np.ndarray:
        return x * np.log(np.maximum(x, 1))

    with_user = totals[features.indices]
    change = sparse.csr_matrix(
        (weigh(with_user) - weigh(with_user - features.data), features.indices, features.indptr),
        shape=features.shape,
    )
    left = totals.sum() - np.asarray(features.sum(axis=1)).ravel()
    terms = weigh(totals).sum() - np.asarray(change.sum(axis=1)).ravel()
    without = np.log(np.maximum(left, 1)) - terms / np.maximum(left, 1)
    return entropy_of(totals[None, :])[0] - without


def entropy(inputs: Inputs, k: int) -> Statistic:
    return Statistic(
        inputs.exposure(k), entropy_of, inputs.num_samples, False, (0, np.inf), entropy_influence
    )


def _mean_over_list(inputs: Inputs, k: int, item_values: np.ndarray) -> np.ndarray:
    """[N] mean of an item value over the sample's top-k list; NaN for an empty list."""
    return _mean_over(inputs.exposure(k), item_values)


def _mean_over(counts: sparse.csr_matrix, item_values: np.ndarray) -> np.ndarray:
    sizes = np.asarray(counts.sum(axis=1)).ravel()
    return np.divide(counts @ item_values, sizes, out=np.full(sizes.size, np.nan), where=sizes > 0)


def arp(inputs: Inputs, k: int) -> Statistic:
    """Average recommendation popularity: mean over samples of the mean train count of the list."""
    return mean_statistic(_mean_over_list(inputs, k, inputs.train_count))


def long_tail(inputs: Inputs) -> np.ndarray:
    """[I] True for items outside the most popular fifth of the catalogue (ceil(0.2 I) items)."""
    tail = np.ones(inputs.num_items, dtype=bool)
    tail[
        popularity_order(inputs.train_count, inputs.item_ids)[: int(np.ceil(HEAD_SHARE * inputs.num_items))]
    ] = False
    return tail


def aplt(inputs: Inputs, k: int) -> Statistic:
    """Average percentage of long-tail items: mean over samples of the share of the list in the long tail."""
    return mean_statistic(_mean_over_list(inputs, k, long_tail(inputs).astype(float)), (0, 1))


def popularity_lift(inputs: Inputs, k: int) -> Statistic | None:
    """(GAP_lists - GAP_profiles) / GAP_profiles, GAP = mean over samples of the mean train count; samples with a history only."""
    shown, profile = (
        _mean_over_list(inputs, k, inputs.train_count),
        _mean_over(inputs.history, inputs.train_count),
    )
    valid = np.isfinite(shown) & np.isfinite(profile)
    if not valid.any():
        return None
    features = np.where(valid[:, None], np.stack([shown - profile, profile], axis=1), 0.0)
    return Statistic(features, ratio, int(valid.sum()))


def logpopdiff(inputs: Inputs, k: int) -> Statistic | None:
    """Mean of ln(train count + 1) over the list minus the same over the sample's history; samples with a history only."""
    values = np.log1p(inputs.train_count)
    difference = _mean_over_list(inputs, k, values) - _mean_over(inputs.history, values)
    return mean_statistic(difference) if np.isfinite(difference).any() else None


def _relative_deviation(rates: np.ndarray) -> np.ndarray:
    """Standard deviation / mean of each row over its groups that exist (not NaN); NaN where the mean is 0. [B, G] -> [B]"""
    exists = np.isfinite(rates)
    count, known = exists.sum(axis=1), np.where(exists, rates, 0.0)
    mean = known.sum(axis=1) / count
    variance = np.where(exists, (known - mean[:, None]) ** 2, 0.0).sum(axis=1) / count
    return np.sqrt(variance) / mean


def rsp(inputs: Inputs, k: int, groups: str = "popularity_8") -> Statistic | None:
    """Ranking-based statistical parity: std / mean over groups of P(in the top k | item of group g); 0 is parity.

    Every catalogue entry is a candidate for every sample, as in the scorer. Groups without items are left out.
    """
    grouping = inputs.groups(groups)
    if grouping is None:
        return None
    sizes = np.asarray(grouping.membership.sum(axis=0)).ravel()
    sizes = np.where(sizes > 0, sizes, np.nan)  # shares over N cancel in std / mean
    return Statistic(
        _group_features(inputs, k, groups, False),
        lambda totals: _relative_deviation(totals / sizes),
        inputs.num_samples,
        False,
        (0, np.inf),
    )


def reo(inputs: Inputs, k: int, groups: str = "popularity_8") -> Statistic | None:
    """Ranking-based equal opportunity: std / mean over groups of P(in the top k | target of group g); 0 is equal opportunity.

    Groups without a test target are left out.
    """
    grouping = inputs.groups(groups)
    if grouping is None:
        return None
    target_groups = grouping.membership[inputs.target].toarray()  # [N, G]
    num_groups = target_groups.shape[1]
    features = np.hstack([target_groups * hit_rates(inputs, k)[:, None], target_groups])

    def finish(totals: np.ndarray) -> np.ndarray:
        hits, targets = totals[:, :num_groups], totals[:, num_groups:]
        return _relative_deviation(
            np.divide(hits, targets, out=np.full_like(hits, np.nan), where=targets > 0)
        )

    return Statistic(features, finish, inputs.num_samples, False, (0, np.inf))
