"""One setting of a study: its rows over the same users, each over its own seeds, and their differences."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.compare.runs import (
    OWN_GROUPS,
    Run,
    check_same,
    load_run,
    not_comparable,
    with_parts_of,
    with_predictions,
    with_shared_losses,
)
from eval.intervals import Comparison, Resampled, compare_family, resample
from eval.metrics import table
from eval.rows.inputs import RowInputs
from eval.study import rows_of_text
from eval.study.beside_floors import BesideFloor, beside_floors
from eval.study.reading import Grid
from eval.study.seeds import combine_all, shared_seeds
from gdrt_ds.errors import UserError

METRICS = (
    "nll",
    "nll_worst_relevance_group",
    "nll_calibrated",
    "nll_calibrated_worst_relevance_group",
    "cvar_nll",
    "temperature",
    "ndcg@10",
    "hr@10",
    "mrr",
    "mgu@5",
    "dgu@5",
    "coverage@10",
)
IN_SLICES = ("ndcg@10", "nll")
FAMILY = (
    "nll",
    "nll_worst_relevance_group",
    "nll_calibrated",
    "nll_calibrated_worst_relevance_group",
    "ndcg@10",
    "mgu@5",
    "accuracy",
)
# Name on the page -> (audit, measure, whether it is shown as log2: ratios have means only as logarithms).
AUDITED = {
    "known through the history, nats": ("information", "known through the history", False),
    "known without it, nats": ("information", "known without the history", False),
    "history sensitivity, nats": ("sensitivity", "swapped history - true", False),
    "last item alone costs, nats": ("history_length", "NLL, last 1 - all", False),
    "auxiliary:interaction, log2": ("language", "log2 ratio", False),
    "auxiliary:interaction, tuned / base, log2": ("language", "ratio after / before tuning", True),
}
Runs = dict[str, dict[int, Run]]  # row -> seed -> its evaluation
Statistics = dict[str, dict[int, dict[str, Resampled]]]  # row -> seed -> metric


@dataclass
class Block:
    """One setting: its rows over the same users, each over its own seeds.

    Attributes:
        seeds: row -> the seeds that it was trained with.
        rows: row -> metric -> its value over all its seeds.
        comparisons: reference row -> row -> metric -> the difference over the seeds that both have.
        audits: name on the page -> row -> seed -> value.
        floors: floor -> metric -> its mean over the seeds.
        beside_floors: floor -> row -> metric -> the difference to the floor.
        num_items: of the catalogue; None for rows of prompt and completion, which have none.
        notes: what the reader has to know beside the numbers.
    """

    setting: str
    seeds: dict[str, list[int]]
    rows: dict[str, dict[str, Resampled]]
    comparisons: dict[str, dict[str, dict[str, Comparison]]]
    audits: dict[str, dict[str, dict[int, float]]]
    floors: dict[str, dict[str, float | None]]
    beside_floors: dict[str, dict[str, dict[str, BesideFloor]]]
    num_users: int
    num_items: int | None
    notes: list[str]


def load_blocks(folder: Path, grid: Grid, num_bootstrap: int) -> list[Block]:
    """One block for each setting that has evaluated cells, in the order of the study.

    Args:
        num_bootstrap: draws of users.
    Raises:
        UserError: cells of a setting cannot be compared.
    """
    blocks = []
    for setting in grid.study["settings"]:
        cells = grid.cells_of(setting)
        if cells:
            blocks.append(build_block(grid.study, folder, setting, cells, num_bootstrap))
    return blocks


def build_block(
    study: Mapping[str, Any], folder: Path, setting: str, cells: list[dict[str, Any]], num_bootstrap: int
) -> Block:
    """Rows of one setting, each over its own seeds; two rows are compared over the seeds that both have."""
    runs = _load_runs(study, folder, cells)
    base = study["baseline"] if study["baseline"] in runs else next(iter(runs))
    notes = _check(setting, runs, base)
    if base != study["baseline"]:
        notes.append(
            f"{setting}: no run of the baseline {study['baseline']} is evaluated yet; until then {base} "
            "takes its place"
        )
    runs, left_out = _over_shared_losses(setting, runs)
    notes += left_out
    unlike = not_comparable([run for found in runs.values() for run in found.values()])
    if "nll" in unlike:
        notes.append(
            f"{setting}: rows differ in their scoring, so there is no difference of {', '.join(unlike)}; "
            "those of the calibrated NLL remain"
        )
    statistics: Statistics = {}
    for row, found in runs.items():
        statistics[row] = {}
        for seed, run in found.items():
            same_parts = with_groups_and_labels_of(run, runs[base].get(seed, run))
            statistics[row][seed] = statistics_of(same_parts, labels_of(study), num_bootstrap)
    first = next(iter(runs[base].values()))
    num_users = len(first.inputs.user_ids)
    return Block(
        setting=setting,
        seeds={row: list(found) for row, found in runs.items()},
        rows={row: combine_all(list(found.values())) for row, found in statistics.items()},
        comparisons=_comparisons(statistics, base, study["controls"], unlike),
        audits=_audits(runs),
        floors=_floors(runs),
        beside_floors=beside_floors(runs),
        num_users=num_users,
        num_items=None if isinstance(first.inputs, RowInputs) else first.inputs.num_items,
        notes=notes,
    )


def _load_runs(study: Mapping[str, Any], folder: Path, cells: list[dict[str, Any]]) -> Runs:
    """The evaluations of the cells, rows in the order of the study and seeds ascending."""
    found: Runs = {}
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        label = f"{cell['row']} seed {cell['seed']}"
        found.setdefault(cell["row"], {})[cell["seed"]] = load_run(folder / cell["evaluation"], label)
    return {row: found[row] for row in study["rows"] if row in found}


def _check(setting: str, runs: Runs, base: str) -> list[str]:
    """Refuses what cannot be compared; returns notes, each once."""
    notes = []
    first_of_seed = []
    for seed in sorted({seed for found in runs.values() for seed in found}):
        beside = [found[seed] for found in runs.values() if seed in found]
        first_of_seed.append(beside[0])
        found = check_same([runs[base].get(seed, beside[0]), *beside])
        # The page shows no figure over a run's own groups, only those over the study's labels.
        notes += [note for note in found if not note.startswith(OWN_GROUPS)]
    if not _same_samples(first_of_seed):
        notes.append(
            f"{setting}: seeds differ in their test users, so users are drawn by their place in the test "
            "split"
        )
        notes += _floor_notes(setting, runs)
    lonely = [f"{row} {seed}" for row, found in runs.items() for seed in found if seed not in runs[base]]
    if lonely:
        notes.append(
            f"{setting}: without a run of {base} of the same seed: {', '.join(lonely)}; their worst "
            "relevance group is of their own groups"
        )
    return list(dict.fromkeys(notes))


def _over_shared_losses(setting: str, runs: Runs) -> tuple[Runs, list[str]]:
    """The runs with losses over the samples that all rows of their seed have; a note for each other seed."""
    shared: Runs = {row: dict(found) for row, found in runs.items()}
    notes = []
    for seed in sorted({seed for found in runs.values() for seed in found}):
        rows = [row for row in runs if seed in runs[row]]
        kept, found = with_shared_losses([runs[row][seed] for row in rows])
        for row, run in zip(rows, kept, strict=True):
            shared[row][seed] = run
        notes += [f"{setting}: {note}" for note in found]
    return shared, notes


def _same_samples(runs: Sequence[Run]) -> bool:
    """Whether the runs of different seeds have the same test samples.

    Raises:
        UserError: they do not even have the same number of them.
    """
    keys = [[(row["sample_id"], row["user_id"], row["target_id"]) for row in run.predictions] for run in runs]
    if len({len(samples) for samples in keys}) > 1:
        raise UserError(
            "the seeds of a study have test splits of different sizes",
            "give all cells the same data.limit_test or data.planted.num_test",
        )
    return all(samples == keys[0] for samples in keys)


def labels_of(study: Mapping[str, Any]) -> list[str]:
    """The labels whose values get metrics of their own. Earlier studies saved one name or null."""
    label = study.get("label")
    if isinstance(label, str):
        return [label]
    return list(label or [])


def statistics_of(run: Run, labels: Sequence[str], num_bootstrap: int) -> dict[str, Resampled]:
    """Metrics of a run over its users, and those of each slice of a label: `ndcg@10 kind=history`.

    Args:
        labels: names of sample labels.
        num_bootstrap: draws of users.
    """
    if isinstance(run.inputs, RowInputs):
        shown = rows_of_text.statistics_of_rows(run.inputs, labels)
        return resample(shown, run.inputs.user_of_sample, num_bootstrap)
    found, _, _ = table.statistics(run.inputs, (5, 10))
    shown = {name: found[name] for name in METRICS if name in found}
    samples = resample(shown, run.inputs.user_of_sample, num_bootstrap)
    for label in labels:
        labelled = [row for row in run.predictions if label in (row.get("labels") or {})]
        for value in sorted({str(row["labels"][label]) for row in labelled}):
            part = with_predictions(run, [row for row in labelled if str(row["labels"][label]) == value])
            found, _, _ = table.statistics(part.inputs, (10,))
            shown = {f"{name} {label}={value}": found[name] for name in IN_SLICES if name in found}
            samples |= resample(shown, part.inputs.user_of_sample, num_bootstrap)
    return samples


def with_groups_and_labels_of(run: Run, other: Run) -> Run:
    """The run with the relevance groups and labels of another: a part must be the same targets in every row.

    Rows of prompt and completion stay as they are: their worst value of the study's label is shown instead.
    """
    if run.is_about_rows:
        return run
    return with_parts_of(other, run, ("relevance_group", "labels"))


def higher_is_better(metric: str) -> bool | None:
    """Which way is better for a metric, or for a metric of a slice such as `ndcg@10 kind=history`."""
    name = metric.split(" ")[0]
    row = table.row_of(name)
    if row is None:
        return rows_of_text.higher_is_better(name)
    return row.higher_is_better


def _comparisons(
    statistics: Statistics, base: str, controls: Sequence[str], unlike: Collection[str]
) -> dict[str, dict[str, dict[str, Comparison]]]:
    """Every row against the baseline, and every treatment against each control."""
    found: dict[str, dict[str, dict[str, Comparison]]] = {}
    for reference in [base, *(control for control in controls if control in statistics)]:
        found[reference] = {}
        for row in statistics:
            is_treatment = row != base and row not in controls
            if row == reference or not (reference == base or is_treatment):
                continue
            shared = shared_seeds(statistics, row, reference)
            if shared:
                found[reference][row] = _compare(statistics, reference, row, shared, unlike)
    return found


def _compare(
    statistics: Statistics, reference: str, row: str, seeds: list[int], unlike: Collection[str]
) -> dict[str, Comparison]:
    before = combine_all([statistics[reference][seed] for seed in seeds])
    after = combine_all([statistics[row][seed] for seed in seeds])
    # A metric of a slice, `nll kind=history`, means as much as that of all samples.
    names = [name for name in before if name in after and name.split(" ")[0] not in unlike]
    family = [name for name in names if _is_main(name)]
    return compare_family(
        {name: before[name] for name in names},
        {name: after[name] for name in names},
        family,
        {name: higher_is_better(name) for name in names},
    )


def _is_main(metric: str) -> bool:
    """Whether a metric is one of those that are compared under Holm's correction."""
    return metric in FAMILY or metric.startswith("ndcg@10 ") or " worst " in metric


