"""What a study shows of runs on rows of prompt and completion (`data.format=sft`).

Rows of a study may train with other groups, so the worst group of a run is not the same tokens in every row.
The worst value of the study's `label` is: `nll worst department` is the largest mean over the departments.
"""

from __future__ import annotations

from collections.abc import Sequence

from eval.intervals import Statistic
from eval.rows import metrics
from eval.rows.inputs import RowInputs

METRICS = ("nll", "nll_calibrated", "temperature", "accuracy", "choice_nll")


def statistics_of_rows(inputs: RowInputs, labels: Sequence[str]) -> dict[str, Statistic]:
    """The main metrics; for every label also the worst of its values, and each value's own.

    Names are those of the study's page: `nll`, `accuracy worst kind`, `nll kind=conflict`.

    Args:
        labels: columns of the rows with 2 to 12 values.
    """
    found, _ = metrics.statistics(inputs)
    shown = {name: found[name] for name in METRICS if name in found}
    by_column = metrics.slices(inputs)
    for label in labels:
        dimension = by_column.get(f"label:{label}")
        if dimension is None:
            continue
        for measure, summary in dimension["summary"].items():
            shown[f"{measure} worst {label}"] = summary["worst"]
        for value, measures in dimension["groups"].items():
            shown |= {f"{measure} {label}={value}": statistic for measure, statistic in measures.items()}
    return shown


def higher_is_better(name: str) -> bool | None:
    """Which way is better for a metric of rows; None for one that is none of them."""
    return next((metric.higher_is_better for metric in metrics.METRICS if metric.name == name), None)
