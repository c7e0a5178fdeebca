"""Metrics of rows, each a `Statistic` over users: NLL per target token, calibrated, by group; accuracy.

    nll                   sum of losses / target tokens
    nll_calibrated        the same at the run's one best temperature (eval/metrics/calibration.py)
    nll_worst_group       largest of the groups' means; nll_gap_group: largest minus smallest
    accuracy, choice_nll  over rows that list their answers

Legend: N rows, G groups, T temperatures, B bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from eval.intervals import Statistic, mean_statistic, ratio
from eval.metrics.base import Metric
from eval.metrics.calibration import (
    RANGE,
    TEMPERATURES,
    at_temperature,
    fit_temperature,
    is_at_end,
    lowest,
)
from eval.metrics.slices import pool_small, spread
from eval.rows.inputs import RowInputs

MOST_LABELS = 12
Parts = tuple[np.ndarray, np.ndarray, np.ndarray]
"""NLL [B, G], tokens [B, G], curves [B, G, T]."""


def _over_groups(
    finish: Callable[[Parts], np.ndarray], smooth: bool, bounds=(0, np.inf), needs_groups: bool = False
) -> Callable[[RowInputs, int | None], Statistic | None]:
    """A metric that is a function of the groups' totals."""

    def function(inputs: RowInputs, k: int | None = None) -> Statistic | None:
        size = inputs.num_groups
        if needs_groups and size < 2:
            return None

        def of_totals(totals_BF: np.ndarray) -> np.ndarray:
            curves = totals_BF[:, 2 * size :].reshape(len(totals_BF), size, TEMPERATURES.size)
            return finish((totals_BF[:, :size], totals_BF[:, size : 2 * size], curves))

        n = int((inputs.tokens.sum(1) > 0).sum())
        return Statistic(inputs.features, of_totals, n, smooth, bounds)

    return function


