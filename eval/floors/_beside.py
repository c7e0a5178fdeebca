"""A model minus its floors: paired differences over the same users, with intervals.

Two intervals that overlap do not say that there is no difference: what is easy for some users is easy for the
model and for the floor. The same draws of users go through both, so that this cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.intervals import Resampled, compare, resample
from eval.metrics import table
from eval.metrics.base import Metric
from eval.metrics.inputs import build_inputs
from eval.shared_losses import over_shared_losses
from gdrt_ds.files import finite

CUT_OFF = 10
METRICS = (f"ndcg@{CUT_OFF}", f"hr@{CUT_OFF}", "nll", "nll_calibrated")
OF_ONE_NORMALISATION = ("nll",)
Rows = list[dict[str, Any]]


def minus_floors(
    predictions: Rows,
    floors: Mapping[str, Rows],
    entries: Sequence[Any],
    num_bootstrap: int,
    seed: int = 0,
    *,
    over_catalogue: bool = True,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns by floor, for each of METRICS that both have, the figures of model - floor.

    Differences of the NLL are over the samples that the model and all floors have a finite NLL of.

    Args:
        predictions: of the model, as in predictions.jsonl.
        floors: by name, predictions for the same samples.
        over_catalogue: whether the model's probabilities sum to one over the catalogue, as the floors' do. If
            they sum to one over all token sequences, `nll` is left out: it holds what the model gives to
            text that is no title.
    """
    differences: dict[str, dict[str, dict[str, Any]]] = {}
    (predictions, *shared), _ = over_shared_losses([predictions, *floors.values()])
    own, metrics = _resampled(predictions, entries, num_bootstrap, seed)
    for floor, rows in zip(floors, shared, strict=True):
        found, _ = _resampled(rows, entries, num_bootstrap, seed)
        differences[floor] = {
            name: _figure(found[name], own[name], metrics[name].higher_is_better)
            for name in METRICS
            if name in own and name in found and (over_catalogue or name not in OF_ONE_NORMALISATION)
        }
    return differences


def _resampled(
    rows: Rows, entries: Sequence[Any], num_bootstrap: int, seed: int
) -> tuple[dict[str, Resampled], dict[str, Metric]]:
    """METRICS of predictions with their draws of users."""
    inputs = build_inputs(rows, entries)
    statistics, metrics, _ = table.statistics(inputs, (CUT_OFF,))
    asked = {name: statistics[name] for name in METRICS if name in statistics}
    return resample(asked, inputs.user_of_sample, num_bootstrap, seed), metrics


def _figure(floor: Resampled, model: Resampled, higher_is_better: bool | None) -> dict[str, Any]:
    row = compare(floor, model)
    numbers = {
        "value": row.difference,
        "ci_low": row.ci_low,
        "ci_high": row.ci_high,
        "p_value": row.p_value,
        "minimum_detectable": row.minimum_detectable,
    }
    return {**finite(numbers), "n": row.n, "higher_is_better": higher_is_better}
