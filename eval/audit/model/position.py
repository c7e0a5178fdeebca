"""Audit `position`: does the order of the history decide, and which places in it count?

It makes two measurements.

- Random orders of every history are compared with the true order, list against list: Kendall tau over all
  items, rank-biased overlap (Webber et al. 2010, persistence 0.9, first 50), Jaccard of the top 10, and the
  spread of NDCG@10 over orders.
- A probe item is moved through the history. Its influence at a slot is the total variation between the
  catalogue distributions with the probe there and without it. A model blind to order has a flat curve.

The audit speaks when the curve's spread, (max - min) / mean over slots, exceeds that of slots permuted
within users with p <= 0.05. Controls: that permutation; and another user's history, which gives the scale
of what a list can change at all. Order is also information (tastes move): the audit says that order counts,
not that it should not.

Shapes: U users, I catalogue entries, P orders, S slots.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import kendalltau

from eval.audit.base import Audit, Cost, Lack, estimate_series, estimate_table, result
from eval.audit.context import AuditContext, History, few_users_fix
from eval.audit.estimates import Estimate, bootstrap, permutation_p
from eval.audit.list_overlap import jaccard, rank_biased_overlap
from eval.audit.partners import partner_note, partners
from eval.audit.score_rows import probabilities, target_gains, top_lists
from gdrt_ds.data.corpus import Sample

DEFAULT_USERS = 12
SLOTS = 5
MIN_HISTORY = 2
DEPTH = 50  # of rank-biased overlap
PERMUTATIONS = 200
AGREEMENTS = ("Kendall tau", "RBO", "Jaccard@10")
RBO = AGREEMENTS.index("RBO")
CHANGE = "change by order / change by another user (1 - RBO)"


def is_constant(scores: np.ndarray) -> bool:
    """Whether all scores [I] are one finite number. Scores with NaN have no order that could agree."""
    return bool(np.isfinite(scores).all() and np.ptp(scores) == 0)


def agreement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Scores [I] against scores [I] -> the three `AGREEMENTS`."""
    depth = min(DEPTH, len(first))
    lists = top_lists(np.stack([first, second]), depth).tolist()
    tau = kendalltau(first, second).statistic
    if is_constant(first) and is_constant(second):  # any order of equal scores is the same
        tau = 1.0
    return np.array([tau, rank_biased_overlap(*lists), jaccard(lists[0][:10], lists[1][:10])])


def measure_orders(
    true: np.ndarray,
    permuted: np.ndarray,
    other: np.ndarray,
    targets: np.ndarray,
    num_bootstrap: int,
    seed: int,
) -> dict[str, Estimate]:
    """How much the lists of other orders agree with those of the true one, and those of another user.

    Args:
        true: scores of the true order [U, I].
        permuted: scores of P orders [U, P, I].
        other: scores of another user's history [U, I].
        targets: entry indices [U].
    """
    users, count, _ = permuted.shape
    settings = {"null": None, "num": num_bootstrap, "seed": seed}
    each_order = [[agreement(true[u], permuted[u, p]) for p in range(count)] for u in range(users)]
    orders = np.array(each_order).mean(axis=1)
    others = np.array([agreement(true[u], other[u]) for u in range(users)])
    found = {}
    for j, name in enumerate(AGREEMENTS):
        found[f"{name}, other orders"] = bootstrap(orders[:, j], **settings)
    for j, name in enumerate(AGREEMENTS):
        found[f"{name}, another user"] = bootstrap(others[:, j], **settings)
    gains = np.stack([target_gains(permuted[:, p], targets) for p in range(count)], axis=1)
    found["NDCG@10 spread over orders"] = bootstrap(gains.std(axis=1), **settings)

    def relative(rows: np.ndarray) -> float:
        return rows[:, 0].mean() / max(rows[:, 1].mean(), 1e-12)

    distances = np.stack([1 - orders[:, RBO], 1 - others[:, RBO]], axis=1)
    found[CHANGE] = bootstrap(distances, relative, **settings)
    return found


def spread(curve: np.ndarray) -> float:
    """(max - min) / mean of a mean influence curve [S]; 0 for a flat or empty one."""
    mean = curve.mean()
    if mean <= 1e-12:
        return 0.0
    return float((curve.max() - curve.min()) / mean)


def measure_probe(
    influence: np.ndarray, num_bootstrap: int, seed: int
) -> tuple[Estimate, float, np.ndarray, list[Estimate]]:
    """Influence [U, S] -> spread (null = mean of permuted slots), p, null values, curve with intervals."""
    settings = {"num": num_bootstrap, "seed": seed}
    rng = np.random.default_rng(seed)
    null = np.array([spread(rng.permuted(influence, axis=1).mean(axis=0)) for _ in range(PERMUTATIONS)])

    def spread_of_mean(rows: np.ndarray) -> float:
        return spread(rows.mean(axis=0))

    observed = bootstrap(influence, spread_of_mean, null=float(null.mean()), bounds=(0, np.inf), **settings)
    curve = [bootstrap(influence[:, s], null=None, **settings) for s in range(influence.shape[1])]
    return observed, permutation_p(observed.value, null), null, curve


