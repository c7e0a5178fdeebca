"""A model minus its floors: paired differences over the same users, with intervals.

Two intervals that overlap do not say that there is no difference: what is easy for some users is easy for the
model and for the floor. The same draws of users go through both, so that this cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.intervals import compare, resample
from eval.metrics import table
from eval.metrics.inputs import Inputs, build_inputs
from gdrt_ds.files import finite

CUT_OFF = 10
METRICS = (f"ndcg@{CUT_OFF}", f"hr@{CUT_OFF}", "nll", "nll_calibrated")


def minus_floor(
    model: Inputs, floor_rows: list[dict[str, Any]], entries: Sequence[Any], num_bootstrap: int, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Returns, for each of METRICS that both have, the figures of model - floor.

    Args:
        model: of the model's predictions. floor_rows: predictions of the floor for the same samples.
    """
    samples = []
    kinds: dict[str, table.Metric] = {}
    for inputs in (model, build_inputs(floor_rows, entries)):
        statistics, found, _ = table.statistics(inputs, (CUT_OFF,))
        kinds |= found
        asked = {name: statistics[name] for name in METRICS if name in statistics}
        samples.append(resample(asked, inputs.user_of_sample, num_bootstrap, seed))
    own, floor = samples
    differences = {}
    for name in METRICS:
        if name not in own or name not in floor:
            continue
        row = compare(floor[name], own[name], len(model.user_ids))
        numbers = {
            "value": row.difference,
            "ci_low": row.ci_low,
            "ci_high": row.ci_high,
            "p_value": row.p_value,
            "minimum_detectable": row.minimum_detectable,
        }
        differences[name] = {
            **finite(numbers),
            "n": row.n,
            "higher_is_better": kinds[name].higher_is_better,
        }
    return differences
