"""Item-side metrics: which items the lists show, against the histories and against the catalogue.

MGU and DGU, RSP and REO look at labels of the items: popularity bins, genres. Their papers call these item
groups.

Legend: N test samples, I catalogue entries, L labels, B bootstrap replicates, U users; GP shares of the
labels in the top-K lists, GH their shares in the histories.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from scipy import sparse
from scipy.stats import rankdata

from eval.intervals import Statistic, mean_statistic, ratio
from eval.metrics.accuracy import hit_rates
from eval.metrics.base import item_metric
from eval.metrics.inputs import HEAD_SHARE, Inputs, popularity_order

BINS = "popularity_8"
FLOWER_BINS = "history_popularity_8"
"""The bins of Flower (Mr-Peach0301/Flower, process.ipynb): items are ordered by how often they stand in train
histories, not by how often they are interacted with."""


# -- shares of labels, against the histories -----------------------------------------------------------
def _shares(totals: np.ndarray) -> np.ndarray:
    """Rows to shares; NaN rows where a row is empty."""
    return totals / totals.sum(axis=1, keepdims=True)


def _label_features(inputs: Inputs, k: int, labels: str, histories: bool) -> np.ndarray:
    """[N, L] recommendations per label; with `histories` [N, 2L], the own history per label beside them."""

    def make() -> np.ndarray:
        membership = inputs.labelling(labels).membership
        shown = (inputs.exposure(k) @ membership).toarray()
        if not histories:
            return shown
        return np.hstack([shown, (inputs.history @ membership).toarray()])

    return inputs.cached(("label_features", k, labels, histories), make)


def _unfairness(
    inputs: Inputs, k: int, labels: str, histories: bool, summary: Callable[[np.ndarray], np.ndarray]
) -> Statistic | None:
    """A summary of GP - GH over the labels, as a statistic."""
    labelling = inputs.labelling(labels)
    if labelling is None:
        return None
    if histories:
        if inputs.history.nnz == 0:
            return None
        num_labels = len(labelling.names)

        def finish(totals: np.ndarray) -> np.ndarray:
            return summary(_shares(totals[:, :num_labels]) - _shares(totals[:, num_labels:]))
    else:
        if inputs.history_count.sum() == 0:
            return None
        train_share = _shares(np.asarray(inputs.history_count[None, :] @ labelling.membership))

        def finish(totals: np.ndarray) -> np.ndarray:
            return summary(_shares(totals) - train_share)

    features = _label_features(inputs, k, labels, histories)
    return Statistic(features, finish, inputs.num_samples, smooth=False, bounds=(0, 2))


def _mean_distance(gap: np.ndarray) -> np.ndarray:
    return np.abs(gap).mean(axis=1)


def _range(gap: np.ndarray) -> np.ndarray:
    return gap.max(axis=1) - gap.min(axis=1)


def mgu(inputs: Inputs, k: int, labels: str = BINS, histories: bool = False) -> Statistic | None:
    """Mean group unfairness: mean over labels g of |GP_g - GH_g|.

    Args:
        labels: name of the labelling of the catalogue.
        histories: GH is that of the test samples' own histories instead of the train histories.
    """
    return _unfairness(inputs, k, labels, histories, _mean_distance)


def dgu(inputs: Inputs, k: int, labels: str = BINS, histories: bool = False) -> Statistic | None:
    """Disparity of group unfairness: max over labels g of (GP_g - GH_g) minus min. Arguments as in `mgu`."""
    return _unfairness(inputs, k, labels, histories, _range)


# -- spread over single items --------------------------------------------------------------------------
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
    """Gini index of rows, zeros included: sum_j (2j - n - 1) x_(j) / (n sum x), x ascending. [B, n] -> [B]"""
    size = totals.shape[1]
    # Counts below 2^24 are exact in float32, which sorts twice as fast.
    ordered = np.sort(totals.astype(np.float32), axis=1)
    return ordered.astype(np.float64) @ (2 * np.arange(1, size + 1) - size - 1) / (size * totals.sum(axis=1))


def gini_influence(features: sparse.csr_matrix, totals: np.ndarray) -> np.ndarray:
    """Derivative of the Gini index along each user's features. [U, n], [n] -> [U]

    Tied columns stand at their lowest place, which is the one that a column takes when it loses.
    """
    size = totals.size
    total = totals.sum()
    places = rankdata(totals, method="min")
    return features @ ((2 * places - size - 1) / (size * total) - gini_of(totals[None, :])[0] / total)


def gini(inputs: Inputs, k: int) -> Statistic:
    """Gini index of the items' exposure, unseen items included."""
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
    """Shannon entropy of the items' exposure, in nats."""
    return Statistic(
        inputs.exposure(k), entropy_of, inputs.num_samples, False, (0, np.inf), entropy_influence
    )