def group_means(nll: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[B, G]; NaN for a group that a replicate did not draw."""
    return nll / np.where(tokens > 0, tokens, np.nan)


def _mean(parts: Parts) -> np.ndarray:
    nll, tokens, _ = parts
    return nll.sum(1) / tokens.sum(1)


def _mean_curve(parts: Parts) -> np.ndarray:
    """[B, T] over all tokens."""
    _, tokens, curves = parts
    return curves.sum(1) / tokens.sum(1)[:, None]


def _worst(parts: Parts) -> np.ndarray:
    return np.nanmax(group_means(*parts[:2]), axis=1)


def _gap(parts: Parts) -> np.ndarray:
    means = group_means(*parts[:2])
    return np.nanmax(means, axis=1) - np.nanmin(means, axis=1)


def _calibrated_worst(parts: Parts) -> np.ndarray:
    """All groups at the run's one temperature."""
    _, tokens, curves = parts
    place, offset = fit_temperature(_mean_curve(parts))
    means = curves / np.where(tokens > 0, tokens, np.nan)[:, :, None]
    by_group = [at_temperature(means[:, group], place, offset) for group in range(means.shape[1])]
    return np.nanmax(np.stack(by_group), axis=0)


def _best_temperature(inputs: RowInputs, k: int | None = None) -> Statistic | None:
    """A curved statistic where it is an end of TEMPERATURES: it then has no interval."""
    tokens = inputs.tokens.sum()
    curves = inputs.features[:, 2 * inputs.num_groups :].sum(axis=0)
    mean = curves.reshape(1, inputs.num_groups, TEMPERATURES.size).sum(axis=1)
    smooth = tokens == 0 or not is_at_end(mean / tokens)
    return _over_groups(lambda parts: lowest(_mean_curve(parts))[1], smooth, RANGE)(inputs, k)


def _accuracy(inputs: RowInputs, k: int | None = None) -> Statistic | None:
    if not np.isfinite(inputs.correct).any():
        return None
    return mean_statistic(inputs.correct, (0, 1))


def _choice_nll(inputs: RowInputs, k: int | None = None) -> Statistic | None:
    if not np.isfinite(inputs.choice_nll).any():
        return None
    return mean_statistic(inputs.choice_nll, (0, np.inf))


METRICS = (
    Metric("nll", _over_groups(_mean, True), "accuracy", "nats per target token", False, primary=True),
    Metric(
        "nll_calibrated",
        _over_groups(lambda parts: lowest(_mean_curve(parts))[0], True),
        "accuracy",
        "the same at the run's best temperature",
        False,
        primary=True,
    ),
    Metric(
        "temperature",
        _best_temperature,
        "accuracy",
        "that temperature: above 1, the model is too sure",
        None,
    ),
    Metric("accuracy", _accuracy, "accuracy", "rows whose answer scores highest", True, primary=True),
    Metric("choice_nll", _choice_nll, "accuracy", "NLL of the answer among the row's choices, nats", False),
    Metric(
        "nll_worst_group",
        _over_groups(_worst, False, needs_groups=True),
        "user",
        "NLL per token of the worst group",
        False,
        primary=True,
    ),
    Metric(
        "nll_gap_group",
        _over_groups(_gap, False, needs_groups=True),
        "user",
        "worst minus best group",
        False,
        primary=True,
    ),
    Metric(
        "nll_calibrated_worst_group",
        _over_groups(_calibrated_worst, False, needs_groups=True),
        "user",
        "calibrated NLL of the worst group, one temperature for all",
        False,
    ),
)


def statistics(inputs: RowInputs) -> tuple[dict[str, Statistic], dict[str, Metric]]:
    """All metrics that the rows define."""
    found, rows = {}, {}
    for metric in METRICS:
        statistic = metric.function(inputs, None)
        if statistic is not None:
            found[metric.name] = statistic
            rows[metric.name] = metric
    return found, rows


# -- by group and by label -----------------------------------------------------------------------------
def slices(inputs: RowInputs) -> dict[str, dict[str, dict[str, dict[str, Statistic]]]]:
    """dimension -> {"groups": {slice: {measure: ...}}, "summary": {measure: {worst, best, gap, ratio: ...}}}.

    Dimensions are the groups of target tokens, and every column with 2 to 12 values.
    """
    found = {}
    if inputs.num_groups > 1:
        nll, tokens = inputs.nll, inputs.tokens
        seen = np.flatnonzero(tokens.sum(0) > 0)
        names = [inputs.group_names[group] for group in seen]
        found["token_group"] = _dimension(names, {"nll": (nll[:, seen], tokens[:, seen], False)})
    for column, values in inputs.labels.items():
        pooled = pool_small(values)
        names = sorted({value for value in pooled if value is not None})
        if not 2 <= len(names) <= MOST_LABELS:
            continue
        member = np.stack([pooled == name for name in names], axis=1).astype(np.float64)
        nll, tokens = (values.sum(1)[:, None] for values in (inputs.nll, inputs.tokens))
        measures = {"nll": (member * nll, member * tokens, False)}
        judged = np.isfinite(inputs.correct)
        if judged.any():
            hits = np.where(judged, inputs.correct, 0.0)
            measures["accuracy"] = (member * hits[:, None], member * judged[:, None], True)
        found[f"label:{column}"] = _dimension(names, measures)
    return found


def _dimension(names: list[str], measures: dict[str, tuple[np.ndarray, np.ndarray, bool]]) -> dict:
    """`measures`: name -> (numerators [N, S], denominators [N, S], higher is better)."""
    groups: dict[str, dict[str, Statistic]] = {name: {} for name in names}
    summary = {}
    for measure, (above, below, higher) in measures.items():
        features = np.concatenate([above, below], axis=1)
        size = len(names)
        counts = (below > 0).sum(0)
        most = 1.0 if measure == "accuracy" else np.inf
        # A slice has features of its own: its interval then counts its users, and not those of all slices.
        for place, name in enumerate(names):
            own = features[:, [place, size + place]]
            groups[name][measure] = Statistic(own, ratio, int(counts[place]), True, (0, most))
        summary[measure] = _summary(features, size, (0, most), higher)
    return {"groups": groups, "summary": summary}


def _summary(
    features: np.ndarray, size: int, bounds: tuple[float, float], higher_is_better: bool
) -> dict[str, Statistic]:
    """worst, best, gap and ratio over the slices' means, from one matrix [N, 2S]."""
    n = int((features[:, size:].sum(1) > 0).sum())

    def means(totals: np.ndarray) -> np.ndarray:
        return group_means(totals[:, :size], totals[:, size:])

    return spread(features, means, n, higher_is_better, bounds, of_gap=bounds)
