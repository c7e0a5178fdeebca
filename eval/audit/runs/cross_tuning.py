"""Audit `cross_tuning`: what do biases go with, the backbone, the data, the objective or the seed?

Every evaluated run is a vector of bias metrics, standardised over runs. Per factor (backbone, data,
objective, seed):

    silhouette   mean over runs of (b - a) / max(a, b), a = mean distance to runs of the same level,
                 b = to the nearest other level's; p from permuting the levels over runs (the control)
    variance     share of each metric's variance that goes with the factor: R^2 increments averaged over
                 all orders of the factors (Lindeman, Merenda & Gold 1980); what backbone, data and
                 objective leave is seed and rest

A base model, which nothing tuned, is a level `base` of objective and of seed. It counts once, although each
of its runs may have evaluated it.

If biases cluster by backbone and not by data, they came with pretraining (the design of Itzhak et al. 2025).

    python -m eval.audit cross_tuning DIR DIR ...       reads evaluation folders; no model is loaded

Shapes: R runs, F measures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from eval.audit.base import audit_over_runs, result
from eval.audit.bias_measures import METRICS, audit_measure
from eval.audit.estimates import Estimate, permutation_p
from eval.audit.options import DEFAULT_OPTIONS, AuditOptions
from eval.folders import BASE, Evaluation, load_evaluations, unlike
from eval.intervals import holm
from gdrt_ds.errors import UserError

AT_LEAST = 4
PERMUTATIONS = 500
CHANCE_DRAWS = 50
SETTINGS = {"backbone": "model.path", "data": "data.path", "objective": "objective", "seed": "train.seed"}
EXPLAINING = ("backbone", "data", "objective")  # the factors whose share of variance is computed
REST = "seed and rest"
ALPHA = 0.05
TINY = 1e-12


@dataclass(frozen=True)
class Clustering:
    """How runs cluster by one factor: silhouette, its mean under permuted levels, and Holm's p."""

    silhouette: Estimate
    null: float
    p: float


@dataclass(frozen=True)
class Measured:
    """What runs share.

    Attributes:
        clusterings: factor -> how runs cluster by it.
        shares: factor -> share of each measure's variance [F], `seed and rest` last; they sum to one.
        chance: factor -> mean share under permuted levels.
    """

    clusterings: dict[str, Clustering]
    shares: dict[str, np.ndarray]
    chance: dict[str, float]


@dataclass(frozen=True)
class Comparable:
    """What of some folders is compared.

    Attributes:
        runs: their evaluations, each base model once.
        left_out: repeated evaluations of a base model.
        names, values: of the measures, [R, F].
        factors: factor -> levels [R].
    """

    runs: list[Evaluation]
    left_out: int
    names: list[str]
    values: np.ndarray
    factors: dict[str, np.ndarray]


def level(run: Evaluation, factor: str) -> str:
    """The value that a factor has in a run.

    A model that no run trained has no seed of a training, whatever its config says.
    """
    untrained = run.results.get("objective") is None
    if factor == "objective" or (factor == "seed" and untrained):
        return run.objective
    return run.setting(SETTINGS[factor])


def without_repeated_bases(runs: list[Evaluation]) -> list[Evaluation]:
    """The runs, each base model once: a second evaluation of it has the same biases and is no second run."""
    kept: list[Evaluation] = []
    seen = set()
    for run in runs:
        key = run.results.get("scoring_key")
        if run.objective == BASE and key:
            text = json.dumps(key, sort_keys=True)
            if text in seen:
                continue
            seen.add(text)
        kept.append(run)
    return kept


def bias_vectors(runs: list[Evaluation]) -> tuple[list[str], np.ndarray]:
    """Names and values [R, F] of the measures that every run has and that are not constant."""
    columns: dict[str, list] = {}
    for name in METRICS:
        columns[name] = [(run.results.get("metrics", {}).get(name) or {}).get("value") for run in runs]
    audits = [run.results.get("audits") or {} for run in runs]
    for name in {name for found in audits for name in found}:
        columns[audit_measure(name)] = [
            (found.get(name, {}).get("effect") or {}).get("value") for found in audits
        ]
    kept = {}
    for name, column in sorted(columns.items()):
        if any(value is None for value in column):
            continue
        values = np.array(column, dtype=float)
        if np.ptp(values) > TINY:
            kept[name] = values
    if not kept:
        return [], np.zeros((len(runs), 0))
    return list(kept), np.stack(list(kept.values()), axis=1)


