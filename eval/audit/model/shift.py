"""Audit `shift`: where does the model lose when the world moves?

Environments are bins of the test users along three axes: time of the sample, popularity of the target (cold
= not in train), length of the history. The value of an environment is its target NLL over the catalogue
(and NDCG@10); its relative drop is (its NLL - mean NLL) / mean NLL. Noisy titles are one more: two
neighbouring letters of every third word of the history's titles change places, paired with the clean NLL.

The worst environment is the one with the largest drop. It is chosen on the data that measure it, so every
resample chooses its own, and the interval is centred; the null value is the mean of the worst of permuted
labels. An environment of fewer than FEWEST users is shown and never called the worst.

Beside them stands the popularity shift itself: total variation between train popularity and the test
targets, against the value that targets drawn from train popularity have in a sample of this size. Control:
environment labels permuted over users, per axis. The spread (largest minus smallest mean NLL) must exceed
theirs, p Holm-corrected over the axes.

Shapes: U users, I catalogue entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eval.audit.base import Audit, Cost, estimate_series, result
from eval.audit.context import AuditContext
from eval.audit.estimates import Estimate, bootstrap, permutation_p
from eval.audit.score_rows import target_gains
from eval.audit.target_loss import target_nll
from eval.intervals import holm

DEFAULT_USERS = 100
PERMUTATIONS = 200
TIME_BINS = 4
LENGTHS = ["short history", "medium history", "long history"]
HEAD, MIDDLE = 0.2, 0.5  # ends of the most popular fifth and of the middle, by popularity rank
ALPHA = 0.05
FEWEST = 5  # users of an environment that can be the worst one: fewer are an extreme by chance


@dataclass(frozen=True)
class Environment:
    """One environment: its axis and name, its users, and their figures."""

    axis: str
    name: str
    users: int
    nll: Estimate
    drop: Estimate
    ndcg: Estimate


@dataclass(frozen=True)
class AxisTest:
    """Spread of the environments' mean NLL along one axis, its mean under permuted labels, and Holm's p."""

    spread: float
    null: float
    p: float


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
    if all(sample.timestamp is not None for sample in samples):
        names = [f"time {i + 1}" for i in range(TIME_BINS)]
        names[0] += " (first)"
        names[-1] += " (last)"
        times = np.array([sample.timestamp for sample in samples], float)
        axes["time"] = quantile_labels(times, TIME_BINS, names)
    axes["target popularity"] = popularity_labels(targets, popularity)
    lengths = np.array([len(sample.history) for sample in samples], float)
    axes["history length"] = quantile_labels(lengths, len(LENGTHS), LENGTHS)
    return {name: labels for name, labels in axes.items() if len(set(labels.tolist())) > 1}


def popularity_labels(targets: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """Label of every target [U] by the popularity of its item."""
    rank = np.argsort(np.argsort(-popularity, kind="stable"), kind="stable") / len(popularity)
    labels = []
    for target in targets:
        if popularity[target] == 0:
            labels.append("cold (not in train)")
        elif rank[target] < HEAD:
            labels.append("head fifth")
        elif rank[target] < MIDDLE:
            labels.append("middle")
        else:
            labels.append("tail half")
    return np.array(labels)


def spread(values: np.ndarray, labels: np.ndarray) -> float:
    """Largest minus smallest mean of labels with at least two users."""
    means = [values[labels == name].mean() for name in np.unique(labels) if (labels == name).sum() > 1]
    return float(max(means) - min(means)) if len(means) > 1 else 0.0


def relative_drop(before: float, after: float) -> float:
    """(before - after) / before: 0.1 is a tenth lost; NaN where nothing was there to lose."""
    return (before - after) / before if before else float("nan")


def members_of(axes: Mapping[str, np.ndarray], names: Sequence[tuple[str, str]]) -> np.ndarray:
    """Which users [U] each (axis, environment) holds: float64 [U, E]."""
    return np.stack([axes[axis] == name for axis, name in names], axis=1).astype(np.float64)


def worst_drop(nll: np.ndarray, members: np.ndarray) -> float:
    """Largest (NLL of an environment - mean NLL) / mean NLL over environments that have users.

    Args:
        nll: [U].
        members: [U, E].
    """
    sizes = members.sum(axis=0)
    own = (nll @ members)[sizes > 0] / sizes[sizes > 0]
    return max((-relative_drop(nll.mean(), mean) for mean in own), default=float("nan"))


def measure_worst(
    nll: np.ndarray, axes: Mapping[str, np.ndarray], num_bootstrap: int, seed: int
) -> tuple[str | None, Estimate]:
    """The environment that is served worst, and its relative NLL above the mean.

    Every resample of users has a worst environment of its own. The null value is the mean of the worst one
    under labels that are permuted over users, per axis: the largest of several is above zero by chance.

    Args:
        nll: [U].
        axes: label of every user [U] per axis.
    Returns:
        name, None if no environment has FEWEST users; the estimate is then undefined.
    """
    pairs = [(axis, str(name)) for axis, labels in axes.items() for name in sorted(set(labels.tolist()))]
    pairs = [(axis, name) for axis, name in pairs if (axes[axis] == name).sum() >= FEWEST]
    if not pairs:
        undefined = float("nan")
        return None, Estimate(undefined, undefined, undefined, len(nll))
    members = members_of(axes, pairs)
    drops = [worst_drop(nll, members[:, [place]]) for place in range(len(pairs))]
    rng = np.random.default_rng([seed, 13])
    null = []
    for _ in range(PERMUTATIONS):
        moved = {axis: rng.permutation(labels) for axis, labels in axes.items()}
        null.append(worst_drop(nll, members_of(moved, pairs)))

    def statistic(rows: np.ndarray) -> float:
        return worst_drop(rows[:, 0], rows[:, 1:])

    columns = np.column_stack([nll, members])
    anything = (-np.inf, np.inf)  # a curved statistic without an end
    found = bootstrap(
        columns, statistic, null=float(np.mean(null)), num=num_bootstrap, seed=seed, bounds=anything
    )
    return pairs[int(np.argmax(drops))][1], found


def measure(
    nll: np.ndarray, gain: np.ndarray, axes: dict[str, np.ndarray], num_bootstrap: int, seed: int
) -> tuple[list[Environment], dict[str, AxisTest]]:
    """NLL [U], NDCG [U], label of every user per axis -> environments, and a test per axis."""
    rng = np.random.default_rng(seed)
    settings = {"num": num_bootstrap, "seed": seed}
    found, spreads, nulls = [], {}, {}
    for axis, labels in axes.items():
        spreads[axis] = spread(nll, labels)
        nulls[axis] = np.array([spread(nll, rng.permutation(labels)) for _ in range(PERMUTATIONS)])
        for name in sorted(set(labels.tolist())):
            inside = labels == name

            def drop(columns: np.ndarray) -> float:
                own = columns[columns[:, 1] == 1, 0]
                return -relative_drop(columns[:, 0].mean(), own.mean()) if len(own) else np.nan

            found.append(
                Environment(
                    axis=axis,
                    name=name,
                    users=int(inside.sum()),
                    nll=bootstrap(nll[inside], null=None, **settings),
                    drop=bootstrap(np.stack([nll, inside.astype(float)], axis=1), drop, **settings),
                    ndcg=bootstrap(gain[inside], null=None, **settings),
                )
            )
    corrected, _ = holm([permutation_p(spreads[axis], nulls[axis]) for axis in axes])
    tests = {
        axis: AxisTest(spreads[axis], float(nulls[axis].mean()), float(p)) for axis, p in zip(axes, corrected)
    }
    return found, tests


def noisy(title: str) -> str:
    """Two inner neighbouring letters of every third word change places; deterministic."""
    words = title.split(" ")
    for index in range(0, len(words), 3):
        word = words[index]
        if len(word) > 3 and word[1:3].isalpha():
            words[index] = word[0] + word[2] + word[1] + word[3:]
    return " ".join(words)


def popularity_shift(targets: np.ndarray, popularity: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Total variation of test targets to train popularity, its mean for targets drawn from the latter, p."""
    share = popularity / popularity.sum()

    def distance(chosen: np.ndarray) -> float:
        return np.abs(np.bincount(chosen, minlength=len(share)) / len(chosen) - share).sum() / 2

    rng = np.random.default_rng(seed)
    null = np.empty(PERMUTATIONS)
    for draw in range(PERMUTATIONS):
        null[draw] = distance(rng.choice(len(share), size=len(targets), p=share))
    observed = distance(targets)
    return float(observed), float(null.mean()), permutation_p(observed, null)


