"""The runs of a comparison, read from evaluation folders, and the check that they may be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.folders import open_evaluation
from eval.intervals import Statistic
from eval.metrics import DEFAULT_KS, table
from eval.metrics.base import Metric
from eval.metrics.inputs import Inputs, build_inputs
from eval.rows import KIND
from eval.rows import metrics as row_metrics
from eval.rows.inputs import RowInputs, build_row_inputs
from eval.shared_losses import note_of_left_out, over_shared_losses
from gdrt_ds.errors import UserError

OWN_GROUPS = "token groups differ"
"""How the note about runs that were trained with other groups begins."""
MAY_DIFFER = ("scoring", "mode", "dtype")  # keys of results.json whose differences are noted, not refused
OF_ONE_NORMALISATION = ("nll", "cvar_nll", "nll_worst_relevance_group", "nll_gap_relevance_group")
"""Metrics of probabilities over the catalogue under one scoring, over all token sequences under the other."""
OF_OWN_GROUPS = ("nll_worst_group", "nll_gap_group", "nll_calibrated_worst_group")
"""Metrics of rows over the groups of tokens that the run was trained with."""


@dataclass
class Run:
    """One evaluation folder with everything that a comparison needs.

    Attributes:
        label: its name in tables.
        results: the content of results.json.
        predictions: one object per test sample, sorted by sample id.
        entries: the catalogue; empty for rows of prompt and completion.
        history_counts: item id -> its occurrences in training histories; None if the folder does not say.
        inputs: predictions and catalogue as arrays.
    """

    label: str
    folder: Path
    results: Mapping[str, Any]
    predictions: list[dict[str, Any]]
    entries: list[Any]
    history_counts: dict[str, float] | None
    inputs: Inputs | RowInputs

    @property
    def is_about_rows(self) -> bool:
        """Whether it is a model of rows of prompt and completion, without a catalogue."""
        return isinstance(self.inputs, RowInputs)

    def statistics(self) -> tuple[dict[str, Statistic], dict[str, Metric]]:
        """Every metric that the predictions define, as a statistic."""
        if isinstance(self.inputs, RowInputs):
            return row_metrics.statistics(self.inputs)
        found, metrics, _ = table.statistics(self.inputs, DEFAULT_KS)
        return found, metrics

    def metric_order(self) -> list[str]:
        """The names of all metrics in the order of the report."""
        if self.is_about_rows:
            return [metric.name for metric in row_metrics.METRICS]
        return [metric.name_at(k) for metric in table.metrics() for k in metric.cut_offs(DEFAULT_KS)]


def load_run(folder: str | Path, label: str) -> Run:
    """Reads an evaluation folder.

    Raises:
        UserError: a file is missing or damaged; names it.
    """
    evaluation = open_evaluation(folder, label)
    predictions = evaluation.predictions()
    # Samples are paired by their place, so the order of the lines in the file must not matter.
    predictions.sort(key=lambda row: str(row["sample_id"]))
    if evaluation.results.get("kind") == KIND:
        row_inputs = build_row_inputs(predictions, evaluation.results["group_names"])
        return Run(label, evaluation.folder, evaluation.results, predictions, [], None, row_inputs)
    entries = evaluation.entries()
    counts = evaluation.history_counts()
    inputs = build_inputs(predictions, entries, counts)
    return Run(label, evaluation.folder, evaluation.results, predictions, entries, counts, inputs)


def with_predictions(run: Run, predictions: list[dict[str, Any]]) -> Run:
    """The run with other predictions, e.g. those of a slice."""
    inputs: Inputs | RowInputs
    if run.is_about_rows:
        inputs = build_row_inputs(predictions, run.results["group_names"])
    else:
        inputs = build_inputs(predictions, run.entries, run.history_counts)
    return replace(run, predictions=predictions, inputs=inputs)


def with_shared_losses(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs with losses over the samples that all have a finite loss of; a note if any is left out.

    Args:
        runs: over the same samples.
    """
    predictions, num_left_out = over_shared_losses([run.predictions for run in runs])
    if not num_left_out:
        return list(runs), []
    names = ", ".join(dict.fromkeys(run.label for run in runs))
    note = note_of_left_out(num_left_out, len(runs[0].predictions), names)
    return [with_predictions(run, rows) for run, rows in zip(runs, predictions, strict=True)], [note]


