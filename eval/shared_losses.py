"""Losses of several runs over the samples that all of them have a finite loss of.

A run that gives its hardest targets no probability has no finite loss there. A mean over the others is then
lower than another run's mean over all of them, though the run is worse. Where runs are paired, such samples
are therefore left out of the losses of every run. Ranks and lists keep them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]
"""Objects of predictions.jsonl."""


def over_shared_losses(runs: Sequence[Rows]) -> tuple[list[Rows], int]:
    """The predictions of all runs, with no loss for a sample that one of them has no finite loss of.

    A run without any finite loss takes none from the others: it has no metric of losses to compare.

    Args:
        runs: the same samples in each, with other orders if need be.
    Returns:
        the predictions, unchanged lists where nothing is left out, and the number of samples left out.
    """
    unknown: set[str] = set()
    for rows in runs:
        with_curves = any(row.get("nll_at_temperatures") for row in rows)
        own = {str(row["sample_id"]) for row in rows if not _has_losses(row, with_curves)}
        if len(own) < len(rows):
            unknown |= own
    if not unknown:
        return list(runs), 0
    kept = []
    for rows in runs:
        kept.append([_without_losses(row) if str(row["sample_id"]) in unknown else row for row in rows])
    return kept, len(unknown)


def note_of_left_out(num_left_out: int, num_samples: int, what: str) -> str:
    """Says in words that losses are over fewer samples.

    Args:
        what: the runs that are paired, e.g. "a and b".
    """
    return (
        f"{num_left_out} of {num_samples} samples lack a finite NLL in at least one of {what}: "
        "where these are compared, all metrics of the NLL are over the other samples"
    )


def _has_losses(row: Mapping[str, Any], with_curves: bool) -> bool:
    """Whether every loss of a sample is finite; a row of prompt and completion has losses of its groups."""
    if "groups" in row:
        values = [part[key] for part in row["groups"].values() for key in ("nll", "nll_at_temperatures")]
        if row.get("answer") is not None:
            values.append(row.get("choice_nll"))
    else:
        values = [row.get("target_nll")]
        if with_curves:
            values.append(row.get("nll_at_temperatures"))
    # None is NaN as float64.
    return all(np.isfinite(np.asarray(value, dtype=np.float64)).all() for value in values)


def _without_losses(row: Mapping[str, Any]) -> dict[str, Any]:
    if "groups" in row:
        groups = {group: {**part, "nll": None} for group, part in row["groups"].items()}
        found = {**row, "groups": groups}
        if row.get("answer") is not None:
            found["choice_nll"] = None
        return found
    return {**row, "target_nll": None, "nll_at_temperatures": None}
