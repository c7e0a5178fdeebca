"""Audit `shift`: where does the model lose when the world moves: later times, unpopular or cold items, short histories, noisy titles?

Environments are bins of the test users along each axis: time of the sample, popularity of the target (cold = not in train), length of
the history. Value: target NLL over the catalogue (and NDCG@10); relative drop of an environment = (its NLL - mean NLL) / mean NLL.
Noisy titles: one letter of every third word of the history's titles swapped with its neighbour; paired with the clean NLL.
Beside them the popularity shift itself: total variation between train popularity and the test targets, against the value that
targets drawn from train popularity have in a sample of this size. Control: environment labels permuted over users, per axis; the
spread (largest minus smallest mean NLL) must exceed theirs, p Holm-corrected over the axes.
"""

from __future__ import annotations

import numpy as np

from eval.audit.context import Audit, AuditContext, Cost, result
from eval.audit.inference import Estimate, bootstrap, ndcg, permutation_p, target_ranks
from eval.audit.target_loss import target_nll
from eval.intervals import holm
from eval.metrics.robustness import relative_drop, worst_environment

TITLE = "Distribution shift"
QUESTION = "In which environment does the model lose most?"
DEFAULT_USERS, PERMUTATIONS, TIME_BINS = 100, 200, 4


def quantile_labels(values: np.ndarray, num: int, names: list[str]) -> np.ndarray:
    """Bins of nearly equal size, fewer where values repeat."""
    edges = np.unique(np.quantile(values, np.arange(1, num) / num))
    bins = np.searchsorted(edges, values, side="right")
    used = sorted(set(bins.tolist()))
    if len(names) > len(used) > 1:  # keep the outer names: they say which end a bin is
        names = names[: len(used) - 1] + names[-1:]
    return np.array([names[used.index(b)] for b in bins])


def environments(samples, targets: np.ndarray, popularity: np.ndarray) -> dict[str, np.ndarray]:
    """Axis -> label of every user [U]; axes with a single label are left out."""
    axes: dict[str, np.ndarray] = {}
    if all(s.timestamp is not None for s in samples):
        names = (
            ["time 1 (first)"]
            + [f"time {i + 1}" for i in range(1, TIME_BINS - 1)]
            + [f"time {TIME_BINS} (last)"]
        )
        axes["time"] = quantile_labels(np.array([s.timestamp for s in samples], float), TIME_BINS, names)
    rank = np.argsort(np.argsort(-popularity, kind="stable"), kind="stable") / len(popularity)
    axes["target popularity"] = np.array(
        [
            "cold (not in train)"
            if popularity[t] == 0
            else "head fifth"
            if rank[t] < 0.2
            else "middle"
            if rank[t] < 0.5
            else "tail half"
            for t in targets
        ]
    )
    axes["history length"] = quantile_labels(
        np.array([len(s.history) for s in samples], float),
        3,
        ["short history", "medium history", "long history"],
    )
    return {name: labels for name, labels in axes.items() if len(set(labels.tolist())) > 1}


def spread(values: np.ndarray, labels: np.ndarray) -> float:
    """Largest minus smallest mean of labels with at least two users."""
    means = [values[labels == name].mean() for name in np.unique(labels) if (labels == name).sum() > 1]
    return float(max(means) - min(means)) if len(means) > 1 else 0.0


def measure(
    nll: np.ndarray, gain: np.ndarray, axes: dict[str, np.ndarray], num_bootstrap: int, seed: int
) -> tuple[list[dict], dict[str, tuple[float, float, float]]]:
    """NLL [U], NDCG [U] -> environments (axis, name, users, NLL, relative drop, NDCG) and per axis (spread, null mean, Holm's p)."""
    rng, settings, rows, tests = np.random.default_rng(seed), {"num": num_bootstrap, "seed": seed}, [], {}
    for axis, labels in axes.items():
        null = np.array([spread(nll, rng.permutation(labels)) for _ in range(PERMUTATIONS)])
        tests[axis] = (spread(nll, labels), float(null.mean()), permutation_p(spread(nll, labels), null))
        for name in sorted(set(labels.tolist())):
            inside = labels == name

            def drop(columns: np.ndarray) -> float:
                own = columns[columns[:, 1] == 1, 0]
                return -relative_drop(columns[:, 0].mean(), own.mean()) if len(own) else np.nan

            rows.append(
                {
                    "axis": axis,
                    "name": name,
                    "users": int(inside.sum()),
                    "nll": bootstrap(nll[inside], null=None, **settings),
                    "drop": bootstrap(np.stack([nll, inside.astype(float)], axis=1), drop, **settings),
                    "ndcg": bootstrap(gain[inside], null=None, **settings),
                }
            )
    corrected, _ = holm([p for *_, p in tests.values()])
    return rows, {
        axis: (value, null, float(p)) for (axis, (value, null, _)), p in zip(tests.items(), corrected)
    }