# -- popularity ----------------------------------------------------------------------------------------
def mean_over_list(inputs: Inputs, k: int, item_values: np.ndarray) -> np.ndarray:
    """[N] mean of an item value over the sample's top-k list; NaN for an empty list."""
    return _mean_over(inputs.exposure(k), item_values)


def _mean_over(counts: sparse.csr_matrix, item_values: np.ndarray) -> np.ndarray:
    """[N] mean of an item value weighted by each row's counts; NaN for an empty row."""
    sizes = np.asarray(counts.sum(axis=1)).ravel()
    return np.divide(counts @ item_values, sizes, out=np.full(sizes.size, np.nan), where=sizes > 0)


def arp(inputs: Inputs, k: int) -> Statistic:
    """Average recommendation popularity: mean over samples of the mean train count of the list."""
    return mean_statistic(mean_over_list(inputs, k, inputs.train_count))


def long_tail(inputs: Inputs) -> np.ndarray:
    """[I] True for items outside the most popular fifth of the catalogue (ceil(0.2 I) items)."""
    order = popularity_order(inputs.train_count, inputs.item_ids)
    tail = np.ones(inputs.num_items, dtype=bool)
    tail[order[: int(np.ceil(HEAD_SHARE * inputs.num_items))]] = False
    return tail


def aplt(inputs: Inputs, k: int) -> Statistic:
    """Average percentage of long-tail items: mean over samples of the share of the list in the long tail."""
    return mean_statistic(mean_over_list(inputs, k, long_tail(inputs).astype(float)), (0, 1))


def popularity_lift(inputs: Inputs, k: int) -> Statistic | None:
    """(GAP_lists - GAP_profiles) / GAP_profiles, GAP = mean over samples of the mean train count.

    Over samples with a history only.
    """
    shown = mean_over_list(inputs, k, inputs.train_count)
    profile = _mean_over(inputs.history, inputs.train_count)
    valid = np.isfinite(shown) & np.isfinite(profile)
    if not valid.any():
        return None
    features = np.where(valid[:, None], np.stack([shown - profile, profile], axis=1), 0.0)
    return Statistic(features, ratio, int(valid.sum()))


def logpopdiff(inputs: Inputs, k: int) -> Statistic | None:
    """Mean of ln(train count + 1) over the list minus the same over the history; samples with one only."""
    values = np.log1p(inputs.train_count)
    difference = mean_over_list(inputs, k, values) - _mean_over(inputs.history, values)
    if not np.isfinite(difference).any():
        return None
    return mean_statistic(difference)


# -- parity of chances ---------------------------------------------------------------------------------
def _relative_deviation(rates: np.ndarray) -> np.ndarray:
    """Standard deviation / mean of each row over its labels that exist (not NaN). [B, L] -> [B]

    NaN where the mean is 0.
    """
    exists = np.isfinite(rates)
    count = exists.sum(axis=1)
    known = np.where(exists, rates, 0.0)
    mean = known.sum(axis=1) / count
    variance = np.where(exists, (known - mean[:, None]) ** 2, 0.0).sum(axis=1) / count
    return np.sqrt(variance) / mean