def noise_cost(context: AuditContext, samples, targets: np.ndarray) -> Estimate:
    """NLL with noisy titles minus clean, paired over users."""
    encoder = context.recommender.encoder
    text_of = context.catalogue.text_of
    prompts = [encoder.encode([text_of(i) for i in s.history]).input_ids.tolist() for s in samples]
    prompts += [encoder.encode([noisy(text_of(i)) for i in s.history]).input_ids.tolist() for s in samples]
    losses = target_nll(context, prompts, np.tile(targets, 2), "noisy titles").renormalised
    clean, changed = losses.reshape(2, len(samples))
    return bootstrap(changed - clean, num=context.options.num_bootstrap, seed=context.options.seed)


def run(context: AuditContext) -> dict:
    options = context.options
    samples, scores = context.matrix(DEFAULT_USERS)
    targets = context.targets(samples)
    popularity = context.popularity
    nll = -scores[np.arange(len(samples)), targets]
    gain = target_gains(scores, targets)
    axes = environments(samples, targets, popularity)
    found, tests = measure(nll, gain, axes, options.num_bootstrap, options.seed)
    noise = noise_cost(context, samples, targets)
    moved, drawn, moved_p = popularity_shift(targets, popularity, options.seed)
    worst, effect = measure_worst(nll, axes, options.num_bootstrap, options.seed)
    differing = [axis for axis, test in tests.items() if test.p <= ALPHA]
    finding = (
        f"{in_words(axes, worst, effect)}; environments differ along {', '.join(differing) or 'no axis'} "
        f"(p <= .05 after Holm's correction, {len(samples)} users); noisy titles cost {noise.text()} nats; "
        f"test targets are {moved:.2f} from train popularity "
        f"(total variation; {drawn:.2f} by chance, p = {moved_p:.2g})."
    )
    spreads = [
        f"{axis}: spread {test.spread:.3g} against {test.null:.3g}, p = {test.p:.2g}"
        for axis, test in tests.items()
    ]
    control = "labels permuted over users: " + ("; ".join(spreads) or "no axis has two environments")
    return result(
        finding=finding,
        effect=effect,
        effect_name="relative NLL of the worst environment",
        speaks=bool(differing),
        control=control,
        measures={"worst environment": effect, "noisy titles, nats": noise},
        figures=[figure(found)] if found else [],
        table=table(found, noise, float(nll.mean())),
        axes=differing,
    )


