"""Audit `selection`: how much of the logged choices is the slot an item stood in?

And what do metrics say once that is weighed out? Logs rarely say where an item was shown. Where a sample
has the label `slot` or `position` (an extra column: 1 = top), it is used. Otherwise the slot that a
most-popular list would have given stands in: items in bins by popularity rank, bin 1 = the top. The result
says which.

A shallow tower (Zhao et al., RecSys 2019) stands beside the main score s_ui = log P(i | history), which
stays frozen:

    P(choice of u = i) ~ exp(s_ui + b[slot of i])        by maximum likelihood

b[slot] > 0 says that items there are chosen more often than the main score says, as if the slot itself drew
choices. With labelled slots, which only the chosen item has, b[slot] = -log(mean relevance of the choices
there), relevance being exp(-NLL of the target / its standard deviation).

Inverse propensity: weight = min(1 / propensity, CLIP x the smallest weight), propensity = exp(b[slot])
scaled to 1 at most, self-normalised: HR and NDCG = sum w m / sum w, beside the plain means. Control: slots
permuted over items (or samples).

Shapes: U users, I catalogue entries, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from eval.audit.base import Audit, estimate_series, estimate_table, matrix_cost, result
from eval.audit.context import AuditContext
from eval.audit.estimates import Estimate, bootstrap, of_replicates, permutation_p
from eval.audit.score_rows import target_gains, target_hits

DEFAULT_USERS = 100
SLOTS = 8
CLIP = 10.0
PERMUTATIONS = 100
MOST_REPLICATES = 100  # each one fits the tower anew
LARGEST = 12  # bound of |b|, nats
LABELS = ("slot", "position")
METRICS = (
    "HR@10",
    "NDCG@10",
    "HR@10, inverse propensity",
    "NDCG@10, inverse propensity",
    "HR@10, change",
    "NDCG@10, change",
)

Fit = Callable[[np.ndarray], np.ndarray]
"""User indices -> b [S] of these users."""


def popularity_slots(popularity: np.ndarray, num: int = SLOTS) -> np.ndarray:
    """Slot of every item, int64 [I]: bins of popularity rank that double in size, 0 = the most popular."""
    count = len(popularity)
    num = max(2, min(num, int(np.log2(count + 1))))
    edges = np.cumsum(2.0 ** np.arange(num))
    rank = np.empty(count, np.int64)
    rank[np.argsort(-popularity, kind="stable")] = np.arange(count)
    return np.searchsorted(edges / edges[-1] * count, rank, side="right").clip(0, num - 1)


def slot_mass(scores: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Log-probabilities [U, I] and slots [I] -> log P(slot | user) under the main score alone, [U, S]."""
    count = int(slots.max()) + 1
    mass = np.stack([np.exp(scores[:, slots == s]).sum(axis=1) for s in range(count)], axis=1)
    return np.log(np.maximum(mass, 1e-300))