def rsp(inputs: Inputs, k: int, labels: str = BINS) -> Statistic | None:
    """Ranking-based statistical parity: 0 is parity.

    It is std / mean over labels of P(in the top k | item of the label). Every catalogue entry is a
    candidate for every sample, as in the scorer. Labels without items are left out.
    """
    labelling = inputs.labelling(labels)
    if labelling is None:
        return None
    sizes = np.asarray(labelling.membership.sum(axis=0)).ravel()
    sizes = np.where(sizes > 0, sizes, np.nan)

    def finish(totals: np.ndarray) -> np.ndarray:
        return _relative_deviation(totals / sizes)  # rates are per sample; N cancels in std / mean

    features = _label_features(inputs, k, labels, False)
    return Statistic(features, finish, inputs.num_samples, False, (0, np.inf))


def reo(inputs: Inputs, k: int, labels: str = BINS) -> Statistic | None:
    """Ranking-based equal opportunity: 0 is equal.

    It is std / mean over labels of P(in the top k | target of the label). Labels without a test target are
    left out.
    """
    labelling = inputs.labelling(labels)
    if labelling is None:
        return None
    target_labels = labelling.membership[inputs.target].toarray()  # [N, L]
    num_labels = target_labels.shape[1]
    features = np.hstack([target_labels * hit_rates(inputs, k)[:, None], target_labels])

    def finish(totals: np.ndarray) -> np.ndarray:
        hits = totals[:, :num_labels]
        targets = totals[:, num_labels:]
        rates = np.divide(hits, targets, out=np.full_like(hits, np.nan), where=targets > 0)
        return _relative_deviation(rates)

    return Statistic(features, finish, inputs.num_samples, False, (0, np.inf))


METRICS = (
    item_metric("mgu@{k}", mgu, "mean |list share - history share| over 8 popularity bins", False, primary=5),
    item_metric(
        "dgu@{k}", dgu, "spread of (list share - history share) over 8 popularity bins", False, primary=5
    ),
    item_metric("mgu_pop5@{k}", partial(mgu, labels="popularity_5"), "MGU over 5 popularity bins", False),
    item_metric("dgu_pop5@{k}", partial(dgu, labels="popularity_5"), "DGU over 5 popularity bins", False),
    item_metric(
        "mgu_genres@{k}", partial(mgu, labels="genres"), "MGU over genres (m genres: 1/m each)", False
    ),
    item_metric("dgu_genres@{k}", partial(dgu, labels="genres"), "DGU over genres", False),
    item_metric(
        "mgu_test_histories@{k}",
        partial(mgu, histories=True),
        "MGU against the test samples' histories (IFairLRS)",
        False,
    ),
    item_metric(
        "dgu_test_histories@{k}",
        partial(dgu, histories=True),
        "DGU against the test samples' histories (IFairLRS)",
        False,
    ),
    item_metric(
        "mgu_flower@{k}",
        partial(mgu, labels=FLOWER_BINS),
        "MGU over 8 bins by occurrences in train histories (Flower)",
        False,
    ),
    item_metric(
        "dgu_flower@{k}",
        partial(dgu, labels=FLOWER_BINS),
        "DGU over 8 bins by occurrences in train histories (Flower)",
        False,
    ),
    item_metric("coverage@{k}", coverage, "share of the catalogue that is in some list", True),
    item_metric("gini@{k}", gini, "inequality of exposure over items, unseen ones included", False),
    item_metric("entropy@{k}", entropy, "entropy of exposure over items, nats", True),
    item_metric("arp@{k}", arp, "mean train count of recommended items", None),
    item_metric("aplt@{k}", aplt, "share of lists outside the most popular fifth of items", None),
    item_metric(
        "popularity_lift@{k}", popularity_lift, "relative rise of popularity from profile to list", None
    ),
    item_metric(
        "logpopdiff@{k}",
        logpopdiff,
        "mean ln(popularity + 1) of the list minus that of the profile",
        None,
    ),
    item_metric("rsp@{k}", rsp, "uneven chance of being shown, over popularity bins", False),
    item_metric(
        "reo@{k}",
        reo,
        "uneven chance of being hit when it is the target, over popularity bins",
        False,
        targets=False,
        needs_lists=False,  # it reads the rank of the target
        needs_ranks=True,
    ),
)
