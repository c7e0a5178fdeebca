"""Audit `debiasing`: does reweighting the data do what the objective does?

Runs (sft, reweight, gdrt, ...) are compared over all biases. Rows are the bias metrics of results.json and
the effects of the audits that every folder has. Each value becomes a badness (smaller is better): by the
metric's direction, or its distance to the value of the test targets themselves where neither direction is
better, or an effect's distance to its null.

    z = (badness of the run - badness of the baseline) / joint standard error of the two intervals

A row is better or worse where |z| > 1.96. The effect of a run is the mean z over rows, with a bootstrap
over rows. Control: signs of z flipped. Rows are measured on the same users and are correlated: this is a
summary and no test; paired tests per metric are eval.compare's.

    python -m eval.audit debiasing SFT_DIR REWEIGHT_DIR GDRT_DIR ...

The baseline is the run trained with sft, else the first folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.audit.base import audit_over_runs, result
from eval.audit.bias_measures import METRICS, audit_measure
from eval.audit.estimates import bootstrap
from eval.audit.options import DEFAULT_OPTIONS, AuditOptions
from eval.folders import Evaluation, load_evaluations, unlike
from gdrt_ds.errors import UserError

AT_LEAST = 2
FLIPS = 200
CLEAR = 1.96  # |z| beyond which a row counts as better or worse
LARGEST = 10  # z beyond this would drown all other rows
BASELINE_OBJECTIVE = "sft"


@dataclass(frozen=True)
class Badness:
    """One measure of one run: its value, how bad that is, and the standard error behind its interval."""

    value: float
    badness: float
    error: float


def badness(run: Evaluation) -> dict[str, Badness]:
    """Measure -> badness, of everything that has an interval and a direction."""
    found: dict[str, Badness] = {}
    targets = (run.results.get("floors") or {}).get("targets") or {}
    for name in METRICS:
        figure = run.results.get("metrics", {}).get(name)
        if not _has_interval(figure):
            continue
        value = figure["value"]
        of_targets = (targets.get(name) or {}).get("value")
        if figure["higher_is_better"] is not None:
            bad = -value if figure["higher_is_better"] else value
        elif of_targets is not None:
            bad = abs(value - of_targets)
        else:
            continue
        found[name] = Badness(value, bad, _standard_error(figure))
    for name, audit in (run.results.get("audits") or {}).items():
        effect = audit.get("effect")
        if not _has_interval(effect) or effect.get("better") is None:
            continue
        value = effect["value"]
        distance = abs(value - (effect["null"] or 0.0))
        bad = {"null": distance, "higher": -value, "lower": value}[effect["better"]]
        found[audit_measure(name)] = Badness(value, bad, _standard_error(effect))
    return found


def _has_interval(figure: Mapping | None) -> bool:
    """Whether there is a spread to judge by: earlier evaluations gave coverage intervals without width."""
    if not figure:
        return False
    if None in (figure.get("value"), figure.get("ci_low"), figure.get("ci_high")):
        return False
    return figure["ci_high"] > figure["ci_low"]


def _standard_error(figure: Mapping) -> float:
    """Of the 95 % interval of a normal estimate, which is 2 x 1.96 standard errors wide."""
    return (figure["ci_high"] - figure["ci_low"]) / 3.92


def z_scores(run: dict[str, Badness], baseline: dict[str, Badness]) -> dict[str, float]:
    """Of every shared measure. Positive = worse than the baseline, in joint standard errors."""
    found = {}
    for name, base in baseline.items():
        if name in run:
            error = max(np.hypot(run[name].error, base.error), 1e-12)
            found[name] = (run[name].badness - base.badness) / error
    return found


def baseline_first(runs: list[Evaluation]) -> list[Evaluation]:
    """The runs with the baseline at the front."""
    for place, run in enumerate(runs):
        if run.objective == BASELINE_OBJECTIVE:
            return [run, *runs[:place], *runs[place + 1 :]]
    return runs


def comparable(paths: Sequence[str]) -> tuple[list[Evaluation], list[dict[str, Badness]], list[str]]:
    """The runs with the baseline first, their measures, and the names of those that all runs have.

    Raises:
        UserError: too few folders, different splits, or too few measures that all of them have.
    """
    runs = baseline_first(load_evaluations(paths, AT_LEAST))
    values = [badness(run) for run in runs]
    names = [name for name in values[0] if all(name in found for found in values)]
    if len(names) < 2:
        raise UserError(
            "the folders share fewer than two measures with a direction",
            "evaluate all of them with the same metrics and audits",
        )
    return runs, values, names


def compare_runs(paths: Sequence[str], options: AuditOptions = DEFAULT_OPTIONS) -> dict:
    """The audit over evaluation (or run) folders.

    Raises:
        UserError: as `comparable`.
    """
    runs, values, names = comparable(paths)
    rng = np.random.default_rng(options.seed)
    z = {}  # label -> [measures], of every run but the baseline
    effects, sentences, limits = {}, [], []
    for run, found in zip(runs[1:], values[1:]):
        scores = z_scores(found, values[0])
        z[run.label] = np.array([scores[name] for name in names])
        own = np.clip(z[run.label], -LARGEST, LARGEST)
        effect = bootstrap(own, num=options.num_bootstrap, seed=options.seed)
        effects[run.label] = effect
        flipped = [abs((own * rng.choice([-1, 1], size=len(own))).mean()) for _ in range(FLIPS)]
        limits.append(f"{np.quantile(flipped, 0.95):.2g}")
        better = int((own < -CLEAR).sum())
        worse = int((own > CLEAR).sum())
        sentences.append(
            f"{run.label} ({run.objective}): mean z {effect.text()}, "
            f"{better} of {len(names)} measures better, {worse} worse"
        )
    last = runs[-1].label
    notes = unlike(runs)
    return result(
        finding=" ".join([f"Against {runs[0].label}: {'; '.join(sentences)}.", *notes]),
        effect=effects[last],
        effect_name=f"mean z of {last}",
        speaks=not effects[last].spans_null,
        better="lower",
        measures={f"mean z: {label}": effect for label, effect in effects.items()},
        figures=[figure(names, z)],
        control=f"signs of z flipped: mean z within {', '.join(limits)} in 95 % of the draws",
        table=table(runs, values, names, z),
        notes=notes,
    )


def table(
    runs: list[Evaluation], values: list[dict[str, Badness]], names: list[str], z: dict[str, np.ndarray]
) -> dict:
    """One row per measure: its value in every run, and z of every run but the baseline."""
    columns = ["measure", f"{runs[0].label} (baseline)"]
    for run in runs[1:]:
        columns += [run.label, f"z of {run.label}"]
    rows = []
    for place, name in enumerate(names):
        row: list = [name, values[0][name].value]
        for run, found in zip(runs[1:], values[1:]):
            row += [found[name].value, z[run.label][place]]
        rows.append(row)
    return {"columns": columns, "rows": rows}


def figure(names: list[str], z: dict[str, np.ndarray]) -> dict:
    return {
        "kind": "bar",
        "title": "Change against the baseline, in standard errors",
        "horizontal": True,
        "y_label": "z (left of zero: less bias)",
        "categories": names,
        "caption": "Bars to the left are biases that went down; bars within two of zero may be noise.",
        "series": [
            {"name": label, "values": np.clip(scores, -LARGEST, LARGEST).tolist()}
            for label, scores in z.items()
        ],
    }


AUDIT = audit_over_runs(
    title="Debiasing the data against debiasing the objective",
    question="Which biases does reweighting the data remove, and which the objective?",
    compare=compare_runs,
    check=comparable,
    at_least=AT_LEAST,
    order=61,
)
