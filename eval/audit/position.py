"""Audit `position`: does the order of the history decide, and which places in it count?

Two measurements:
- P random orders of every history, list against list of the true order: Kendall tau over all items, rank-biased overlap (Webber
  et al. 2010, persistence 0.9, first 50), Jaccard of the top 10, and the spread of NDCG@10 over orders.
- a probe item is moved through the history: its influence at a slot is the total variation between the catalogue distributions
  with the probe there and without it. A model blind to order has a flat curve.
Speaks: the curve's spread ((max - min) / mean over slots) exceeds that of slots permuted within users, p <= 0.05.
Controls: that permutation; and another user's history, which gives the scale of what a list can change at all.
Order is also information (tastes move): the audit says that order counts, not that it should not.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import kendalltau

from eval.audit.context import Audit, AuditContext, Cost, result
from eval.audit.inference import (
    Estimate,
    bootstrap,
    ndcg,
    permutation_p,
    probabilities,
    target_ranks,
    top_lists,
)
from eval.audit.sensitivity import partners
from eval.metrics.robustness import jaccard, rank_biased_overlap
from gdrt_ds.data.corpus import Sample

TITLE = "Order of the history"
QUESTION = "Does the order of the history change the list, and which places count most?"
DEFAULT_USERS, SLOTS, MIN_HISTORY, DEPTH, PERMUTATIONS = 12, 5, 2, 50, 200


def agreement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Scores [I] against scores [I] -> (Kendall tau, RBO, Jaccard of the top 10)."""
    k = min(DEPTH, len(first))
    lists = top_lists(np.stack([first, second]), k).tolist()
    tau = kendalltau(first, second).statistic
    return np.array(
        [tau if np.isfinite(tau) else 1.0, rank_biased_overlap(*lists), jaccard(lists[0][:10], lists[1][:10])]
    )


def measure_orders(
    true: np.ndarray,
    permuted: np.ndarray,
    other: np.ndarray,
    targets: np.ndarray,
    num_bootstrap: int,
    seed: int,
) -> dict[str, Estimate]:
    """Scores of the true order [U, I], of P orders [U, P, I] and of another user's history [U, I]."""
    users, count, _ = permuted.shape
    orders = np.array(
        [[agreement(true[u], permuted[u, p]) for p in range(count)] for u in range(users)]
    ).mean(axis=1)
    others = np.array([agreement(true[u], other[u]) for u in range(users)])
    gains = np.stack([ndcg(target_ranks(permuted[:, p], targets)) for p in range(count)], axis=1)
    settings = {"null": None, "num": num_bootstrap, "seed": seed}
    found = {
        f"{name}, other orders": bootstrap(orders[:, j], **settings)
        for j, name in enumerate(("Kendall tau", "RBO", "Jaccard@10"))
    }
    found |= {
        f"{name}, another user": bootstrap(others[:, j], **settings)
        for j, name in enumerate(("Kendall tau", "RBO", "Jaccard@10"))
    }
    found["NDCG@10 spread over orders"] = bootstrap(gains.std(axis=1), **settings)
    change = bootstrap(
        np.stack([1 - orders[:, 1], 1 - others[:, 1]], axis=1),
        lambda r: r[:, 0].mean() / max(r[:, 1].mean(), 1e-12),
        **settings,
    )
    found["change by order / change by another user (1 - RBO)"] = change
    return found


def spread(curve: np.ndarray) -> float:
    """(max - min) / mean of a mean influence curve [S]; 0 for a flat or empty one."""
    return float((curve.max() - curve.min()) / curve.mean()) if curve.mean() > 1e-12 else 0.0


def measure_probe(
    influence: np.ndarray, num_bootstrap: int, seed: int
) -> tuple[Estimate, float, np.ndarray, list[Estimate]]:
    """Influence [U, S] -> spread (null = mean of permuted slots), p, null values, the curve with intervals."""
    rng = np.random.default_rng(seed)
    null = np.array([spread(rng.permuted(influence, axis=1).mean(axis=0)) for _ in range(PERMUTATIONS)])
    observed = bootstrap(
        influence,
        lambda rows: spread(rows.mean(axis=0)),
        null=float(null.mean()),
        num=num_bootstrap,
        seed=seed,
    )
    curve = [
        bootstrap(influence[:, s], null=None, num=num_bootstrap, seed=seed) for s in range(influence.shape[1])
    ]
    return observed, permutation_p(observed.value, null), null, curve


