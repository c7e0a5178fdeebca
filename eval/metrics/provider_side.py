"""Provider-side metrics: how exposure falls on brands, authors, directors or publishers.

Exposure of a provider is the discounted attention to its items: sum over lists and positions of 1 /
log2(position + 1). Items without a provider are left out of all shares (their number is in the report's
notes).

Legend: N test samples, P providers, S size bins, I catalogue entries.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import sparse

from eval.intervals import Statistic
from eval.metrics.base import provider_metric
from eval.metrics.inputs import Inputs
from eval.metrics.item_side import coverage_influence, coverage_of, gini_influence, gini_of

NUM_SIZE_BINS = 5


def _provider_matrix(inputs: Inputs) -> sparse.csr_matrix:
    """[I, P] 1 where the item is the provider's."""
    items = np.flatnonzero(inputs.provider_of_item >= 0)
    return sparse.csr_matrix(
        (np.ones(items.size), (items, inputs.provider_of_item[items])),
        shape=(inputs.num_items, len(inputs.provider_names)),
    )


def provider_exposure(inputs: Inputs, k: int) -> sparse.csr_matrix:
    """[N, P] CSR discounted exposure that each sample's list gives to each provider."""

    def make() -> sparse.csr_matrix:
        return (inputs.discounted_exposure(k) @ _provider_matrix(inputs)).tocsr()

    return inputs.cached(("provider_exposure", k), make)


def catalogue_share(inputs: Inputs) -> np.ndarray:
    """[P] share of the catalogue's provided items."""
    counts = np.asarray(_provider_matrix(inputs).sum(axis=0)).ravel()
    return counts / counts.sum()


def interaction_share(inputs: Inputs) -> np.ndarray:
    """[P] share of the train interactions with provided items; NaN without any."""
    counts = inputs.train_count @ _provider_matrix(inputs)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum()


def size_bins(inputs: Inputs) -> np.ndarray:
    """[P] bin of each provider by catalogue size: bins of about equal item count, 0 = the largest providers.

    A provider belongs to the bin that holds the middle of its items when providers are laid out from large
    to small.
    """
    share = catalogue_share(inputs)
    order = np.lexsort((np.asarray(inputs.provider_names), -share))
    middle = np.cumsum(share[order]) - share[order] / 2
    bins = np.empty(share.size, dtype=int)
    bins[order] = np.minimum((middle * NUM_SIZE_BINS).astype(int), NUM_SIZE_BINS - 1)
    # One huge provider may leave a bin empty: only the filled ones are numbered.
    _, numbered = np.unique(bins, return_inverse=True)
    return numbered


def _statistic(
    inputs: Inputs,
    k: int,
    finish: Callable[[np.ndarray], np.ndarray],
    bounds: tuple[float, float],
    influence: Callable[[sparse.csr_matrix, np.ndarray], np.ndarray] | None = None,
) -> Statistic | None:
    if len(inputs.provider_names) < 2:
        return None
    return Statistic(provider_exposure(inputs, k), finish, inputs.num_samples, False, bounds, influence)


def provider_l1_catalogue(inputs: Inputs, k: int) -> Statistic | None:
    """Sum over providers of |exposure share - catalogue share|: 0 proportional, 2 disjoint."""
    return _l1(inputs, k, catalogue_share)


def provider_l1_interactions(inputs: Inputs, k: int) -> Statistic | None:
    """Sum over providers of |exposure share - share of train interactions|."""
    return _l1(inputs, k, interaction_share)


def _l1(inputs: Inputs, k: int, reference: Callable[[Inputs], np.ndarray]) -> Statistic | None:
    if len(inputs.provider_names) < 2:
        return None
    expected = reference(inputs)
    if not np.isfinite(expected).all():
        return None

    def finish(totals: np.ndarray) -> np.ndarray:
        return np.abs(totals / totals.sum(axis=1, keepdims=True) - expected).sum(axis=1)

    return _statistic(inputs, k, finish, (0, 2))


def provider_minmax(inputs: Inputs, k: int) -> Statistic | None:
    """Min over max, over provider size bins, of exposure share / catalogue share.

    1 is parity, 0 is a bin that is never shown.
    """
    if len(inputs.provider_names) < 2:
        return None
    bins = size_bins(inputs)
    if bins.max() == 0:
        return None
    in_bin = np.eye(bins.max() + 1)[bins]  # [P, S]
    size = catalogue_share(inputs) @ in_bin

    def finish(totals: np.ndarray) -> np.ndarray:
        rates = (totals @ in_bin) / size
        return rates.min(axis=1) / rates.max(axis=1)

    return _statistic(inputs, k, finish, (0, 1))


def provider_gini(inputs: Inputs, k: int) -> Statistic | None:
    """Gini index of exposure over providers, unexposed providers included."""
    return _statistic(inputs, k, gini_of, (0, 1), gini_influence)


def provider_coverage(inputs: Inputs, k: int) -> Statistic | None:
    """Share of providers with at least one item in at least one list."""
    return _statistic(inputs, k, coverage_of, (0, 1), coverage_influence)


def exposure_by_size(inputs: Inputs, k: int) -> list[dict[str, float | str]]:
    """For the report, per size bin: providers, and shares of catalogue, train interactions and exposure."""
    if len(inputs.provider_names) < 2:
        return []
    exposure = np.asarray(provider_exposure(inputs, k).sum(axis=0)).ravel()
    total = exposure.sum()
    offered = catalogue_share(inputs)
    chosen = interaction_share(inputs)
    bins = size_bins(inputs)
    names = [str(index + 1) for index in range(bins.max() + 1)]
    names[-1] = "smallest"
    names[0] = "largest"
    rows = []
    for index, name in enumerate(names):
        members = bins == index
        rows.append(
            {
                "providers": name,
                "num_providers": int(members.sum()),
                "catalogue_share": float(offered[members].sum()),
                "interaction_share": float(chosen[members].sum()),
                "exposure_share": float(exposure[members].sum() / total) if total else float("nan"),
            }
        )
    return rows


METRICS = (
    provider_metric(
        "provider_l1_catalogue@{k}", provider_l1_catalogue, "exposure against catalogue share", False
    ),
    provider_metric(
        "provider_l1_interactions@{k}", provider_l1_interactions, "exposure against interaction share", False
    ),
    provider_metric(
        "provider_minmax@{k}", provider_minmax, "least over most favoured provider size bin", True
    ),
    provider_metric("provider_gini@{k}", provider_gini, "inequality of exposure over providers", False),
    provider_metric("provider_coverage@{k}", provider_coverage, "share of providers shown at all", True),
)
