"""Audit `cross_tuning`: over runs of several backbones, data sets, objectives and seeds: which of them do biases go with?

Every evaluated run is a vector of bias metrics (standardised over runs). Per label (backbone, data, objective, seed):
    silhouette   mean over runs of (b - a) / max(a, b), a = mean distance to runs of the same label, b = to the nearest other label's;
                 p from permuting the label over runs (the control)
    variance     share of each metric's variance that goes with the label: R^2 increments averaged over all orders of the labels
                 (Lindeman, Merenda & Gold 1980); what backbone, data and objective leave is seed and rest
If biases cluster by backbone and not by data, they came with pretraining (the design of Itzhak et al. 2025).
    python -m eval.audit cross_tuning DIR DIR ...       reads evaluation folders; no model is loaded
"""

from __future__ import annotations

from itertools import permutations

import numpy as np

from eval.audit.context import Audit, AuditOptions, Cost, result
from eval.audit.folders import Evaluation, load_evaluations, needs_runs
from eval.audit.inference import Estimate, permutation_p
from eval.intervals import holm

TITLE = "Cross-tuning: pretraining against fine-tuning"
QUESTION = "Do biases go with the backbone, the data, the objective, or the seed?"
AT_LEAST, PERMUTATIONS = 4, 500
LABELS = {"backbone": "model.path", "data": "data.path", "objective": "objective", "seed": "train.seed"}
FACTORS = ("backbone", "data", "objective")
METRICS = (
    "mgu@5",
    "dgu@5",
    "mgu_pop5@5",
    "mgu_genres@5",
    "gini@10",
    "coverage@10",
    "entropy@10",
    "aplt@10",
    "popularity_lift@10",
    "logpopdiff@10",
    "rsp@10",
    "reo@10",
    "provider_l1_interactions@10",
    "provider_gini@10",
    "nll_gap_relevance_group",
)


def bias_vectors(runs: list[Evaluation]) -> tuple[list[str], np.ndarray]:
    """Names and values [R, F] of the bias metrics and audit effects that every run has and that are not constant."""
    columns = {}
    for name in METRICS:
        columns[name] = [(run.results.get("metrics", {}).get(name) or {}).get("value") for run in runs]
    for audit in {name for run in runs for name in run.results.get("audits") or {}}:
        columns[f"audit: {audit}"] = [
            ((run.results.get("audits") or {}).get(audit, {}).get("effect") or {}).get("value")
            for run in runs
        ]
    kept = {
        n: np.array(v, dtype=float)
        for n, v in sorted(columns.items())
        if all(x is not None for x in v) and np.ptp(np.array(v, dtype=float)) > 1e-12
    }
    return list(kept), np.stack(list(kept.values()), axis=1) if kept else np.zeros((len(runs), 0))


def standardised(vectors: np.ndarray) -> np.ndarray:
    return (vectors - vectors.mean(axis=0)) / vectors.std(axis=0)