def not_comparable(runs: Sequence[Run]) -> dict[str, str]:
    """Metric -> why its values mean different things in these runs; their difference means nothing."""
    found: dict[str, str] = {}
    if len({run.results.get("scoring") for run in runs}) > 1:
        found |= dict.fromkeys(OF_ONE_NORMALISATION, "probabilities under another scoring")
    if any(_other_groups_of_tokens(runs[0], run) for run in runs[1:]):
        found |= dict.fromkeys(OF_OWN_GROUPS, "other groups of tokens")
    return found


def _other_groups_of_tokens(first: Run, run: Run) -> bool:
    """Whether two runs on rows have groups of other names, or of other tokens under the same names.

    An evaluation saves a hash over the group of every token. Without it the numbers of tokens are compared.
    """
    if not isinstance(first.inputs, RowInputs) or not isinstance(run.inputs, RowInputs):
        return False
    if first.inputs.group_names != run.inputs.group_names:
        return True
    hashes = [(one.results.get("scoring_key") or {}).get("groups") for one in (first, run)]
    if None not in hashes:
        return hashes[0] != hashes[1]
    return not np.array_equal(first.inputs.tokens, run.inputs.tokens)


def with_parts_of(other: Run, run: Run, names: Sequence[str]) -> Run:
    """The run with some keys of another's predictions, by sample: a part must be the same targets in both."""
    theirs = {str(row["sample_id"]): row for row in other.predictions}
    predictions = []
    for row in run.predictions:
        parts = theirs.get(str(row["sample_id"]), {})
        predictions.append({**row, **{name: parts.get(name) for name in names}})
    return with_predictions(run, predictions)


def with_groups_of(first: Run, run: Run) -> tuple[Run, list[str]]:
    """The run with the relevance groups of the first, so that its worst group is over the same targets.

    Each run groups the test targets by its own number of groups and its own reference.

    Returns:
        the run as it is where the groups are equal or one has none, else another; a note if they differ.
    """
    if run.is_about_rows:
        return run, []
    pairs = [
        (theirs.get("relevance_group"), own.get("relevance_group"))
        for theirs, own in zip(first.predictions, run.predictions, strict=True)
    ]
    ours, others = zip(*pairs, strict=True)
    if ours == others or set(ours) == {None} or set(others) == {None}:
        return run, []
    differ = sum(one != two for one, two in pairs)
    return with_parts_of(first, run, ("relevance_group",)), [
        f"relevance groups differ in {differ} of {len(pairs)} samples between {first.label} and {run.label}: "
        f"figures of the worst group and the gap are over those of {first.label} for both, and so can differ "
        f"from the report of {run.label}"
    ]


def check_same(runs: Sequence[Run]) -> list[str]:
    """Refuses runs whose numbers cannot be compared, and says what differs in those whose numbers can.

    Returns:
        one note per difference that does not forbid the comparison.
    Raises:
        UserError: other items, samples, targets or train counts.
    """
    first = runs[0]
    notes = []
    for run in runs[1:]:
        _refuse_other_data(first, run)
        if _other_groups_of_tokens(first, run):
            notes.append(
                f"{OWN_GROUPS}: {first.label} and {run.label} were trained with other groups, so "
                "figures of the worst group and the gap would be over each run's own groups"
            )
        for key in MAY_DIFFER:
            mine = first.results.get(key)
            theirs = run.results.get(key)
            if mine != theirs:
                notes.append(f"{key} differs: {first.label} {mine}, {run.label} {theirs}")
        notes += _other_histories(first, run)
    notes = [*_not_exact(runs), *notes]
    limits = sorted({str(run.results["limit"]) for run in runs if run.results.get("limit")})
    if limits:
        notes.insert(0, f"not a result: limited to {', '.join(limits)} samples")
    return notes


