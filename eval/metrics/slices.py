"""Slices: for whom the model works. The samples are cut along every dimension that the data name.

A dimension (history length, a label of the data, a user attribute, the relevance group) cuts the samples
into slices. Each slice has its means, and each dimension its worst and best slice, gap and ratio.
Conventions are those of fairlearn's MetricFrame: group_min, group_max, difference = max - min, ratio = min
/ max. results.json keeps all this under `breakdowns`, and the slices of a dimension under its key `groups`.

Legend: N test samples, S slices, B bootstrap replicates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from eval.intervals import Statistic, mean_statistic
from eval.metrics.accuracy import gains, hit_rates, reciprocal_ranks
from eval.metrics.inputs import Inputs

MIN_SIZE = 10  # smaller slices are pooled: the worst of many tiny slices is noise, not a finding
MAX_SLICES = 12
SMALL = "(groups under 10)"
OTHER = "(other)"
HISTORY_LENGTH_EDGES = (0, 1, 3, 6, 10, 20, 50)  # 0 | 1-2 | 3-5 | 6-9 | 10-19 | 20-49 | 50+
# 18, -2.5 or 1.2e+06 at the beginning of a name, e.g. of "18-24", "50+" and "-2.5 to 3 (excl.)".
LEADING_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?(?=$|[-+ ])")
EXACT_DIGITS = 17  # of a float64: different numbers then have different texts
UNBOUNDED = (-np.inf, np.inf)


# -- statistics of slices ------------------------------------------------------------------------------
def measures(inputs: Inputs) -> dict[str, tuple[np.ndarray, bool]]:
    """The per-sample measures that slices show: name -> ([N] values, higher_is_better)."""
    found = {}
    if inputs.knows_ranks(10):
        found["ndcg@10"] = (gains(inputs, 10), True)
        found["hr@10"] = (hit_rates(inputs, 10), True)
    if inputs.knows_ranks(None):
        found["mrr"] = (reciprocal_ranks(inputs), True)
    if np.isfinite(inputs.target_nll).any():
        found["nll"] = (inputs.target_nll, False)
    return found


def slice_statistics(
    values_N: np.ndarray, slice_of_N: np.ndarray, bounds: tuple[float, float] = UNBOUNDED
) -> dict[str, Statistic]:
    """One mean per slice.

    Each has features of its own: its interval then counts the users in the slice, not those of all slices.

    Args:
        slice_of_N: name of each sample's slice, None where it has none.
    """
    return {
        name: mean_statistic(np.where(slice_of_N == name, values_N, np.nan), bounds)
        for name in in_reading_order(slice_of_N)
    }


def summary_statistics(
    values_N: np.ndarray,
    slice_of_N: np.ndarray,
    higher_is_better: bool,
    bounds: tuple[float, float] = UNBOUNDED,
) -> dict[str, Statistic]:
    """worst, best, gap (max - min) and ratio (min / max) over the slices' means, from one matrix [N, 2S]."""
    features, names, counts = _features(values_N, slice_of_N)
    size = len(names)

    def means(totals: np.ndarray) -> np.ndarray:
        return _rates(totals, size)

    return spread(features, means, int(counts.sum()), higher_is_better, bounds)


def spread(
    features: np.ndarray,
    means: Callable[[np.ndarray], np.ndarray],
    n: int,
    higher_is_better: bool,
    bounds: tuple[float, float],
    of_gap: tuple[float, float] = (0, np.inf),
) -> dict[str, Statistic]:
    """worst, best, gap and ratio over slices.

    Args:
        means: totals of the features [B, 2S] -> the slices' means [B, S].
        bounds: of a mean; of_gap: of a difference of two.
    """

    def lowest(totals: np.ndarray) -> np.ndarray:
        return np.nanmin(means(totals), axis=1)

    def highest(totals: np.ndarray) -> np.ndarray:
        return np.nanmax(means(totals), axis=1)

    def gap(totals: np.ndarray) -> np.ndarray:
        return highest(totals) - lowest(totals)

    def ratio(totals: np.ndarray) -> np.ndarray:
        return lowest(totals) / highest(totals)

    worst, best = (lowest, highest) if higher_is_better else (highest, lowest)
    return {
        "worst": Statistic(features, worst, n, False, bounds),
        "best": Statistic(features, best, n, False, bounds),
        "gap": Statistic(features, gap, n, False, of_gap),
        "ratio": Statistic(features, ratio, n, False, (0, 1)),
    }


def _features(values_N: np.ndarray, slice_of_N: np.ndarray) -> tuple[np.ndarray, list[str], np.ndarray]:
    """[N, 2S] value and one in the columns of the sample's slice, the slices' names, their sizes [S]."""
    names = in_reading_order(slice_of_N)
    index = {name: place for place, name in enumerate(names)}
    valid = np.isfinite(values_N) & np.array([name is not None for name in slice_of_N])
    rows = np.flatnonzero(valid)
    columns = np.array([index[slice_of_N[row]] for row in rows], dtype=int)
    features = np.zeros((values_N.size, 2 * len(names)))
    features[rows, columns] = values_N[rows]
    features[rows, len(names) + columns] = 1.0
    return features, names, features[:, len(names) :].sum(axis=0)


def _rates(totals: np.ndarray, size: int) -> np.ndarray:
    """Totals [B, 2S] -> means [B, S]; NaN for a slice that a replicate did not draw."""
    sums = totals[:, :size]
    counts = totals[:, size:]
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