def fit_tower(log_mass: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Maximum-likelihood slot terms beside frozen scores: b [S], mean 0.

    One pseudo-choice per slot, spread like the main score's own mass, keeps a slot without choices finite
    and pulls b to 0.

    Args:
        log_mass: [U, S] of `slot_mass`.
        chosen: [U] slots of the targets.
    """
    num = log_mass.shape[1]
    counts = np.bincount(chosen, minlength=num).astype(float)
    share = np.exp(log_mass).mean(axis=0)
    share = np.maximum(share / share.sum(), 1e-12)

    def loss(b: np.ndarray) -> tuple[float, np.ndarray]:
        logits = log_mass + b
        prior = np.log(share) + b
        total = np.logaddexp.reduce(logits, axis=1)
        prior_total = np.logaddexp.reduce(prior)
        value = total.sum() - counts @ b + num * (prior_total - share @ b)
        expected = np.exp(logits - total[:, None]).sum(axis=0)
        gradient = expected - counts + num * (np.exp(prior - prior_total) - share)
        return float(value), gradient

    bounds = [(-LARGEST, LARGEST)] * num
    b = minimize(loss, np.zeros(num), jac=True, method="L-BFGS-B", bounds=bounds).x
    return b - b.mean()


def fit_labelled(nll: np.ndarray, slots: np.ndarray, num: int) -> np.ndarray:
    """b [S], mean 0, where only the chosen item's slot [U] is known.

    It is -log mean relevance of the slot's choices. A slot whose choices are little relevant was chosen for
    its place.

    Args:
        num: S. A resample of users can lack the last slot, so it cannot be read from `slots`.
    """
    relevance = np.exp(-(nll - nll.min()) / max(float(nll.std()), 1e-9))
    # Half a choice of mean relevance in every slot keeps an empty one finite.
    counts = np.bincount(slots, minlength=num) + 0.5
    sums = np.bincount(slots, weights=relevance, minlength=num) + 0.5 * relevance.mean()
    b = -np.log(sums / counts)
    return b - b.mean()


def inverse_propensity(b: np.ndarray, slots: np.ndarray, clip: float = CLIP) -> np.ndarray:
    """Weights [U] of samples whose target stood in `slots` [U]; mean 1."""
    weights = 1 / np.exp(b - b.max())[slots]
    weights = np.minimum(weights, clip * weights.min())
    return weights / weights.mean()


def measure(
    fit: Fit, slots: np.ndarray, hits: np.ndarray, gains: np.ndarray, num_bootstrap: int, seed: int
) -> tuple[list[Estimate], dict[str, Estimate]]:
    """Estimates of b per slot, and metrics plain and weighed.

    Every resample fits b anew, so that intervals of weighed metrics hold the error of their weights.

    Args:
        fit: user indices -> b [S].
        slots: [U] slots of the targets.
        hits, gains: [U] HR@10 and NDCG@10 of the targets.
    """
    users = len(slots)
    everyone = np.arange(users)
    values = np.stack([hits, gains], axis=1)

    def metrics(b: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The `METRICS` of these users, weighed with terms b that were fitted on them."""
        weights = inverse_propensity(b, slots[rows])
        plain = values[rows].mean(axis=0)
        weighed = weights @ values[rows] / weights.sum()
        return np.array([*plain, *weighed, *(weighed - plain)])

    b = fit(everyone)
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, users, users) for _ in range(min(MOST_REPLICATES, num_bootstrap))]
    terms = [fit(draw) for draw in draws]
    tower = [
        of_replicates(float(value), replicates, users)
        for value, replicates in zip(b, np.transpose(terms), strict=True)
    ]
    measured = metrics(b, everyone)
    redrawn = np.array([metrics(drawn, draw) for drawn, draw in zip(terms, draws, strict=True)])
    found = {
        name: of_replicates(float(measured[place]), redrawn[:, place], users)
        for place, name in enumerate(METRICS)
    }
    # The plain means need no fit, so that they can have all resamples.
    plain = bootstrap(values, lambda rows: rows.mean(axis=0), num=num_bootstrap, seed=seed)
    return tower, {**found, **dict(zip(METRICS, plain))}


@dataclass(frozen=True)
class Slots:
    """Where the slots come from, and how b is fitted to them.

    Attributes:
        source: in words.
        names: of every slot.
        of_target: [U] slots of the targets.
        fit: user indices -> b [S].
        permuted: b of permuted slots, one array [S] per permutation.
    """

    source: str
    names: list[str]
    of_target: np.ndarray
    fit: Fit
    permuted: list[np.ndarray]


