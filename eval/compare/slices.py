"""The comparison inside each value of a sample label, e.g. the planted corpus's `kind`: who gains, who pays.

Averages over all users hide a trade between slices of the samples. A label column in the data makes it
visible here. The labels of the first run decide for all runs, so that a slice is the same samples in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.compare.comparison import Comparisons, compare_runs
from eval.compare.rows import cells
from eval.compare.runs import Run, with_predictions
from eval.report.words import label

SHOWN = ("ndcg@10", "accuracy", "nll")
MAX_VALUES = 6


def label_values(predictions: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Label -> its values, for labels that every sample has and that make two to six slices."""
    found: dict[str, list[str]] = {}
    for name in predictions[0].get("labels") or {}:
        values = sorted({str((row.get("labels") or {}).get(name)) for row in predictions})
        if 2 <= len(values) <= MAX_VALUES and "None" not in values:
            found[name] = values
    return found


def compare_slices(runs: Sequence[Run], num_bootstrap: int, seed: int) -> list[tuple[str, Comparisons]]:
    """[("kind = history", the comparison of those samples), ...]."""
    found = []
    for name, values in label_values(runs[0].predictions).items():
        label_of = _labels_by_sample(runs[0], name)
        for value in values:
            cut = []
            for run in runs:
                kept = [row for row in run.predictions if label_of[str(row["sample_id"])] == value]
                cut.append(with_predictions(run, kept))
            found.append((f"{name} = {value}", compare_runs(cut, num_bootstrap, seed)))
    return found


def label_notes(runs: Sequence[Run]) -> list[str]:
    """One note per label and run whose own labels are not those of the first run."""
    notes = []
    for name in label_values(runs[0].predictions):
        expected = _labels_by_sample(runs[0], name)
        for run in runs[1:]:
            own = _labels_by_sample(run, name)
            absent = sum(own[sample] is None for sample in expected)
            other = sum(own[sample] not in (None, value) for sample, value in expected.items())
            counts = []
            if absent:
                counts.append(f"{run.label} has no label for {absent} of {len(expected)} samples")
            if other:
                counts.append(f"{run.label} has another one for {other} of {len(expected)} samples")
            if counts:
                notes.append(f"slices by {name} are those of {runs[0].label}; {', and '.join(counts)}")
    return notes


def _labels_by_sample(run: Run, name: str) -> dict[str, str | None]:
    """Sample id -> its value of a label; None where the run has none."""
    found = {}
    for row in run.predictions:
        value = (row.get("labels") or {}).get(name)
        found[str(row["sample_id"])] = None if value is None else str(value)
    return found


def slice_rows(slices: Sequence[tuple[str, Comparisons]]) -> list[list[str]]:
    """Table rows; `columns` names their cells."""
    rows = []
    for title, found in slices:
        samples = f"{title} ({len(found.runs[0].inputs.user_ids)} users)"
        for metric in (name for name in SHOWN if name in found.metrics):
            for run in found.rows:
                row = cells(found, run, metric)
                rows.append(
                    [
                        samples,
                        label(metric),
                        row.baseline,
                        run,
                        row.value,
                        row.difference,
                        row.interval,
                        row.verdict,
                    ]
                )
    return rows


def columns(baseline: str) -> list[str]:
    """The column names of `slice_rows`."""
    return ["samples", "metric", baseline, "run", "value", "difference", "95 % interval", "verdict"]
