"""Audit `amplification`: does training make a bias grow?

It follows exposure along the run's checkpoints; step 0 is the base model. Per step, over the users' top-10
lists: exposure share of five popularity bins, entropy of exposure, KL of the mean catalogue distribution to
the base's and to the (smoothed) train popularity, and the share of list places on the base's favourites,
which are the tenth of the catalogue with the largest mean probability under the base. The effect is that
last share at the last step minus step 0. Control: step labels of first and last permuted within users,
which makes the difference zero on average. Keep checkpoints with train.save_every and
train.keep_checkpoints.

Shapes: U users, I catalogue entries, G popularity bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eval.audit.base import Audit, Cost, result
from eval.audit.checkpoint_steps import chosen_steps, lacks_checkpoints, walk
from eval.audit.context import AuditContext
from eval.audit.estimates import Estimate, bootstrap, permutation_p
from eval.audit.score_rows import entropy, exposure, probabilities, top_lists
from eval.metrics.inputs import popularity_bins

DEFAULT_USERS = 16
K = 10
BINS = 5
PERMUTATIONS = 200


@dataclass(frozen=True)
class Step:
    """Exposure at one step of training.

    Attributes:
        bins: [G] exposure share of each popularity bin.
        entropy: of exposure over items, nats.
        kl_base, kl_data: of the mean catalogue distribution to the base's and to the data's, nats.
        favoured: [U] share of each user's list places on the base's favourites.
        popular: [U] share of each user's list places on the most popular bin.
    """

    bins: np.ndarray
    entropy: float
    kl_base: float
    kl_data: float
    favoured: np.ndarray
    popular: np.ndarray


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """sum p log(p / q), nats; q > 0."""
    keep = p > 0
    return float((p[keep] * np.log(p[keep] / q[keep])).sum())


def favourites(base_scores: np.ndarray) -> np.ndarray:
    """Bool [I]: the tenth of the catalogue with the largest mean probability under the base."""
    mean = probabilities(base_scores).mean(axis=0)
    chosen = np.zeros(len(mean), dtype=bool)
    chosen[np.argsort(-mean, kind="stable")[: max(1, len(mean) // 10)]] = True
    return chosen


def measure_step(
    scores: np.ndarray, base_mean: np.ndarray, data: np.ndarray, membership: np.ndarray, favoured: np.ndarray
) -> Step:
    """What one step shows.

    Args:
        scores: [U, I] log-probabilities.
        base_mean: [I] mean probabilities under the base.
        data: [I] smoothed train popularity, sums to one.
        membership: [I, G] popularity bin of each item.
        favoured: bool [I].
    """
    num_items = scores.shape[1]
    lists = top_lists(scores, min(K, num_items - 1))
    counts = exposure(lists, num_items)
    mean = probabilities(scores).mean(axis=0)
    return Step(
        bins=(counts @ membership) / counts.sum(),
        entropy=entropy(counts),
        kl_base=kl(mean, base_mean),
        kl_data=kl(mean, data),
        favoured=favoured[lists].mean(axis=1),
        popular=membership[lists, 0].mean(axis=1),
    )


def measure_change(
    first: np.ndarray, last: np.ndarray, num_bootstrap: int, seed: int
) -> tuple[Estimate, float, np.ndarray]:
    """Per-user shares [U] at both ends of training -> difference, two-sided p of sign flips, null values."""
    difference = last - first
    rng = np.random.default_rng(seed)
    null = np.empty(PERMUTATIONS)
    for draw in range(PERMUTATIONS):
        null[draw] = (difference * rng.choice([-1, 1], size=len(difference))).mean()
    effect = bootstrap(difference, num=num_bootstrap, seed=seed)
    return effect, permutation_p(abs(difference.mean()), np.abs(null)), null


def score_steps(context: AuditContext, samples) -> list[tuple[int, np.ndarray]]:
    """(step, scores [U, I]) of the base model and of every chosen checkpoint."""
    histories = [sample.history for sample in samples]
    return [(step, at_step.scores(histories, f"step {step}")) for step, at_step in walk(context)]


def run(context: AuditContext) -> dict:
    options = context.options
    scored = score_steps(context, context.users(DEFAULT_USERS))
    popularity = context.popularity
    bins = popularity_bins(popularity, [entry.item_id for entry in context.catalogue.entries], BINS)
    membership = bins.membership.toarray()
    data = (popularity + 1) / (popularity + 1).sum()
    _, base_scores = scored[0]
    base_mean = probabilities(base_scores).mean(axis=0)
    favoured = favourites(base_scores)
    found = {step: measure_step(scores, base_mean, data, membership, favoured) for step, scores in scored}
    first = found[0]
    last_step = max(found)
    last = found[last_step]
    effect, p, null = measure_change(first.favoured, last.favoured, options.num_bootstrap, options.seed)
    popular = bootstrap(last.popular - first.popular, num=options.num_bootstrap, seed=options.seed)
    shown = "" if p <= 0.05 else ", not shown"
    finding = (
        f"From the base model to step {last_step} the share of list places on the base's top-decile items "
        f"changes by {effect.text()} (p = {p:.2g}{shown}; {effect.n} users), "
        f"that on the most popular fifth of items by {popular.text()}; "
        f"entropy goes from {first.entropy:.2f} to {last.entropy:.2f} nats, "
        f"KL to the data from {first.kl_data:.2f} to {last.kl_data:.2f}."
    )
    return result(
        finding=finding,
        effect=effect,
        effect_name="change of the share on the base's top decile",
        better=None,
        speaks=p <= 0.05 and not effect.spans_null,
        control=f"step labels permuted within users: change {null.mean():.3g} "
        f"(95 % within {np.quantile(np.abs(null), 0.95):.3g})",
        measures={"change on the base's top decile": effect, "change on the most popular fifth": popular},
        table=table(found, bins.names),
        figures=[exposure_figure(found, bins.names), distance_figure(found, entropy(data))],
    )


def table(found: dict[int, Step], bin_names: tuple[str, ...]) -> dict:
    """One row per step."""
    columns = ["step", "share on the base's top decile", "entropy", "KL to base", "KL to data"]
    columns += [f"popularity bin {name}" for name in bin_names]
    rows = [
        [step, float(s.favoured.mean()), s.entropy, s.kl_base, s.kl_data, *s.bins]
        for step, s in found.items()
    ]
    return {"columns": columns, "rows": rows}


def exposure_figure(found: dict[int, Step], bin_names: tuple[str, ...]) -> dict:
    return {
        "kind": "stacked_area",
        "title": "Exposure by popularity bin along training",
        "x": list(found),
        "x_label": "optimizer step",
        "percent": True,
        "ordered": True,
        "caption": "A band that grows is amplified; step 0 is the base model.",
        "series": [
            {"name": name, "y": [step.bins[g] for step in found.values()]} for g, name in enumerate(bin_names)
        ],
    }


def distance_figure(found: dict[int, Step], entropy_of_data: float) -> dict:
    lines = {
        "entropy of lists": [step.entropy for step in found.values()],
        "KL to base": [step.kl_base for step in found.values()],
        "KL to data": [step.kl_data for step in found.values()],
    }
    return {
        "kind": "line",
        "title": "Distance to base and data",
        "x_label": "optimizer step",
        "y_label": "nats",
        "caption": "A falling curve to the data is learning; "
        "entropy that falls below the data's is concentration.",
        "reference": {"value": entropy_of_data, "label": "entropy of the data"},
        "series": [{"name": name, "x": list(found), "y": values} for name, values in lines.items()],
    }


def cost(context: AuditContext) -> Cost:
    return Cost(scorings=context.num_users(DEFAULT_USERS) * (1 + len(chosen_steps(context))))


AUDIT = Audit(
    title="Amplification during training",
    question="Does exposure move towards popular items, or towards the base model's favourites, "
    "as training goes on?",
    run=run,
    cost=cost,
    order=40,
    lacks=lacks_checkpoints,
)