def noisy(title: str) -> str:
    """Two inner neighbouring letters of every third word change places; deterministic."""
    words = title.split(" ")
    for index in range(0, len(words), 3):
        word = words[index]
        if len(word) > 3 and word[1:3].isalpha():
            words[index] = word[0] + word[2] + word[1] + word[3:]
    return " ".join(words)


def popularity_shift(targets: np.ndarray, popularity: np.ndarray, seed: int) -> tuple[float, float, float]:
    """(total variation of test targets to train popularity, its mean for targets drawn from train popularity, p)."""
    share = popularity / popularity.sum()
    distance = lambda t: np.abs(np.bincount(t, minlength=len(share)) / len(t) - share).sum() / 2  # noqa: E731
    rng = np.random.default_rng(seed)
    null = np.array(
        [distance(rng.choice(len(share), size=len(targets), p=share)) for _ in range(PERMUTATIONS)]
    )
    return float(distance(targets)), float(null.mean()), permutation_p(distance(targets), null)


def noise_cost(context: AuditContext, samples, targets: np.ndarray) -> Estimate:
    """NLL with noisy titles minus clean, paired over users."""
    encoder, text = context.recommender.encoder, context.catalogue.text_of
    prompts = [
        encoder.encode([change(text(i)) for i in s.history]).input_ids.tolist()
        for change in (str, noisy)
        for s in samples
    ]
    both = target_nll(context, prompts, np.tile(targets, 2), "noisy titles").renormalised.reshape(
        2, len(samples)
    )
    return bootstrap(both[1] - both[0], num=context.options.num_bootstrap, seed=context.options.seed)


def run(context: AuditContext) -> dict:
    options = context.options
    samples, scores = context.matrix(DEFAULT_USERS)
    targets, popularity = context.targets(samples), context.popularity
    nll, gain = -scores[np.arange(len(samples)), targets], ndcg(target_ranks(scores, targets))
    rows, tests = measure(
        nll, gain, environments(samples, targets, popularity), options.num_bootstrap, options.seed
    )
    noise = noise_cost(context, samples, targets)
    moved, drawn, moved_p = popularity_shift(targets, popularity, options.seed)
    solid = {r["name"]: r["nll"].value for r in rows if r["users"] > 1}
    worst = worst_environment(solid, higher_is_better=False)[0] if solid else None
    effect = next((r["drop"] for r in rows if r["name"] == worst), Estimate(0.0, 0.0, 0.0, len(samples)))
    found_axes = [axis for axis, (_, _, p) in tests.items() if p <= 0.05]
    speaks = bool(found_axes)
    finding = (
        f"Worst environment: {worst}, whose NLL is {effect.text()} of the mean above it; environments differ along "
        f"{', '.join(found_axes) or 'no axis'} "
        f"(p <= .05 after Holm's correction, {len(samples)} users); noisy titles cost {noise.text()} nats; test targets are "
        f"{moved:.2f} from train popularity "
        f"(total variation; {drawn:.2f} by chance, p = {moved_p:.2g})."
    )
    figure = {
        "kind": "bar",
        "title": "Relative NLL by environment",
        "horizontal": True,
        "percent": True,
        "legend": False,
        "categories": [r["name"] for r in rows],
        "caption": "Bars to the right are environments where the target costs more than on average.",
        "series": [
            {
                "name": "NLL above the mean",
                "values": [r["drop"].value for r in rows],
                "low": [r["drop"].low for r in rows],
                "high": [r["drop"].high for r in rows],
            }
        ],
    }
    table = [
        [
            r["axis"],
            r["name"],
            r["users"],
            r["nll"].value,
            r["drop"].value,
            r["drop"].low,
            r["drop"].high,
            r["ndcg"].value,
        ]
        for r in rows
    ]
    table.append(
        [
            "titles",
            "noisy history titles",
            noise.n,
            float(nll.mean() + noise.value),
            *(x / nll.mean() for x in (noise.value, noise.low, noise.high)),
            None,
        ]
    )
    control = "labels permuted over users: " + "; ".join(
        f"{axis}: spread {value:.3g} against {null:.3g}, p = {p:.2g}"
        for axis, (value, null, p) in tests.items()
    )
    return result(
        TITLE,
        QUESTION,
        finding=finding,
        effect=effect,
        effect_name="relative NLL of the worst environment",
        speaks=speaks,
        control=control,
        measures={"worst environment": effect, "noisy titles, nats": noise},
        figures=[figure],
        table={
            "columns": ["axis", "environment", "users", "NLL", "relative drop", "low", "high", "NDCG@10"],
            "rows": table,
        },
        axes=found_axes,
    )


AUDIT = Audit(
    "shift",
    TITLE,
    QUESTION,
    run,
    lambda context: Cost(
        scorings=context.unscored(DEFAULT_USERS), losses=2 * context.num_users(DEFAULT_USERS)
    ),
)
