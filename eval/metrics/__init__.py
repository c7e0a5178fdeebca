"""Metrics over predictions: accuracy, item side, provider side, user side, each with a bootstrap interval over users.

    from eval.metrics import evaluate, evaluate_targets
    found = evaluate(predictions, catalogue.entries, history_item_counts=counts)
    found["metrics"]["ndcg@10"]   ->  {"value": ..., "ci_low": ..., "ci_high": ..., "n": ..., "higher_is_better": True}
    found["breakdowns"]["user:gender"]["groups"]["F"]["ndcg@10"]["value"]
    found["breakdowns"]["user:gender"]["summary"]["ndcg@10"]["gap"]["value"]      (worst, best, gap, ratio)
Definitions with formulas: docs/evaluation.md. One function and one row per metric: table.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.intervals import Resampled, Statistic, interval, resample
from eval.metrics import table
from eval.metrics.inputs import build_inputs
from eval.metrics.table import METRICS, Metric, row_of
from eval.metrics.user_side import breakdown_statistics
from gdrt_ds.errors import UserError

__all__ = ["METRICS", "Metric", "evaluate", "evaluate_targets", "build_inputs", "row_of", "figure"]

DEFAULT_KS = (1, 5, 10, 20, 50)


def evaluate(
    predictions: Sequence[Mapping[str, Any]],
    catalogue_entries: Sequence[Any],
    *,
    ks: Sequence[int] = DEFAULT_KS,
    history_item_counts: Mapping[str, float] | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
    breakdowns: bool = True,
) -> dict[str, Any]:
    """Measure everything that the data defines.

    predictions: objects as in predictions.jsonl (sample_id, user_id, target_id, rank, top_ids, target_nll, history_ids, user,
    labels, relevance_group; optional num_tied = items that share the target's score, for exact tie handling).
    catalogue_entries: objects with item_id, merged_ids, train_count, provider, groups.
    history_item_counts: item id -> occurrences in train histories (GH of MGU and DGU); default: train_count, noted.

    Returns {"metrics": {name: figure}, "breakdowns": {dimension: {"groups": {group: {measure: figure}}, "summary":
    {measure: {"worst"|"best"|"gap"|"ratio": figure}}}}, "notes": [...]}; a figure is {"value", "ci_low", "ci_high", "n",
    "higher_is_better"}, undefined numbers are None. Raises UserError on inputs that do not fit (see build_inputs).
    """
    ks = _checked_ks(ks)
    inputs = build_inputs(predictions, catalogue_entries, history_item_counts)
    found, rows, notes = table.statistics(inputs, ks)
    nested = breakdown_statistics(inputs) if breakdowns else {}
    flat = {("metric", name): statistic for name, statistic in found.items()}
    flat.update({("breakdown", *path): statistic for path, statistic in _walk(nested)})
    samples = resample(flat, inputs.user_of_sample, num_bootstrap, seed)
    metrics = {name: figure(samples["metric", name], rows[name].higher_is_better) for name in found}
    result = _figures(nested, samples)
    no_provider = int((inputs.provider_of_item < 0).sum())
    if inputs.provider_names and no_provider:
        notes.append(
            f"{no_provider} of {inputs.num_items} items have no provider; provider metrics are over the others"
        )
    return {"metrics": metrics, "breakdowns": result, "notes": [*inputs.notes, *notes]}


def evaluate_targets(
    predictions: Sequence[Mapping[str, Any]],
    catalogue_entries: Sequence[Any],
    *,
    ks: Sequence[int] = DEFAULT_KS,
    history_item_counts: Mapping[str, float] | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The calibration metrics of the test targets themselves (lists of one item): {name: figure}.

    MGU measures calibration to the history, not to the future: with a time split even a perfect recommender has this value.
    """
    inputs = build_inputs(predictions, catalogue_entries, history_item_counts).as_targets()
    found, rows, _ = table.statistics(inputs, _checked_ks(ks), only_targets=True)
    samples = resample(found, inputs.user_of_sample, num_bootstrap, seed)
    return {name: figure(samples[name], rows[name].higher_is_better) for name in found}


def figure(sample: Resampled, higher_is_better: bool | None) -> dict[str, Any]:
    """One figure of results.json; NaN and infinity become None."""
    low, high = interval(sample)
    numbers = {
        key: (x if math.isfinite(x) else None)
        for key, x in (("value", sample.value), ("ci_low", low), ("ci_high", high))
    }
    return {**numbers, "n": sample.n, "higher_is_better": higher_is_better}


def _checked_ks(ks: Sequence[int]) -> tuple[int, ...]:
    if not ks or any(not isinstance(k, int) or k < 1 for k in ks):
        raise UserError(f"cut-offs are {list(ks)}", "give whole numbers of at least 1, such as 1,5,10,20,50")
    return tuple(sorted(set(ks)))


MEASURE_DIRECTION = {"ndcg@10": True, "hr@10": True, "mrr": True, "nll": False}


def _walk(nested: Mapping, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Statistic]]:
    pairs = []
    for key, value in nested.items():
        pairs += [((*path, key), value)] if isinstance(value, Statistic) else _walk(value, (*path, key))
    return pairs


def _figures(nested: Mapping, samples: Mapping, path: tuple[str, ...] = ()) -> dict[str, Any]:
    result = {}
    for key, value in nested.items():
        here = (*path, key)
        if isinstance(value, Statistic):
            result[key] = figure(samples[("breakdown", *here)], _direction(here))
        else:
            result[key] = _figures(value, samples, here)
    return result


def _direction(path: tuple[str, ...]) -> bool | None:
    if path[1] == "groups":
        return MEASURE_DIRECTION.get(path[-1])
    return {"gap": False, "ratio": True}.get(path[-1], MEASURE_DIRECTION.get(path[2]))