def _not_exact(runs: Sequence[Run]) -> list[str]:
    """One warning per run whose own check found that its scores are not exact."""
    found = []
    for run in runs:
        check = run.results.get("exactness") or {}
        if check.get("exact", True) or check.get("difference_nats") is None:
            continue
        found.append(
            f"warning: the scores of {run.label} are not exact ({check.get('dtype')}): the same title scored "
            f"in two ways differs by {check['difference_nats']:.1e} nats, and smaller differences between "
            "runs mean nothing; evaluate it again in float32"
        )
    return found


def _other_histories(first: Run, run: Run) -> list[str]:
    """One note where MGU and DGU rest on other history shares, one where the samples have other histories."""
    notes = []
    counts = first.history_counts
    other_counts = run.history_counts
    if (counts is None) != (other_counts is None):
        known, unknown = (run, first) if counts is None else (first, run)
        notes.append(
            f"only {known.label} has the occurrences in train histories (history_count of its catalogue): "
            f"MGU and DGU of {unknown.label} are distances to the shares of its train counts instead"
        )
    elif counts != other_counts:
        notes.append(
            f"occurrences in train histories differ between {first.label} and {run.label}: their MGU and DGU "
            "are distances to different shares"
        )
    # Both lists are sorted by sample id, and the ids are the same.
    pairs = zip(first.predictions, run.predictions, strict=True)
    others = sum((one.get("history_ids") or []) != (two.get("history_ids") or []) for one, two in pairs)
    if others:
        notes.append(
            f"histories differ in {others} of {len(first.predictions)} samples between {first.label} and "
            f"{run.label}: the models were asked with other histories"
        )
    return notes


def _refuse_other_data(first: Run, run: Run) -> None:
    pair = f"{first.label} and {run.label}"
    if first.is_about_rows != run.is_about_rows:
        raise UserError(
            f"{pair} are of different kinds: one ranks a catalogue, the other is on rows of prompt and "
            "completion",
            "compare evaluations of one kind",
        )
    if isinstance(first.inputs, RowInputs) or isinstance(run.inputs, RowInputs):
        _refuse_other_rows(first, run, pair)
        return
    ours = set(first.inputs.item_ids)
    theirs = set(run.inputs.item_ids)
    if ours != theirs:
        raise UserError(
            f"{pair} have different catalogues ({len(ours)} and {len(theirs)} items, "
            f"{len(ours & theirs)} shared)",
            "evaluate both on the same data; ranks among different items cannot be compared",
        )
    our_samples = _samples(first)
    their_samples = _samples(run)
    if our_samples != their_samples:
        raise UserError(
            f"{pair} have different test samples ({len(our_samples)} and {len(their_samples)}, "
            f"{len(our_samples & their_samples)} with the same user and target)",
            "evaluate both with the same split, --limit and data; a paired comparison needs the same users",
        )
    if _train_counts(first) != _train_counts(run):
        raise UserError(
            f"{pair} have different train counts in their catalogues",
            "evaluate both with the same training split",
        )


def _refuse_other_rows(first: Run, run: Run, pair: str) -> None:
    ours = _samples(first)
    theirs = _samples(run)
    if ours != theirs:
        raise UserError(
            f"{pair} have different test rows ({len(ours)} and {len(theirs)}, {len(ours & theirs)} with the "
            "same prompt and completion)",
            "evaluate both with the same split, --limit and data",
        )


def _samples(run: Run) -> set[tuple[str, str, str]]:
    return {(str(row["sample_id"]), str(row["user_id"]), row["target_id"]) for row in run.predictions}


def _train_counts(run: Run) -> dict[str, Any]:
    return dict(zip(run.inputs.item_ids, run.inputs.train_count, strict=True))
