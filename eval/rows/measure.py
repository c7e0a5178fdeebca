"""results.json of an evaluation of rows: metrics with intervals, breakdowns, floors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.folders import FORMAT
from eval.intervals import Statistic, mean_statistic, resample
from eval.metrics import figure
from eval.rows import KIND
from eval.rows.inputs import RowInputs, build_row_inputs
from eval.rows.metrics import slices, statistics
from eval.rows.predict import dtype_of, judge, scoring_key
from eval.rows.subject import RowSubject
from gdrt_ds.training.run_folder import git_hash, versions

DIRECTION = {"nll": False, "accuracy": True}
BOUNDS = {"accuracy": (0.0, 1.0), "choice_nll": (0.0, np.inf)}  # as in eval.rows.metrics
PART_DIRECTION = {"gap": False, "ratio": True}


def measure(
    subject: RowSubject, predictions: list[dict[str, Any]], *, floors: bool = True, num_bootstrap: int = 1000
) -> dict[str, Any]:
    """The content of results.json, audits left out."""
    inputs = build_row_inputs(predictions, subject.group_names)
    found, rows = statistics(inputs)
    nested = slices(inputs)
    flat: dict[Any, Statistic] = {("metric", name): statistic for name, statistic in found.items()}
    flat |= {("slice", *path): statistic for path, statistic in _walk(nested)}
    samples = resample(flat, inputs.user_of_sample, num_bootstrap)
    notes = [*inputs.notes, *subject.notes]
    if subject.limit:
        notes.append(f"--limit {subject.limit}: not a result")
    unlisted = int(np.isnan(inputs.correct).sum())
    if 0 < unlisted < inputs.num_samples:
        notes.append(f"{unlisted} of {inputs.num_samples} rows list no choices; accuracy is over the others")
    unscored = int((np.isfinite(inputs.correct) & ~np.isfinite(inputs.choice_nll)).sum())
    if unscored:
        notes.append(
            f"{unscored} of {inputs.num_samples} rows have choices whose scores are not finite: they are "
            "wrong in accuracy, and choice_nll is over the others"
        )
    return {
        "metrics": {name: figure(samples["metric", name], rows[name].higher_is_better) for name in found},
        "breakdowns": _figures(nested, samples),
        "notes": notes,
        "format": FORMAT,
        "kind": KIND,
        "name": subject.name,
        "split": subject.split,
        "num_samples": len(predictions),
        "group_names": subject.group_names,
        "objective": subject.objective,
        "scoring": "full",
        "mode": "full",
        "limit": subject.limit,
        "dtype": dtype_of(subject),
        "floors": floors_of(subject, inputs, num_bootstrap) if floors else {},
        "config": subject.model.config.model_dump(mode="json"),
        "versions": versions(),
        "git_hash": git_hash(),
        "scoring_key": scoring_key(subject),
    }


def floors_of(subject: RowSubject, inputs: RowInputs, num_bootstrap: int) -> dict[str, Any]:
    """`majority`: the choice that is most often a completion in train; `chance`: every choice alike.

    Choices weigh n + 1, so that one that train never has is possible. Empty where no row lists choices.
    """
    counts = subject.train_completions()
    judged: dict[str, list[dict[str, Any]]] = {"majority": [], "chance": []}
    for row in subject.rows:
        if row.answer is None:
            judged["majority"].append({})
            judged["chance"].append({})
            continue
        weights = np.log([counts[choice] + 1 for choice in row.choices])
        judged["majority"].append(judge(row.choices, row.answer, weights))
        judged["chance"].append(judge(row.choices, row.answer, np.zeros(len(row.choices))))
    if not any(judged["chance"]):
        return {}
    found = {}
    for floor, rows in judged.items():
        values = {
            "accuracy": np.array([row.get("correct", np.nan) for row in rows]),
            "choice_nll": np.array([row.get("choice_nll", np.nan) for row in rows]),
        }
        pair = {name: mean_statistic(value, BOUNDS[name]) for name, value in values.items()}
        samples = resample(pair, inputs.user_of_sample, num_bootstrap)
        found[floor] = {name: figure(samples[name], DIRECTION.get(name, False)) for name in pair}
    return found


# -- a tree of statistics to a tree of figures ---------------------------------------------------------
Path = tuple[str, ...]


def _walk(nested: Mapping[str, Any], path: Path = ()) -> list[tuple[Path, Statistic]]:
    pairs = []
    for key, value in nested.items():
        here = (*path, key)
        pairs += [(here, value)] if isinstance(value, Statistic) else _walk(value, here)
    return pairs


def _figures(nested: Mapping[str, Any], samples: Mapping[Any, Any], path: Path = ()) -> dict[str, Any]:
    found = {}
    for key, value in nested.items():
        here = (*path, key)
        if not isinstance(value, Statistic):
            found[key] = _figures(value, samples, here)
            continue
        _, kind, third, last = here
        measure_name = last if kind == "groups" else third
        better = DIRECTION[measure_name]
        if kind == "summary":
            better = PART_DIRECTION.get(last, better)
        found[key] = figure(samples[("slice", *here)], better)
    return found
