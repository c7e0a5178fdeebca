"""Paired differences of runs to a baseline, over the same users.

The same draws of users go through all runs, so that what the runs share cancels in the differences. Holm's
correction runs over the primary family, which `eval.metrics.table` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from eval.compare.runs import Run, check_same, not_comparable, with_groups_of, with_shared_losses
from eval.intervals import Comparison, Resampled, compare_family, resample
from eval.metrics import figure, table
from gdrt_ds.errors import UserError


@dataclass
class Comparisons:
    """All runs against the first.

    Attributes:
        runs: the baseline, then the others.
        samples: label -> metric -> its value and bootstrap replicates.
        rows: label -> metric -> the comparison of that run with the baseline.
        metrics: the metrics that every run has, in the order of the metric table.
        family: those of them that Holm's correction runs over.
        notes: what differs between the runs, for the reader.
        slices: (title, comparison of the samples with one value of a label); see `eval.compare.slices`.
    """

    runs: list[Run]
    samples: dict[str, dict[str, Resampled]]
    rows: dict[str, dict[str, Comparison]]
    metrics: dict[str, table.Metric]
    family: list[str]
    num_bootstrap: int
    notes: list[str]
    slices: list[tuple[str, Comparisons]] = field(default_factory=list)


def compare_runs(runs: Sequence[Run], num_bootstrap: int = 2000, seed: int = 0) -> Comparisons:
    """Compares every run with the first.

    Args:
        num_bootstrap: draws of users. seed: of those draws.
    Raises:
        UserError: fewer than two runs, or runs over other data (see `check_same`).
    """
    if len(runs) < 2:
        raise UserError("one folder is nothing to compare", "give at least two evaluation folders")
    notes = check_same(runs)
    first, *others = runs
    runs = [first]
    for run in others:
        run, differing = with_groups_of(first, run)
        runs.append(run)
        notes += differing
    runs, left_out = with_shared_losses(runs)
    notes += left_out
    samples = {}
    found_metrics = {}
    for run in runs:
        statistics, metrics_of_run = run.statistics()
        samples[run.label] = resample(statistics, run.inputs.user_of_sample, num_bootstrap, seed)
        found_metrics.update(metrics_of_run)
    missing = {name for name in found_metrics if not all(name in own for own in samples.values())}
    if missing:
        notes.append(f"left out, because not every run has them: {', '.join(sorted(missing))}")
    unlike = {name: why for name, why in not_comparable(runs).items() if name in found_metrics}
    for why in dict.fromkeys(unlike.values()):
        of_why = ", ".join(name for name in unlike if unlike[name] == why)
        notes.append(f"left out, because they are of {why} in some of the runs: {of_why}")
    order = runs[0].metric_order()
    names = sorted(found_metrics.keys() - missing - unlike.keys(), key=order.index)
    metrics = {name: found_metrics[name] for name in names}
    family = [name for name, metric in metrics.items() if metric.is_primary(_cut_off(name))]
    directions = {name: metric.higher_is_better for name, metric in metrics.items()}
    kept = {label: {name: own[name] for name in names} for label, own in samples.items()}
    baseline = kept[runs[0].label]
    rows = {run.label: compare_family(baseline, kept[run.label], family, directions) for run in runs[1:]}
    return Comparisons(list(runs), kept, rows, metrics, family, num_bootstrap, notes)


def _cut_off(name: str) -> int | None:
    """10 for ndcg@10, None for a metric of whole rankings."""
    _, _, cut_off = name.partition("@")
    return int(cut_off) if cut_off else None


def to_json(found: Comparisons) -> dict[str, Any]:
    """The content of compare.json; NaN is made null by its writer (`gdrt_ds.files.write_json`)."""
    runs = {}
    for run in found.runs:
        figures = {
            name: figure(sample, found.metrics[name].higher_is_better)
            for name, sample in found.samples[run.label].items()
        }
        runs[run.label] = {
            "folder": run.folder.name,
            "objective": run.results.get("objective"),
            "scoring": run.results.get("scoring"),
            "metrics": figures,
        }
    comparisons = {
        label: {name: asdict(row) for name, row in rows.items()} for label, rows in found.rows.items()
    }
    first = found.runs[0]
    return {
        "baseline": first.label,
        "runs": runs,
        "comparisons": comparisons,
        "primary_family": found.family,
        "num_bootstrap": found.num_bootstrap,
        "num_users": len(first.inputs.user_ids),
        "num_samples": first.inputs.num_samples,
        "notes": found.notes,
    }
