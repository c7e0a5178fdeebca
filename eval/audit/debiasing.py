"""Audit `debiasing`: does reweighting the data do what the objective does? Evaluated runs (sft, reweight, gdrt, ...) over all biases.

Rows are the bias metrics of results.json and the effects of the audits that every folder has. Each value becomes a badness (smaller is
better): by the metric's direction, or its distance to the value of the test targets themselves where neither direction is better, or
an effect's distance to its null. z = (badness of the run - badness of the baseline) / joint standard error of the two intervals; a row is
better or worse where |z| > 1.96. The effect of a run is the mean z over rows, with a bootstrap over rows. Control: signs of z flipped.
Rows are measured on the same users and are correlated: a summary, not a test; paired tests per metric are eval.compare's.
    python -m eval.audit debiasing SFT_DIR REWEIGHT_DIR GDRT_DIR ...       the first folder, or the one trained with sft, is the baseline
"""

from __future__ import annotations

import numpy as np

from eval.audit.context import Audit, AuditOptions, Cost, result
from eval.audit.cross_tuning import METRICS
from eval.audit.folders import Evaluation, load_evaluations, needs_runs
from eval.audit.inference import bootstrap

TITLE = "Debiasing the data against debiasing the objective"
QUESTION = "Which biases does reweighting the data remove, and which the objective?"
AT_LEAST, FLIPS = 2, 200


def badness(run: Evaluation) -> dict[str, tuple[float, float, float]]:
    """Measure -> (value, badness, standard error from the interval) of everything that has a direction."""
    found: dict[str, tuple[float, float, float]] = {}
    targets = (run.results.get("floors") or {}).get("targets") or {}
    for name in METRICS:
        figure = run.results.get("metrics", {}).get(name)
        if not figure or None in (figure["value"], figure["ci_low"], figure["ci_high"]):
            continue
        value, error = figure["value"], (figure["ci_high"] - figure["ci_low"]) / 3.92
        if figure["higher_is_better"] is not None:
            found[name] = (value, -value if figure["higher_is_better"] else value, error)
        elif (targets.get(name) or {}).get("value") is not None:
            found[name] = (value, abs(value - targets[name]["value"]), error)
    for name, audit in (run.results.get("audits") or {}).items():
        effect = audit.get("effect") or {}
        if effect.get("better") is None or None in (
            effect.get("value"),
            effect.get("ci_low"),
            effect.get("ci_high"),
        ):
            continue
        value, error, kind = effect["value"], (effect["ci_high"] - effect["ci_low"]) / 3.92, effect["better"]
        found[f"audit: {name}"] = (
            value,
            {"null": abs(value - (effect["null"] or 0.0)), "higher": -value, "lower": value}[kind],
            error,
        )
    return found


def z_scores(run: dict, baseline: dict) -> dict[str, float]:
    """Positive = worse than the baseline, in joint standard errors."""
    shared = [n for n in baseline if n in run]
    return {n: (run[n][1] - baseline[n][1]) / max(np.hypot(run[n][2], baseline[n][2]), 1e-12) for n in shared}


def compare_runs(paths, options: AuditOptions = AuditOptions()) -> dict:
    from gdrt_ds.errors import UserError

    runs = load_evaluations(paths, AT_LEAST)
    base = next((i for i, run in enumerate(runs) if run.setting("objective") == "sft"), 0)
    runs = [runs[base], *runs[:base], *runs[base + 1 :]]
    values = [badness(run) for run in runs]
    names = [n for n in values[0] if all(n in v for v in values)]
    if len(names) < 2:
        raise UserError(
            "the folders share fewer than two measures with a direction",
            "evaluate all of them with the same metrics and audits",
        )
    rng, effects, sentences = np.random.default_rng(options.seed), {}, []
    z = {run.label: z_scores(value, values[0]) for run, value in zip(runs[1:], values[1:])}
    nulls = []
    for run in runs[1:]:
        own = np.clip(np.array([z[run.label][n] for n in names]), -10, 10)
        effects[run.label] = bootstrap(own, num=options.num_bootstrap, seed=options.seed)
        nulls.append(np.array([(own * rng.choice([-1, 1], size=len(own))).mean() for _ in range(FLIPS)]))
        sentences.append(
            f"{run.label} ({run.setting('objective')}): mean z {effects[run.label].text()}, {int((own < -1.96).sum())} of "
            f"{len(names)} measures better, "
            f"{int((own > 1.96).sum())} worse"
        )
    last = runs[-1].label
    rows = [
        [
            n,
            values[0][n][0],
            *(cell for run, v in zip(runs[1:], values[1:]) for cell in (v[n][0], z[run.label][n])),
        ]
        for n in names
    ]
    columns = [
        "measure",
        f"{runs[0].label} (baseline)",
        *(c for run in runs[1:] for c in (run.label, f"z of {run.label}")),
    ]
    figure = {
        "kind": "bar",
        "title": "Change against the baseline, in standard errors",
        "horizontal": True,
        "y_label": "z (left of zero: less bias)",
        "categories": names,
        "caption": "Bars to the left are biases that went down; bars within two of zero may be noise.",
        "series": [
            {"name": run.label, "values": [float(np.clip(z[run.label][n], -10, 10)) for n in names]}
            for run in runs[1:]
        ],
    }
    return result(
        TITLE,
        QUESTION,
        finding=f"Against {runs[0].label}: " + "; ".join(sentences) + ".",
        effect=effects[last],
        effect_name=f"mean z of {last}",
        speaks=not effects[last].spans_null,
        better="lower",
        measures={f"mean z: {n}": e for n, e in effects.items()},
        figures=[figure],
        control="signs of z flipped: mean z within "
        + ", ".join(f"{np.quantile(np.abs(n), 0.95):.2g}" for n in nulls)
        + " in 95 % of the draws",
        table={"columns": columns, "rows": rows},
    )


AUDIT = Audit(
    "debiasing",
    TITLE,
    QUESTION,
    lambda context: compare_runs(context.options.runs, context.options),
    lambda context: Cost(note=f"reads {len(context.options.runs)} evaluation folders"),
    lambda context: needs_runs(context, AT_LEAST),
)
