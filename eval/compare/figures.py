"""The figures of a comparison: accuracy against disparity, and the improvement over the baseline."""

from __future__ import annotations

import math
from typing import Any

from eval.compare.comparison import Comparisons
from eval.intervals import Comparison
from eval.metrics import figure
from eval.report.words import label
from gdrt_ds.files import finite

EFFECT_SHOWN = 2.0  # effect sizes are cut here: one huge effect must not flatten the others


def comparison_figures(found: Comparisons) -> list[dict[str, Any]]:
    """The figures in reading order; the first is left out where a run lacks one of its two metrics."""
    scatter = _accuracy_against_disparity(found)
    improvement = _improvement(found)
    return [improvement] if scatter is None else [scatter, improvement]


def _accuracy_against_disparity(found: Comparisons) -> dict[str, Any] | None:
    if not {"ndcg@10", "mgu@5"} <= set(found.metrics):
        return None
    points = []
    for run in found.runs:
        x = figure(found.samples[run.label]["mgu@5"], None)
        y = figure(found.samples[run.label]["ndcg@10"], None)
        if x["value"] is None or y["value"] is None:
            return None
        points.append(
            {
                "x": x["value"],
                "y": y["value"],
                "x_low": x["ci_low"],
                "x_high": x["ci_high"],
                "y_low": y["ci_low"],
                "y_high": y["ci_high"],
                "label": run.label,
                "series": run.label,
            }
        )
    return {
        "kind": "scatter",
        "title": "Accuracy against disparity",
        "points": points,
        "x_label": "MGU@5 (lower is better)",
        "y_label": "NDCG@10 (higher is better)",
        "legend": False,
        "caption": "Up and to the left is better on both. Whiskers are each run's own 95 % interval; the "
        "paired "
        "differences in the tables are sharper.",
    }


def _improvement(found: Comparisons) -> dict[str, Any]:
    series = []
    num_cut = 0
    for run, rows in found.rows.items():
        bars = [_bar(rows[name], found.metrics[name].higher_is_better) for name in found.family]
        num_cut += sum(abs(value) > EFFECT_SHOWN for value, _, _ in bars)
        series.append(
            {
                "name": run,
                "values": finite([_cut(value) for value, _, _ in bars]),
                "low": finite([_cut(low) for _, low, _ in bars]),
                "high": finite([_cut(high) for _, _, high in bars]),
            }
        )
    caption = (
        "Differences in units of their spread over users, turned so that right is better. Whiskers are 95 % "
        "intervals without correction; a whisker over zero shows no difference."
    )
    if num_cut:
        caption += f" Bars beyond {EFFECT_SHOWN:g} are cut there."
    return {
        "kind": "bar",
        "title": f"Improvement over {found.runs[0].label}",
        "categories": [label(name) for name in found.family],
        "series": series,
        "horizontal": True,
        "y_label": "effect size (right is better)",
        "caption": caption,
    }


def _bar(row: Comparison, higher_is_better: bool | None) -> tuple[float, float, float]:
    """(effect size, low, high), turned so that more is better."""
    # The bounds of the difference are brought to effect-size units by the ratio of the two.
    scale = row.effect_size / row.difference if row.difference else 0.0
    low = row.ci_low * scale
    high = row.ci_high * scale
    if higher_is_better is False:
        return -row.effect_size, -high, -low
    return row.effect_size, low, high


def _cut(value: float) -> float:
    return value if math.isnan(value) else max(-EFFECT_SHOWN, min(EFFECT_SHOWN, value))
