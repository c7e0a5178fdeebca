"""The comparison once more inside each value of a sample label, e.g. the planted corpus's `kind`: who gains and who pays.

Averages over all users hide a trade between groups of samples; these rows are what a label column in the data is for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, Sequence

from eval.metrics.inputs import build_inputs
from eval.report import content

SHOWN = ("ndcg@10", "nll")
MAX_VALUES = 6


def label_values(predictions: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Label -> its values, for labels that every sample has and that split the samples into two to six parts."""
    found: dict[str, list[str]] = {}
    for name in predictions[0].get("labels") or {}:
        values = sorted({str((p.get("labels") or {}).get(name)) for p in predictions})
        if 2 <= len(values) <= MAX_VALUES and "None" not in values:
            found[name] = values
    return found


def compare_by_label(runs: Sequence[Any], compare: Callable[[Sequence[Any]], Any]) -> list[tuple[str, Any]]:
    """[("kind = history", comparison of those samples), ...]; `compare` is what compares whole runs."""
    parts = []
    for name, values in label_values(runs[0].predictions).items():
        for value in values:
            cut = []
            for run in runs:
                kept = [p for p in run.predictions if str(p["labels"][name]) == value]
                cut.append(
                    replace(run, predictions=kept, inputs=build_inputs(kept, run.entries, run.history_counts))
                )
            parts.append((f"{name} = {value}", compare(cut)))
    return parts


def label_rows(parts: Sequence[tuple[str, Any]], row: Callable) -> list[list[str]]:
    """Table rows: samples, metric, baseline, run, its value, difference, 95 % interval, verdict."""
    rows = []
    for where, found in parts:
        users = len(found.runs[0].inputs.user_ids)
        for name in SHOWN:
            for label, compared in found.rows.items():
                if name in compared:
                    cells = row(name, compared[name], found.metrics[name].higher_is_better)
                    rows.append(
                        [
                            f"{where} ({users} users)",
                            content.label(name),
                            cells[1],
                            label,
                            *cells[2:5],
                            compared[name].verdict,
                        ]
                    )
    return rows


def columns(base: str) -> list[str]:
    return ["samples", "metric", base, "run", "value", "difference", "95 % interval", "verdict"]
