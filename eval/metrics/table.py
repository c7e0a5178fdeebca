"""The table of all metrics, gathered from the families of this folder, and their statistics."""

from __future__ import annotations

from eval.intervals import Statistic
from eval.metrics.base import SIDES, Metric
from eval.metrics.inputs import Inputs
from gdrt_ds.registry import parts

FAMILIES = "eval.metrics"  # the folder in which a family is one file


def metrics() -> tuple[Metric, ...]:
    """All metrics in the order of the report.

    The order is by side. Within a side the family that is named after it comes first, then the others by
    name.
    """
    rows = []
    for family, members in parts(FAMILIES, "METRICS").items():
        for place, metric in enumerate(members):
            named_after = family.startswith(metric.side)
            rows.append(((SIDES.index(metric.side), not named_after, family, place), metric))
    return tuple(metric for _, metric in sorted(rows, key=lambda row: row[0]))


def row_of(name: str) -> Metric | None:
    """The metric that a name of results.json comes from."""
    stem, _, k = name.partition("@")
    for metric in metrics():
        if metric.name == name or (k.isdigit() and metric.name == stem + "@{k}"):
            return metric
    return None


def statistics(
    inputs: Inputs, ks: tuple[int, ...], only_targets: bool = False
) -> tuple[dict[str, Statistic], dict[str, Metric], list[str]]:
    """All defined metrics as statistics.

    Args:
        ks: the requested cut-offs.
        only_targets: only those that are shown for the test targets themselves.
    Returns:
        name -> Statistic, name -> Metric, and notes on what could not be measured.
    """
    found: dict[str, Statistic] = {}
    rows: dict[str, Metric] = {}
    notes: list[str] = []
    for metric in metrics():
        if only_targets and not metric.targets:
            continue
        cut_offs = metric.cut_offs(ks)
        for k in cut_offs:
            obstacle = _obstacle(metric, inputs, k)
            if obstacle is not None:
                notes.append(f"{metric.name_at(k)}: not measured, {obstacle}")
                continue
            statistic = metric.function(inputs, k)
            if statistic is not None:
                found[metric.name_at(k)] = statistic
                rows[metric.name_at(k)] = metric
            elif k == cut_offs[0]:  # what the data cannot define is undefined at every k: one note
                notes.append(f"{metric.name.replace('{k}', 'K')}: not defined on this data")
    return found, rows, notes


def _obstacle(metric: Metric, inputs: Inputs, k: int | None) -> str | None:
    """Why a cut-off cannot be measured; None if it can."""
    if k is not None and k > inputs.num_items:
        return f"K is larger than the catalogue ({inputs.num_items})"
    if metric.needs_ranks and not inputs.knows_ranks(k):
        return (
            f"the lists hold {inputs.top.shape[1]} items, and {int(inputs.missing_rank.sum())} targets that "
            "are not in them have no rank"
        )
    if k is None:
        return None
    if metric.needs_lists and not inputs.has_lists(k):
        return f"the lists hold {inputs.top.shape[1]} items"
    return None