def standardised(vectors: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and standard deviation 1."""
    return (vectors - vectors.mean(axis=0)) / vectors.std(axis=0)


def silhouette(vectors: np.ndarray, levels: np.ndarray) -> float:
    """Mean silhouette (Rousseeuw 1987), Euclidean; runs alone in their level count 0."""
    distance = np.sqrt(((vectors[:, None] - vectors[None]) ** 2).sum(axis=2))
    values = []
    for i, own in enumerate(levels):
        same = (levels == own) & (np.arange(len(levels)) != i)
        if not same.any():
            values.append(0.0)
            continue
        a = distance[i, same].mean()
        b = min(distance[i, levels == other].mean() for other in set(levels.tolist()) - {own})
        values.append((b - a) / max(a, b, TINY))
    return float(np.mean(values))


def jackknife(vectors: np.ndarray, levels: np.ndarray) -> Estimate:
    """Silhouette with an interval from leaving one run out."""
    value = silhouette(vectors, levels)
    n = len(levels)
    left = []
    for i in range(n):
        others = np.delete(levels, i)
        if len(set(others.tolist())) > 1:
            left.append(silhouette(np.delete(vectors, i, 0), others))
    error = float("nan")
    if len(left) > 1:
        squares = ((np.array(left) - np.mean(left)) ** 2).sum()
        error = 1.96 * float(np.sqrt((len(left) - 1) / len(left) * squares))
    return Estimate(value, value - error, value + error, n, 0.0)


def variance_shares(vectors: np.ndarray, factors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Factor -> share of each column's variance [F], and `seed and rest`; they sum to one."""
    centred = vectors - vectors.mean(axis=0)
    total = (centred**2).sum(axis=0)
    dummies = {
        name: (np.unique(levels)[None] == levels[:, None]).astype(float) for name, levels in factors.items()
    }

    def explained(names: tuple[str, ...]) -> np.ndarray:
        """R^2 [F] of a regression on these factors."""
        if not names:
            return np.zeros(vectors.shape[1])
        design = np.hstack([np.ones((len(vectors), 1)), *(dummies[name] for name in names)])
        rest = centred - design @ np.linalg.lstsq(design, centred, rcond=None)[0]
        return 1 - (rest**2).sum(axis=0) / total

    orders = list(permutations(factors))
    shares = {}
    for name in factors:
        increments = []
        for order in orders:
            place = order.index(name)
            increments.append(explained(order[: place + 1]) - explained(order[:place]))
        shares[name] = np.mean(increments, axis=0)
    shares[REST] = 1 - sum(shares.values(), np.zeros(vectors.shape[1]))
    return shares


def usable(factors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The factors of which two runs share a level and another run has a different one."""
    return {name: levels for name, levels in factors.items() if 1 < len(set(levels.tolist())) < len(levels)}


def measure(vectors: np.ndarray, factors: dict[str, np.ndarray], seed: int = 0) -> Measured:
    """Standardised vectors [R, F], factor -> levels [R] -> clusterings and shares of variance."""
    rng = np.random.default_rng(seed)
    varying = usable(factors)
    observed, nulls = {}, {}
    for name, levels in varying.items():
        nulls[name] = np.array([silhouette(vectors, rng.permutation(levels)) for _ in range(PERMUTATIONS)])
        observed[name] = jackknife(vectors, levels)
    corrected = []
    if varying:
        corrected, _ = holm([permutation_p(observed[name].value, nulls[name]) for name in varying])
    clusterings = {
        name: Clustering(observed[name], float(nulls[name].mean()), float(p))
        for name, p in zip(varying, corrected)
    }
    explaining = {name: varying[name] for name in EXPLAINING if name in varying}
    chance = {name: 0.0 for name in explaining}
    for _ in range(CHANCE_DRAWS):
        drawn = variance_shares(vectors, {name: rng.permutation(v) for name, v in explaining.items()})
        for name in explaining:
            chance[name] += float(drawn[name].mean()) / CHANCE_DRAWS
    return Measured(clusterings, variance_shares(vectors, explaining), chance)


def comparable(paths: Sequence[str]) -> Comparable:
    """What is compared of evaluation (or run) folders.

    Raises:
        UserError: too few folders, measures or repeated settings to compare, or different splits.
    """
    given = load_evaluations(paths, AT_LEAST)
    runs = without_repeated_bases(given)
    if len(runs) < AT_LEAST:
        raise UserError(
            f"{len(runs)} runs are left of {len(given)} folders, because a base model counts once; at least "
            f"{AT_LEAST} are compared",
            "give more trained runs",
        )
    names, values = bias_vectors(runs)
    if len(names) < 2:
        raise UserError(
            "the runs share fewer than two bias metrics that vary",
            "evaluate all of them with the same metrics and audits",
        )
    factors = {factor: np.array([level(run, factor) for run in runs]) for factor in SETTINGS}
    if not usable(factors):
        raise UserError(
            "no setting (backbone, data, objective, seed) has a value that two runs share "
            "and another that differs",
            "give runs of a grid, e.g. two objectives x two seeds",
        )
    return Comparable(runs, len(given) - len(runs), names, values, factors)


def compare_runs(paths: Sequence[str], options: AuditOptions = DEFAULT_OPTIONS) -> dict:
    """The audit over evaluation (or run) folders.

    Raises:
        UserError: as `comparable`.
    """
    compared = comparable(paths)
    runs, names, factors = compared.runs, compared.names, compared.factors
    vectors = standardised(compared.values)
    found = measure(vectors, factors, options.seed)
    clusterings = found.clusterings
    best = foremost(clusterings)
    top = clusterings[best]
    shown = "" if top.p <= ALPHA else ": not shown"
    parts = ", ".join(f"{name} {share.mean():.0%}" for name, share in found.shares.items())
    finding = (
        f"Over {len(runs)} runs and {len(names)} bias measures, biases cluster most by {best}: "
        f"silhouette {top.silhouette.text()} (permuted {top.null:.2f}, p = {top.p:.2g}{shown}); "
        f"variance goes with {parts}."
    )
    larger = [name for name, c in clusterings.items() if c.silhouette.value > top.silhouette.value]
    if larger:
        finding += f" Larger silhouettes are not shown: {', '.join(larger)}."
    if compared.left_out:
        finding += f" Repeated evaluations of a base model are left out: {compared.left_out}."
    notes = unlike(runs)
    nulls = ", ".join(f"{name} {clustering.null:.2f}" for name, clustering in clusterings.items())
    return result(
        finding=" ".join([finding, *notes]),
        effect=top.silhouette,
        effect_name=f"silhouette by {best}",
        speaks=top.p <= ALPHA,
        better=None,
        control=f"labels permuted over runs: {nulls}",
        measures={f"silhouette: {name}": c.silhouette for name, c in clusterings.items()},
        figures=[plane(runs, vectors, best, factors[best]), variance_figure(names, found)],
        table=table(found),
        notes=notes,
    )


def foremost(clusterings: dict[str, Clustering]) -> str:
    """The factor that the finding is about: the largest silhouette of those that are shown, else of all."""

    def key(name: str) -> tuple[bool, float]:
        return clusterings[name].p <= ALPHA, clusterings[name].silhouette.value

    return max(clusterings, key=key)


def table(found: Measured) -> dict:
    """One row per factor."""
    rows = []
    for name, c in found.clusterings.items():
        share = float(found.shares[name].mean()) if name in found.shares else None
        estimate = c.silhouette
        chance = found.chance.get(name)
        rows.append([name, estimate.value, estimate.low, estimate.high, c.null, c.p, share, chance])
    columns = ["label", "silhouette", "low", "high", "permuted", "p (Holm)"]
    return {"columns": [*columns, "share of variance", "share by chance"], "rows": rows}


def plane(runs: list[Evaluation], vectors: np.ndarray, factor: str, levels: np.ndarray) -> dict:
    """Runs on the first two principal components of their biases."""
    u, sigma, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    places = u * sigma
    shares = sigma**2 / (sigma**2).sum()
    if len(sigma) < 2:
        places = np.hstack([places, np.zeros((len(runs), 1))])
        shares = np.append(shares, 0.0)
    return {
        "kind": "scatter",
        "title": "Runs in the plane of their biases",
        "x_label": f"first component ({shares[0]:.0%})",
        "y_label": f"second component ({shares[1]:.0%})",
        "caption": f"Colours are the {factor}: clusters mean that biases go with it.",
        "points": [
            {"x": float(place[0]), "y": float(place[1]), "label": run.label, "series": str(level)}
            for place, run, level in zip(places, runs, levels)
        ],
    }


def variance_figure(names: list[str], found: Measured) -> dict:
    chance = ", ".join(f"{name} {share:.0%}" for name, share in found.chance.items())
    return {
        "kind": "bar",
        "title": "What the variance of each bias goes with",
        "stacked": True,
        "horizontal": True,
        "percent": True,
        "categories": names,
        "caption": f"Shares of variance over runs; with few runs chance has a share too: {chance} "
        "under permuted labels.",
        "series": [{"name": name, "values": np.maximum(share, 0)} for name, share in found.shares.items()],
    }


AUDIT = audit_over_runs(
    title="Cross-tuning: pretraining against fine-tuning",
    question="Do biases go with the backbone, the data, the objective, or the seed?",
    compare=compare_runs,
    check=comparable,
    at_least=AT_LEAST,
    order=60,
)