def silhouette(vectors: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette (Rousseeuw 1987), Euclidean; runs alone in their label count 0."""
    distance = np.sqrt(((vectors[:, None] - vectors[None]) ** 2).sum(axis=2))
    values = []
    for i, own in enumerate(labels):
        same = (labels == own) & (np.arange(len(labels)) != i)
        if not same.any():
            values.append(0.0)
            continue
        a, b = (
            distance[i, same].mean(),
            min(distance[i, labels == other].mean() for other in set(labels.tolist()) - {own}),
        )
        values.append((b - a) / max(a, b, 1e-12))
    return float(np.mean(values))


def jackknife(vectors: np.ndarray, labels: np.ndarray) -> Estimate:
    """Silhouette with an interval from leaving one run out."""
    value, n = silhouette(vectors, labels), len(labels)
    left = [
        silhouette(np.delete(vectors, i, 0), np.delete(labels, i))
        for i in range(n)
        if len(set(np.delete(labels, i).tolist())) > 1
    ]
    error = (
        1.96 * float(np.sqrt((len(left) - 1) / len(left) * ((np.array(left) - np.mean(left)) ** 2).sum()))
        if len(left) > 1
        else float("nan")
    )
    return Estimate(value, value - error, value + error, n, 0.0)


def variance_shares(vectors: np.ndarray, factors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Factor -> share of each column's variance [F], and `seed and rest`; they sum to one."""
    centred, total = vectors - vectors.mean(axis=0), ((vectors - vectors.mean(axis=0)) ** 2).sum(axis=0)
    dummies = {
        name: (np.unique(labels)[None] == labels[:, None]).astype(float) for name, labels in factors.items()
    }

    def explained(names: tuple[str, ...]) -> np.ndarray:
        if not names:
            return np.zeros(vectors.shape[1])
        design = np.hstack([np.ones((len(vectors), 1)), *(dummies[n] for n in names)])
        rest = centred - design @ np.linalg.lstsq(design, centred, rcond=None)[0]
        return 1 - (rest**2).sum(axis=0) / total

    orders = list(permutations(factors))
    shares = {
        name: np.mean(
            [explained(o[: o.index(name) + 1]) - explained(o[: o.index(name)]) for o in orders], axis=0
        )
        for name in factors
    }
    shares["seed and rest"] = 1 - sum(shares.values(), np.zeros(vectors.shape[1]))
    return shares


def measure(vectors: np.ndarray, labels: dict[str, np.ndarray], seed: int = 0) -> dict:
    """Standardised vectors [R, F], label -> values [R]: silhouettes with p (Holm over labels), variance shares and their mean by chance."""
    rng = np.random.default_rng(seed)
    usable = {n: v for n, v in labels.items() if 1 < len(set(v.tolist())) < len(v)}
    found, raw = {}, {}
    for name, values in usable.items():
        null = np.array([silhouette(vectors, rng.permutation(values)) for _ in range(PERMUTATIONS)])
        found[name] = {"silhouette": jackknife(vectors, values), "null": float(null.mean())}
        raw[name] = permutation_p(found[name]["silhouette"].value, null)
    for name, p in zip(raw, holm(list(raw.values()))[0] if raw else ()):
        found[name]["p"] = float(p)
    factors = {n: usable[n] for n in FACTORS if n in usable}
    shares = variance_shares(vectors, factors)
    chance = {n: 0.0 for n in factors}
    for _ in range(50):
        drawn = variance_shares(vectors, {n: rng.permutation(v) for n, v in factors.items()})
        chance = {n: chance[n] + float(drawn[n].mean()) / 50 for n in factors}
    return {"labels": found, "shares": shares, "chance": chance}


def compare_runs(paths, options: AuditOptions = AuditOptions()) -> dict:
    """The audit over evaluation (or run) folders."""
    from gdrt_ds.errors import UserError

    runs = load_evaluations(paths, AT_LEAST)
    names, values = bias_vectors(runs)
    if len(names) < 2:
        raise UserError(
            "the runs share fewer than two bias metrics that vary",
            "evaluate all of them with the same metrics and audits",
        )
    vectors = standardised(values)
    labels = {name: np.array([run.setting(key) for run in runs]) for name, key in LABELS.items()}
    found = measure(vectors, labels, options.seed)
    if not found["labels"]:
        raise UserError(
            "no label (backbone, data, objective, seed) has a value that two runs share and another that differs",
            "give runs of a grid, e.g. two objectives x two seeds",
        )
    best = max(found["labels"], key=lambda n: found["labels"][n]["silhouette"].value)
    top, shares = found["labels"][best], found["shares"]
    speaks = any(entry["p"] <= 0.05 for entry in found["labels"].values())
    finding = (
        f"Over {len(runs)} runs and {len(names)} bias measures, biases cluster most by {best}: silhouette {top['silhouette'].text()} "
        f"(permuted {top['null']:.2f}, p = {top['p']:.2g}{'' if top['p'] <= 0.05 else ': not shown'}); variance goes with "
        + ", ".join(f"{n} {s.mean():.0%}" for n, s in shares.items())
        + "."
    )
    u, sigma, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    places, part = u[:, :2] * sigma[:2], sigma**2 / (sigma**2).sum()
    figures = [
        {
            "kind": "scatter",
            "title": "Runs in the plane of their biases",
            "x_label": f"first component ({part[0]:.0%})",
            "y_label": f"second component ({part[1] if len(part) > 1 else 0:.0%})",
            "caption": f"Colours are the {best}: clusters mean that biases go with it.",
            "points": [
                {
                    "x": float(p[0]),
                    "y": float(p[1]) if len(p) > 1 else 0.0,
                    "label": run.label,
                    "series": str(label),
                }
                for p, run, label in zip(places, runs, labels[best])
            ],
        },
        {
            "kind": "bar",
            "title": "What the variance of each bias goes with",
            "stacked": True,
            "horizontal": True,
            "percent": True,
            "categories": names,
            "caption": "Shares of variance over runs; with few runs chance has a share too: "
            + ", ".join(f"{n} {c:.0%}" for n, c in found["chance"].items())
            + " under permuted labels.",
            "series": [{"name": n, "values": np.maximum(s, 0)} for n, s in shares.items()],
        },
    ]
    rows = [
        [
            n,
            e["silhouette"].value,
            e["silhouette"].low,
            e["silhouette"].high,
            e["null"],
            e["p"],
            float(shares[n].mean()) if n in shares else None,
            found["chance"].get(n),
        ]
        for n, e in found["labels"].items()
    ]
    return result(
        TITLE,
        QUESTION,
        finding=finding,
        effect=top["silhouette"],
        effect_name=f"silhouette by {best}",
        speaks=speaks,
        better=None,
        control="labels permuted over runs: "
        + ", ".join(f"{n} {e['null']:.2f}" for n, e in found["labels"].items()),
        measures={f"silhouette: {n}": e["silhouette"] for n, e in found["labels"].items()},
        figures=figures,
        table={
            "columns": [
                "label",
                "silhouette",
                "low",
                "high",
                "permuted",
                "p (Holm)",
                "share of variance",
                "share by chance",
            ],
            "rows": rows,
        },
    )


AUDIT = Audit(
    "cross_tuning",
    TITLE,
    QUESTION,
    lambda context: compare_runs(context.options.runs, context.options),
    lambda context: Cost(note=f"reads {len(context.options.runs)} evaluation folders"),
    lambda context: needs_runs(context, AT_LEAST),
)