def probe_histories(
    context: AuditContext, samples: list[Sample]
) -> tuple[list[list[tuple[str, ...]]], list[tuple[str, ...]]]:
    """Per user the history with the probe at SLOTS places, oldest first, and without it. The oldest item makes room: the length stays."""
    rng = np.random.default_rng([context.options.seed, 3])
    order = np.argsort(-context.popularity, kind="stable")
    head = [context.catalogue.entries[i].item_id for i in order[: max(10, len(order) // 4)]]
    moved, without = [], []
    for sample in samples:
        used = {context.catalogue.index_of[i] for i in (*sample.history, sample.target)}
        candidates = [i for i in head if context.catalogue.index_of[i] not in used] or head
        probe = candidates[int(rng.integers(len(candidates)))]
        rest = sample.history[1:]
        moved.append(
            [rest[:s] + (probe,) + rest[s:] for s in np.linspace(0, len(rest), SLOTS).round().astype(int)]
        )
        without.append(rest)
    return moved, without


def run(context: AuditContext) -> dict:
    options, samples = context.options, eligible(context)
    rng = np.random.default_rng([options.seed, 2])
    orders = [
        [tuple(s.history[i] for i in rng.permutation(len(s.history))) for _ in range(options.permutations)]
        for s in samples
    ]
    moved, without = probe_histories(context, samples)
    other = [samples[p].history for p in partners(samples, 1)]
    histories = (
        [s.history for s in samples]
        + [h for group in orders for h in group]
        + other
        + [h for group in moved for h in group]
        + without
    )
    scores, users = context.scores(histories, "orders of the history"), len(samples)
    true, rest = scores[:users], scores[users:]
    permuted, rest = (
        rest[: users * options.permutations].reshape(users, options.permutations, -1),
        rest[users * options.permutations :],
    )
    found = measure_orders(
        true, permuted, rest[:users], context.targets(samples), options.num_bootstrap, options.seed
    )
    rest = probabilities(rest[users:])
    influence = (
        np.abs(rest[: users * SLOTS].reshape(users, SLOTS, -1) - rest[users * SLOTS :][:, None]).sum(axis=2)
        / 2
    )
    effect, p, null, curve = measure_probe(influence, options.num_bootstrap, options.seed)
    found["probe: spread over slots"] = effect
    speaks = p <= 0.05
    strongest = int(np.argmax([c.value for c in curve]))
    words = (
        f"position counts, most at {strongest / (SLOTS - 1):.0%} of the way to the newest item"
        if speaks
        else "no more than permuted slots show"
    )
    change = found["change by order / change by another user (1 - RBO)"]
    finding = (
        f"Moving a probe item through the history changes its influence by {effect.value:.3g} [{effect.low:.3g}, "
        f"{effect.high:.3g}] of its mean "
        f"(permuted slots {null.mean():.3g}, p = {p:.2g}: {words}); reordering keeps {found['Jaccard@10, other orders'].text()} "
        f"of the top 10 (Jaccard) "
        f"and changes lists by {change.text(2)} of what another user's history changes, over {users} users."
    )
    places = [round(s / (SLOTS - 1), 2) for s in range(SLOTS)]
    figure = {
        "kind": "line",
        "title": "Influence of a probe item by its place in the history",
        "x_label": "place (0 = oldest, 1 = newest)",
        "legend": False,
        "y_label": "total variation",
        "caption": "A flat curve is a model blind to order; a rise to the right is recency.",
        "reference": {"value": float(np.mean([c.value for c in curve])), "label": "mean"},
        "series": [
            {
                "name": "influence",
                "x": places,
                "y": [c.value for c in curve],
                "low": [c.low for c in curve],
                "high": [c.high for c in curve],
            }
        ],
    }
    table = {
        "columns": ["measure", "value", "low", "high"],
        "rows": [[name, e.value, e.low, e.high] for name, e in found.items()],
    }
    return result(
        TITLE,
        QUESTION,
        finding=finding,
        effect=effect,
        effect_name="(max - min) / mean of probe influence over slots",
        better=None,
        speaks=speaks,
        measures=found,
        control=f"slots permuted within users: spread {null.mean():.3g} (95 % below {np.quantile(null, 0.95):.3g}); another "
        f"user's history keeps "
        f"{found['Jaccard@10, another user'].text()} of the top 10",
        table=table,
        figures=[figure],
    )


def eligible(context: AuditContext) -> list[Sample]:
    """Users whose history has an order to permute."""
    return context.users(DEFAULT_USERS, lambda sample: len(sample.history) >= MIN_HISTORY)


def lacks(context: AuditContext) -> tuple[str, str] | None:
    ordered = {s.user_id for s in context.subject.samples if len(s.history) >= MIN_HISTORY}
    return (
        None
        if len(ordered) > 1
        else (f"fewer than 2 users have {MIN_HISTORY} or more history items", "choose another split")
    )


def cost(context: AuditContext) -> Cost:
    return Cost(scorings=len(eligible(context)) * (context.options.permutations + SLOTS + 2))


AUDIT = Audit("position", TITLE, QUESTION, run, cost, lacks)