# -- how samples are cut -------------------------------------------------------------------------------
def in_reading_order(slice_of_N: np.ndarray) -> list[str]:
    """Distinct names: numbers by value, text by alphabet, pooled slices last."""

    def key(name: str) -> tuple[bool, float, str]:
        pooled = name.startswith("(")
        number = LEADING_NUMBER.match(name)
        return pooled, float(number[0]) if number else float("inf"), name

    return sorted({name for name in slice_of_N if name is not None}, key=key)


def pool_small(slice_of_N: np.ndarray) -> np.ndarray:
    """Slices under MIN_SIZE samples, and all but the MAX_SLICES largest, become one; a single one stays."""
    names, counts = np.unique([name for name in slice_of_N if name is not None], return_counts=True)
    largest = sorted(zip(-counts, names))[:MAX_SLICES]
    keep = {str(name) for count, name in largest if -count >= MIN_SIZE}
    if len(names) - len(keep) == 1:
        return slice_of_N
    pooled = OTHER if len(names) > MAX_SLICES else SMALL
    found = [name if name is None or name in keep else pooled for name in slice_of_N]
    return np.array(found, dtype=object)


def relevance_names(inputs: Inputs) -> np.ndarray:
    """[N] relevance group of each sample as text, None where it is unknown."""
    return np.array([None if g < 0 else str(g) for g in inputs.relevance_group], dtype=object)


def dimensions(inputs: Inputs) -> dict[str, np.ndarray]:
    """All ways in which the samples are cut: name -> [N] name of each sample's slice (None = not known)."""
    found: dict[str, np.ndarray] = {}
    if (inputs.relevance_group >= 0).any():
        found["relevance_group"] = relevance_names(inputs)
    bins = inputs.labelling("popularity_5")
    bin_of_target = np.asarray(bins.membership[inputs.target].argmax(axis=1)).ravel()
    found["target_popularity"] = np.array(bins.names, dtype=object)[bin_of_target]
    in_train = inputs.train_count[inputs.target] > 0
    found["target_in_train"] = np.where(in_train, "warm", "cold").astype(object)
    found["history_length"] = length_buckets(np.asarray(inputs.history.sum(axis=1)).ravel())
    for name, values in inputs.labels.items():
        found[f"label:{name}"] = bin_numbers(values)
    for name, values in inputs.attributes.items():
        found[f"user:{name}"] = bin_numbers(values)
    return {name: pool_small(slice_of_N) for name, slice_of_N in found.items()}


def length_buckets(lengths: np.ndarray) -> np.ndarray:
    """Names of the buckets of history lengths, [N]."""
    edges = HISTORY_LENGTH_EDGES
    names = [f"{a}" if b == a + 1 else f"{a}-{b - 1}" for a, b in zip(edges, edges[1:])]
    names.append(f"{edges[-1]}+")
    return np.array(names, dtype=object)[np.searchsorted(edges, lengths, side="right") - 1]


def bin_numbers(values: np.ndarray) -> np.ndarray:
    """An attribute with over MAX_SLICES distinct numbers (an age) is cut at its quartiles; others stay."""
    known = [value for value in values if value is not None]
    if len(set(known)) <= MAX_SLICES:
        return values
    try:
        numbers = np.array([np.nan if value is None else float(value) for value in values])
    except ValueError:
        return values
    edges = np.unique(np.nanquantile(numbers, [0, 0.25, 0.5, 0.75, 1]))
    last = len(edges) - 2
    place = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, max(0, last))
    texts = _edge_texts(edges)
    between = " to " if edges[0] < 0 else "-"
    names = []
    for index, (a, b) in enumerate(zip(texts, texts[1:])):
        excluded = "" if index == last else " (excl.)"
        names.append(f"{a}{between}{b}{excluded}")
    return np.array([None if np.isnan(x) else names[p] for x, p in zip(numbers, place)], dtype=object)


def _edge_texts(edges: np.ndarray) -> list[str]:
    """The distinct edges as text, with as few digits from six on as keep them distinct."""
    texts: list[str] = []
    for digits in range(6, EXACT_DIGITS + 1):
        texts = [f"{edge:.{digits}g}" for edge in edges]
        if len(set(texts)) == len(texts):
            break
    return texts


# -- all of it -----------------------------------------------------------------------------------------
def all_slices(inputs: Inputs) -> dict[str, dict[str, Mapping[str, Mapping[str, Statistic]]]]:
    """Every dimension: {"groups": {slice: {measure: Statistic}}, "summary": {measure: {part: Statistic}}}.

    A part is worst, best, gap or ratio. Dimensions with one slice have no summary. The keys are those of
    results.json.
    """
    found = {}
    for dimension, slice_of_N in dimensions(inputs).items():
        if not any(name is not None for name in slice_of_N):
            continue
        by_slice: dict[str, dict[str, Statistic]] = {name: {} for name in in_reading_order(slice_of_N)}
        summary = {}
        for measure, (values, higher_is_better) in measures(inputs).items():
            bounds = (0, 1) if higher_is_better else (0, np.inf)
            for name, statistic in slice_statistics(values, slice_of_N, bounds).items():
                by_slice[name][measure] = statistic
            if len(by_slice) > 1:
                summary[measure] = summary_statistics(values, slice_of_N, higher_is_better, bounds)
        found[dimension] = {"groups": by_slice, "summary": summary}
    return found
