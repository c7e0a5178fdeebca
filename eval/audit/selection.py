"""Audit `selection`: how much of the logged choices is the slot an item stood in, and what do metrics say once that is weighed out?

Logs rarely say where an item was shown. Where a sample has the label `slot` (an extra column: 1 = top), it is used. Otherwise the
slot that a most-popular list would have given stands in: items in bins by popularity rank, bin 1 = the top. The result says which.

Shallow tower (Zhao et al., RecSys 2019) beside the main score s_ui = log P(i | history), which stays frozen:
    P(choice of u = i) ~ exp(s_ui + b[slot of i])        by maximum likelihood
b[slot] > 0: chosen more often than the main score says, as if the slot itself drew choices. With labelled slots, which only the chosen
item has, b[slot] = -log(mean relevance of the choices there), relevance being exp(-NLL of the target / its standard deviation).
Inverse propensity: weight = min(1 / propensity, CLIP x the smallest weight), propensity = exp(b[slot]) scaled to 1 at most,
self-normalised: HR and NDCG = sum w m / sum w, beside the plain means. Control: slots permuted over items (or samples).
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

from eval.audit.context import Audit, AuditContext, Cost, result
from eval.audit.inference import Estimate, bootstrap, ndcg, permutation_p, target_ranks

TITLE = "Selection bias in the logs"
QUESTION = "Do choices follow the slot an item stood in, and do the metrics change once that is weighed out?"
DEFAULT_USERS, SLOTS, CLIP, PERMUTATIONS = 100, 8, 10.0, 100
LABELS = ("slot", "position")


def popularity_slots(popularity: np.ndarray, num: int = SLOTS) -> np.ndarray:
    """Slot of every item, int64 [I]: bins of popularity rank that double in size (1, 2, 4, ... shares), 0 = the most popular."""
    count = len(popularity)
    num = max(2, min(num, int(np.log2(count + 1))))
    edges = np.cumsum(2.0 ** np.arange(num))
    rank = np.empty(count, np.int64)
    rank[np.argsort(-popularity, kind="stable")] = np.arange(count)
    return np.searchsorted(edges / edges[-1] * count, rank, side="right").clip(0, num - 1)


def slot_mass(scores: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """log P(slot | user) under the main score alone, [U, S]. scores [U, I] log-probabilities, slots [I]."""
    mass = np.stack([np.exp(scores[:, slots == s]).sum(axis=1) for s in range(int(slots.max()) + 1)], axis=1)
    return np.log(np.maximum(mass, 1e-300))


def fit_tower(log_mass: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """b [S], mean 0: maximum-likelihood slot terms beside frozen scores. log_mass [U, S] of `slot_mass`, chosen [U] slots of the targets.

    One pseudo-choice per slot, spread like the main score's own mass, keeps a slot without choices finite and pulls b to 0.
    """
    num = log_mass.shape[1]
    counts = np.bincount(chosen, minlength=num).astype(float)
    share = np.exp(log_mass).mean(axis=0)
    share = np.maximum(share / share.sum(), 1e-12)

    def loss(b: np.ndarray) -> tuple[float, np.ndarray]:
        logits, prior = log_mass + b, np.log(share) + b
        total, prior_total = np.logaddexp.reduce(logits, axis=1), np.logaddexp.reduce(prior)
        value = total.sum() - counts @ b + num * (prior_total - share @ b)
        gradient = (
            np.exp(logits - total[:, None]).sum(axis=0) - counts + num * (np.exp(prior - prior_total) - share)
        )
        return float(value), gradient

    b = minimize(loss, np.zeros(num), jac=True, method="L-BFGS-B", bounds=[(-12, 12)] * num).x
    return b - b.mean()


def fit_labelled(nll: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """b [S], mean 0, where only the chosen item's slot [U] is known: -log mean relevance of the slot's choices. A slot whose choices are
    little relevant was chosen for its place."""
    num = int(slots.max()) + 1
    relevance = np.exp(-(nll - nll.min()) / max(float(nll.std()), 1e-9))
    counts = np.bincount(slots, minlength=num) + 0.5
    b = -np.log((np.bincount(slots, weights=relevance, minlength=num) + 0.5 * relevance.mean()) / counts)
    return b - b.mean()


def inverse_propensity(b: np.ndarray, slots: np.ndarray, clip: float = CLIP) -> np.ndarray:
    """Weights [U] of samples whose target stood in `slots` [U]; mean 1."""
    weights = 1 / np.exp(b - b.max())[slots]
    weights = np.minimum(weights, clip * weights.min())
    return weights / weights.mean()


def measure(fit, slots: np.ndarray, rank: np.ndarray, num_bootstrap: int, seed: int) -> dict:
    """fit: user indices -> b [S]; slots [U] of the targets; rank [U]. Estimates of b per slot, metrics plain and weighed."""
    users, everyone = len(slots), np.arange(len(slots))
    b, rng = fit(everyone), np.random.default_rng(seed)
    draws = [rng.integers(0, users, users) for _ in range(min(100, num_bootstrap))]
    replicates = np.array([fit(d) for d in draws])
    low, high = np.quantile(replicates, [0.025, 0.975], axis=0)
    tower = [Estimate(float(v), float(l), float(h), users) for v, l, h in zip(b, low, high)]
    columns = np.stack([slots.astype(float), (rank <= 10).astype(float), ndcg(rank)], axis=1)

    def metrics(rows: np.ndarray) -> np.ndarray:
        weights = inverse_propensity(b, rows[:, 0].astype(int))
        plain, weighed = rows[:, 1:].mean(axis=0), weights @ rows[:, 1:] / weights.sum()
        return np.array([*plain, *weighed, *(weighed - plain)])

    values = bootstrap(columns, metrics, num=num_bootstrap, seed=seed)
    names = [
        "HR@10",
        "NDCG@10",
        "HR@10, inverse propensity",
        "NDCG@10, inverse propensity",
        "HR@10, change",
        "NDCG@10, change",
    ]
    return {"tower": tower, **dict(zip(names, values))}


def run(context: AuditContext) -> dict:
    options = context.options
    samples, scores = context.matrix(DEFAULT_USERS)
    targets = context.targets(samples)
    rank, rng = target_ranks(scores, targets), np.random.default_rng(options.seed)
    label = labelled(samples)
    if label is not None:
        values = np.array([float(s.labels[label]) for s in samples])
        slot_of_target = np.searchsorted(np.unique(values), values)
        nll = -scores[np.arange(len(samples)), targets]
        fit = lambda rows, slots=slot_of_target: fit_labelled(nll[rows], slots[rows])  # noqa: E731
        permuted = [fit_labelled(nll, rng.permutation(slot_of_target)) for _ in range(PERMUTATIONS)]
        source, names = f"the logged slots (label `{label}`)", [f"slot {v:g}" for v in np.unique(values)]
    else:
        slots = popularity_slots(context.popularity)
        slot_of_target = slots[targets]
        log_mass = slot_mass(scores, slots)
        fit = lambda rows: fit_tower(log_mass[rows], slot_of_target[rows])  # noqa: E731
        permuted = [
            fit_tower(slot_mass(scores, s), s[targets])
            for s in (rng.permutation(slots) for _ in range(PERMUTATIONS))
        ]
        source = "the slots of a most-popular list, since the logs name none"
        names = [f"slot {s + 1} ({int((slots == s).sum())} items)" for s in range(int(slots.max()) + 1)]
    found = measure(fit, slot_of_target, rank, options.num_bootstrap, options.seed)
    tower = found.pop("tower")
    b, null = np.array([t.value for t in tower]), np.array([p.std() for p in permuted])
    p = permutation_p(float(b.std()), null)
    top = tower[0]
    effect = Estimate(top.value, top.low, top.high, top.n, 0.0)
    speaks = p <= 0.05
    change = found["NDCG@10, change"]
    finding = (
        f"Beside the main score, the top slot has a log-odds term of {effect.text()} over {effect.n} users on {source} "
        f"(spread over slots against permuted slots: p = {p:.2g}, {'slots draw choices' if speaks else 'nothing shown'}); "
        f"inverse propensity changes NDCG@10 by {change.text()} from {found['NDCG@10'].value:.3g}."
    )
    figure = {
        "kind": "bar",
        "title": "Bias per slot",
        "y_label": "log odds beside the main score",
        "legend": False,
        "categories": names[: len(tower)],
        "caption": "Above zero: chosen more often than the main score says, as if the slot itself drew choices.",
        "series": [
            {"name": "b", "values": b, "low": [t.low for t in tower], "high": [t.high for t in tower]}
        ],
    }
    rows = [[n, e.value, e.low, e.high] for n, e in [*zip(names, tower), *found.items()]]
    return result(
        TITLE,
        QUESTION,
        finding=finding,
        effect=effect,
        effect_name="log-odds term of the top slot",
        speaks=speaks,
        control=f"slots permuted: spread {null.mean():.3g} (95 % below {np.quantile(null, 0.95):.3g}), here {b.std():.3g}",
        measures={**found, "b: top slot": effect},
        table={"columns": ["slot or metric", "value", "low", "high"], "rows": rows},
        figures=[figure],
        slots=source,
    )


def labelled(samples) -> str | None:
    """The label that names slots, if every sample has it as a number."""
    for label in LABELS:
        try:
            values = {float(s.labels[label]) for s in samples}
        except (KeyError, ValueError):
            continue
        if len(values) > 1:
            return label
    return None


AUDIT = Audit(
    "selection", TITLE, QUESTION, run, lambda context: Cost(scorings=context.unscored(DEFAULT_USERS))
)