def _audits(runs: Runs) -> dict[str, dict[str, dict[int, float]]]:
    """The audits that every run of the setting has."""
    found = {}
    for title, (audit, measure, as_log2) in AUDITED.items():
        values = {
            row: {seed: audit_value(run.results, audit, measure, as_log2) for seed, run in own.items()}
            for row, own in runs.items()
        }
        if all(value is not None for own in values.values() for value in own.values()):
            found[title] = values
    return found


def audit_value(results: Mapping[str, Any], audit: str, measure: str, as_log2: bool) -> float | None:
    """One measure of one audit from results.json; None where the audit or the measure is absent."""
    found = (results.get("audits") or {}).get(audit) or {}
    value = ((found.get("measures") or {}).get(measure) or {}).get("value")
    if value is None:
        return None
    return math.log2(value) if as_log2 else value


def _floors(runs: Runs) -> dict[str, dict[str, float | None]]:
    """The floors that any run has, each the mean over its seeds; `targets`, the test targets, is no floor.

    A floor hangs on the test users alone, so one run of a seed speaks for the seed: the first that has it,
    because a slow floor may be absent. A metric that one of the seeds lacks has no mean.
    """
    found = {}
    for name, by_seed in _floors_by_seed(runs).items():
        found[name] = {
            metric: _mean([(metrics.get(metric) or {}).get("value") for metrics in by_seed.values()])
            for metric in (*METRICS, *rows_of_text.METRICS)
        }
    return found


def _floors_by_seed(runs: Runs) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Floor -> seed -> its metrics in results.json."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for own in runs.values():
        for seed, run in own.items():
            for name, metrics in run.results.get("floors", {}).items():
                if name != "targets":
                    found.setdefault(name, {}).setdefault(seed, metrics)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; equal values are kept to the bit."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return known[0] if len(set(known)) == 1 else math.fsum(known) / len(known)


def _floor_notes(setting: str, runs: Runs) -> list[str]:
    """Says which floors are the mean of some seeds only, beside rows whose seeds have other test users."""
    seeds = sorted({seed for own in runs.values() for seed in own})
    notes = []
    for name, by_seed in _floors_by_seed(runs).items():
        if len(by_seed) < len(seeds):
            own = ", ".join(map(str, sorted(by_seed)))
            notes.append(f"{setting}: the floor {name} is over the test users of seed {own} alone")
    return notes
