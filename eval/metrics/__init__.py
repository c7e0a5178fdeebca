"""Metrics over predictions: accuracy, item, provider and user side, each with an interval over users.

    from eval.metrics import evaluate, evaluate_targets
    found = evaluate(predictions, catalogue.entries, history_item_counts=counts)
    found["metrics"]["ndcg@10"]   ->  {"value", "ci_low", "ci_high", "n", "higher_is_better"}
    found["breakdowns"]["user:gender"]["groups"]["F"]["ndcg@10"]["value"]
    found["breakdowns"]["user:gender"]["summary"]["ndcg@10"]["gap"]["value"]      (worst, best, gap, ratio)

A metric family is one file here that binds `METRICS`; `table.py` finds it. Slices (slices.py) stand in
results.json under `breakdowns`. Definitions with formulas: docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.intervals import Resampled, Statistic, interval, resample
from eval.metrics import table
from eval.metrics.base import Metric
from eval.metrics.inputs import build_inputs
from eval.metrics.slices import all_slices
from eval.metrics.table import metrics, row_of
from gdrt_ds.errors import UserError
from gdrt_ds.files import finite

__all__ = [
    "DEFAULT_KS",
    "Metric",
    "build_inputs",
    "evaluate",
    "evaluate_targets",
    "figure",
    "metrics",
    "row_of",
]

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
    """Measures everything that the data define.

    Args:
        predictions: objects as in predictions.jsonl (sample_id, user_id, target_id, rank, top_ids,
            target_nll, history_ids, user, labels, relevance_group; optional num_tied = items that share the
            target's score, for exact tie handling).
        catalogue_entries: objects with item_id, merged_ids, train_count, provider, groups.
        ks: cut-offs.
        history_item_counts: item id -> occurrences in train histories (GH of MGU and DGU). The default is
            train_count, and a note says so.
        num_bootstrap, seed: of the intervals.
        breakdowns: whether slices are measured, too.
    Returns:
        {"metrics": {name: figure}, "breakdowns": {dimension: {"groups": {slice: {measure: figure}},
        "summary": {measure: {"worst"|"best"|"gap"|"ratio": figure}}}}, "notes": [...]}. A figure is
        {"value", "ci_low", "ci_high", "n", "higher_is_better"}; undefined numbers are None.
    Raises:
        UserError: inputs that do not fit (see build_inputs).
    """
    ks = _checked_ks(ks)
    inputs = build_inputs(predictions, catalogue_entries, history_item_counts)
    found, rows, notes = table.statistics(inputs, ks)
    nested = all_slices(inputs) if breakdowns else {}
    flat = {("metric", name): statistic for name, statistic in found.items()}
    flat.update({("slice", *path): statistic for path, statistic in _walk(nested)})
    samples = resample(flat, inputs.user_of_sample, num_bootstrap, seed)
    without_provider = int((inputs.provider_of_item < 0).sum())
    if inputs.provider_names and without_provider:
        notes.append(
            f"{without_provider} of {inputs.num_items} items have no provider; "
            "provider metrics are over the others"
        )
    return {
        "metrics": {name: figure(samples["metric", name], rows[name].higher_is_better) for name in found},
        "breakdowns": _figures(nested, samples),
        "notes": [*inputs.notes, *notes],
    }


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

    MGU measures calibration to the history and not to the future: with a time split even a perfect
    recommender has this value. Arguments as in `evaluate`.
    """
    inputs = build_inputs(predictions, catalogue_entries, history_item_counts).as_targets()
    found, rows, _ = table.statistics(inputs, _checked_ks(ks), only_targets=True)
    samples = resample(found, inputs.user_of_sample, num_bootstrap, seed)
    return {name: figure(samples[name], rows[name].higher_is_better) for name in found}


def figure(sample: Resampled, higher_is_better: bool | None) -> dict[str, Any]:
    """One figure of results.json; NaN and infinity become None."""
    low, high = interval(sample)
    numbers = finite({"value": sample.value, "ci_low": low, "ci_high": high})
    return {**numbers, "n": sample.n, "higher_is_better": higher_is_better}


def _checked_ks(ks: Sequence[int]) -> tuple[int, ...]:
    if not ks or any(not isinstance(k, int) or k < 1 for k in ks):
        raise UserError(f"cut-offs are {list(ks)}", "give whole numbers of at least 1, such as 1,5,10,20,50")
    return tuple(sorted(set(ks)))


# -- slices: a tree of statistics to a tree of figures --------------------------------------------------
MEASURE_DIRECTION = {"ndcg@10": True, "hr@10": True, "mrr": True, "nll": False}
PART_DIRECTION = {"gap": False, "ratio": True}

Path = tuple[str, ...]
"""Keys from the root: (dimension, "groups", slice, measure) or (dimension, "summary", measure, part)."""


def _walk(nested: Mapping, path: Path = ()) -> list[tuple[Path, Statistic]]:
    pairs = []
    for key, value in nested.items():
        here = (*path, key)
        pairs += [(here, value)] if isinstance(value, Statistic) else _walk(value, here)
    return pairs


def _figures(nested: Mapping, samples: Mapping, path: Path = ()) -> dict[str, Any]:
    found = {}
    for key, value in nested.items():
        here = (*path, key)
        if isinstance(value, Statistic):
            found[key] = figure(samples[("slice", *here)], _direction(here))
        else:
            found[key] = _figures(value, samples, here)
    return found


def _direction(path: Path) -> bool | None:
    """Whether higher is better, of the figure at this path."""
    _, kind, third, last = path
    if kind == "groups":
        return MEASURE_DIRECTION.get(last)
    return PART_DIRECTION.get(last, MEASURE_DIRECTION.get(third))