def logged_slots(label: str, samples, nll: np.ndarray, rng: np.random.Generator) -> Slots:
    """The slots that a label of the samples names."""
    values = np.array([float(sample.labels[label]) for sample in samples])
    levels = np.unique(values)
    of_target = np.searchsorted(levels, values)

    def fit(users: np.ndarray) -> np.ndarray:
        return fit_labelled(nll[users], of_target[users], len(levels))

    permuted = [fit_labelled(nll, rng.permutation(of_target), len(levels)) for _ in range(PERMUTATIONS)]
    names = [f"slot {level:g}" for level in levels]
    return Slots(f"the logged slots (label `{label}`)", names, of_target, fit, permuted)


def assumed_slots(
    popularity: np.ndarray, scores: np.ndarray, targets: np.ndarray, rng: np.random.Generator
) -> Slots:
    """The slots that a most-popular list would have given."""
    slots = popularity_slots(popularity)
    of_target = slots[targets]
    log_mass = slot_mass(scores, slots)

    def fit(users: np.ndarray) -> np.ndarray:
        return fit_tower(log_mass[users], of_target[users])

    permuted = []
    for _ in range(PERMUTATIONS):
        drawn = rng.permutation(slots)
        permuted.append(fit_tower(slot_mass(scores, drawn), drawn[targets]))
    sizes = np.bincount(slots)
    names = [f"slot {s + 1} ({size} items)" for s, size in enumerate(sizes)]
    source = "the slots of a most-popular list, since the logs name none"
    return Slots(source, names, of_target, fit, permuted)


def labelled(samples) -> str | None:
    """The label that names slots, if every sample has it as a number and it varies."""
    for label in LABELS:
        try:
            values = {float(sample.labels[label]) for sample in samples}
        except (KeyError, ValueError):
            continue
        if len(values) > 1:
            return label
    return None


def run(context: AuditContext) -> dict:
    options = context.options
    samples, scores = context.matrix(DEFAULT_USERS)
    targets = context.targets(samples)
    rng = np.random.default_rng(options.seed)
    label = labelled(samples)
    if label is not None:
        slots = logged_slots(label, samples, -scores[np.arange(len(samples)), targets], rng)
    else:
        slots = assumed_slots(context.popularity, scores, targets, rng)
    hits = target_hits(scores, targets)
    gains = target_gains(scores, targets)
    tower, found = measure(slots.fit, slots.of_target, hits, gains, options.num_bootstrap, options.seed)
    b = np.array([term.value for term in tower])
    null = np.array([terms.std() for terms in slots.permuted])
    p = permutation_p(float(b.std()), null)
    effect = tower[0]
    speaks = p <= 0.05
    verdict = "slots draw choices" if speaks else "nothing shown"
    finding = (
        f"Beside the main score, the top slot has a log-odds term of {effect.text()} over {effect.n} users "
        f"on {slots.source} (spread over slots against permuted slots: p = {p:.2g}, {verdict}); "
        f"inverse propensity changes NDCG@10 by {found['NDCG@10, change'].text()} "
        f"from {found['NDCG@10'].value:.3g}."
    )
    return result(
        finding=finding,
        effect=effect,
        effect_name="log-odds term of the top slot",
        speaks=speaks,
        control=f"slots permuted: spread {null.mean():.3g} (95 % below {np.quantile(null, 0.95):.3g}), "
        f"here {b.std():.3g}",
        measures={**found, "b: top slot": effect},
        table=estimate_table({**dict(zip(slots.names, tower)), **found}, "slot or metric"),
        figures=[figure(slots.names, tower)],
        slots=slots.source,
    )


def figure(names: list[str], tower: list[Estimate]) -> dict:
    return {
        "kind": "bar",
        "title": "Bias per slot",
        "y_label": "log odds beside the main score",
        "legend": False,
        "categories": names,
        "caption": "Above zero: chosen more often than the main score says, "
        "as if the slot itself drew choices.",
        "series": [estimate_series("b", tower)],
    }


AUDIT = Audit(
    title="Selection bias in the logs",
    question="Do choices follow the slot an item stood in, "
    "and do the metrics change once that is weighed out?",
    run=run,
    cost=matrix_cost(DEFAULT_USERS),
    order=30,
)