def probe_histories(
    context: AuditContext, samples: list[Sample]
) -> tuple[list[list[History]], list[History]]:
    """Per user the history with the probe at SLOTS places, oldest first, and without it.

    The probe is a popular item that the user has not seen. The oldest item makes room, so that the length
    stays.
    """
    rng = np.random.default_rng([context.options.seed, 3])
    catalogue = context.catalogue
    order = np.argsort(-context.popularity, kind="stable")
    head = [catalogue.entries[i].item_id for i in order[: max(10, len(order) // 4)]]
    moved, without = [], []
    for sample in samples:
        used = {catalogue.index_of[item] for item in (*sample.history, sample.target)}
        candidates = [item for item in head if catalogue.index_of[item] not in used] or head
        probe = candidates[int(rng.integers(len(candidates)))]
        rest = sample.history[1:]
        places = np.linspace(0, len(rest), SLOTS).round().astype(int)
        moved.append([rest[:place] + (probe,) + rest[place:] for place in places])
        without.append(rest)
    return moved, without


def score_all(context: AuditContext, samples: list[Sample]) -> dict[str, np.ndarray]:
    """Scores of the true histories, of other orders, of other users, and of the probe's places, in one call.

    Returns:
        true [U, I], permuted [U, P, I], other [U, I], moved [U, S, I], without [U, I].
    """
    options = context.options
    users = len(samples)
    rng = np.random.default_rng([options.seed, 2])
    orders = [
        [tuple(s.history[i] for i in rng.permutation(len(s.history))) for _ in range(options.permutations)]
        for s in samples
    ]
    moved, without = probe_histories(context, samples)
    other = [samples[partner].history for partner in partners(samples, 1)]
    kinds = {
        "true": [sample.history for sample in samples],
        "permuted": [history for of_user in orders for history in of_user],
        "other": other,
        "moved": [history for of_user in moved for history in of_user],
        "without": without,
    }
    scores = context.scores([h for histories in kinds.values() for h in histories], "orders of the history")
    ends = np.cumsum([len(histories) for histories in kinds.values()])[:-1]
    found = dict(zip(kinds, np.split(scores, ends)))
    found["permuted"] = found["permuted"].reshape(users, options.permutations, -1)
    found["moved"] = found["moved"].reshape(users, SLOTS, -1)
    return found


def run(context: AuditContext) -> dict:
    options = context.options
    samples = eligible(context)
    scores = score_all(context, samples)
    found = measure_orders(
        scores["true"],
        scores["permuted"],
        scores["other"],
        context.targets(samples),
        options.num_bootstrap,
        options.seed,
    )
    difference = probabilities(scores["moved"]) - probabilities(scores["without"])[:, None]
    influence = np.abs(difference).sum(axis=2) / 2
    effect, p, null, curve = measure_probe(influence, options.num_bootstrap, options.seed)
    found["probe: spread over slots"] = effect
    speaks = p <= 0.05
    verdict = "no more than permuted slots show"
    if speaks:
        strongest = int(np.argmax([point.value for point in curve])) / (SLOTS - 1)
        verdict = f"position counts, most at {strongest:.0%} of the way to the newest item"
    finding = (
        "Moving a probe item through the history changes its influence by "
        f"{effect.value:.3g} [{effect.low:.3g}, {effect.high:.3g}] of its mean "
        f"(permuted slots {null.mean():.3g}, p = {p:.2g}: {verdict}); "
        f"reordering keeps {found['Jaccard@10, other orders'].text()} of the top 10 (Jaccard) "
        f"and changes lists by {found[CHANGE].text(2)} of what another user's history changes, "
        f"over {len(samples)} users."
    )
    return result(
        finding=finding + partner_note(samples),
        effect=effect,
        effect_name="(max - min) / mean of probe influence over slots",
        better=None,
        speaks=speaks,
        measures=found,
        control=f"slots permuted within users: spread {null.mean():.3g} "
        f"(95 % below {np.quantile(null, 0.95):.3g}); another user's history keeps "
        f"{found['Jaccard@10, another user'].text()} of the top 10",
        table=estimate_table(found),
        figures=[figure(curve)],
    )


def figure(curve: list[Estimate]) -> dict:
    series = estimate_series("influence", curve)
    series["y"] = series.pop("values")
    series["x"] = [round(slot / (SLOTS - 1), 2) for slot in range(SLOTS)]
    return {
        "kind": "line",
        "title": "Influence of a probe item by its place in the history",
        "x_label": "place (0 = oldest, 1 = newest)",
        "legend": False,
        "y_label": "total variation",
        "caption": "A flat curve is a model blind to order; a rise to the right is recency.",
        "reference": {"value": float(np.mean(series["y"])), "label": "mean"},
        "series": [series],
    }


def eligible(context: AuditContext) -> list[Sample]:
    """Users whose history has an order to permute."""
    return context.users(DEFAULT_USERS, lambda sample: len(sample.history) >= MIN_HISTORY)


def lacks(context: AuditContext) -> Lack:
    ordered = {s.user_id for s in context.subject.samples if len(s.history) >= MIN_HISTORY}
    if len(ordered) > 1:
        return None
    fix = few_users_fix(context.subject.limit)
    return f"fewer than 2 users have {MIN_HISTORY} or more history items", fix


def cost(context: AuditContext) -> Cost:
    # Per user: the true history, another user's, every order, the probe at every slot.
    return Cost(scorings=len(eligible(context)) * (context.options.permutations + SLOTS + 2))


AUDIT = Audit(
    title="Order of the history",
    question="Does the order of the history change the list, and which places count most?",
    run=run,
    cost=cost,
    order=22,
    lacks=lacks,
)