def in_words(axes: Mapping[str, np.ndarray], worst: str | None, effect: Estimate) -> str:
    """Which environment is the worst; why none is, where nothing was measured."""
    if not axes:
        return "Users do not differ in time, popularity of the target or history length, so none is the worst"
    if worst is None:
        return f"No environment has {FEWEST} users, so none is the worst"
    if not np.isfinite(effect.value):
        return "The NLL of some target is not finite, so no environment is the worst"
    return (
        f"Worst environment: {worst}, whose NLL is {effect.text()} of the mean above it "
        f"(the worst of permuted labels: {effect.null:.2g})"
    )


def table(found: list[Environment], noise: Estimate, mean_nll: float) -> dict:
    """One row per environment, noisy titles last."""
    rows: list[list] = []
    for e in found:
        rows.append(
            [e.axis, e.name, e.users, e.nll.value, e.drop.value, e.drop.low, e.drop.high, e.ndcg.value]
        )
    relative = [number / mean_nll for number in (noise.value, noise.low, noise.high)]
    rows.append(["titles", "noisy history titles", noise.n, float(mean_nll + noise.value), *relative, None])
    columns = ["axis", "environment", "users", "NLL", "relative drop", "low", "high", "NDCG@10"]
    return {"columns": columns, "rows": rows}


def figure(found: list[Environment]) -> dict:
    return {
        "kind": "bar",
        "title": "Relative NLL by environment",
        "horizontal": True,
        "percent": True,
        "legend": False,
        "categories": [e.name for e in found],
        "caption": "Bars to the right are environments where the target costs more than on average.",
        "series": [estimate_series("NLL above the mean", [e.drop for e in found])],
    }


def cost(context: AuditContext) -> Cost:
    # Clean and noisy titles.
    return Cost(scorings=context.unscored(DEFAULT_USERS), losses=2 * context.num_users(DEFAULT_USERS))


AUDIT = Audit(
    title="Distribution shift",
    question="In which environment does the model lose most?",
    run=run,
    cost=cost,
    order=32,
)
