"""Audit `amplification`: does training make a bias grow? Exposure along the run's checkpoints, step 0 being the base model.

Per step, over the users' top-10 lists: exposure share of five popularity groups, entropy of exposure, KL of the mean catalogue
distribution to the base's and to the (smoothed) train popularity, and the share of exposure on the base's top-decile items (by its mean
probability). The effect is that last share at the last step minus step 0. Control: step labels of first and last permuted within
users, which makes the difference zero on average. Keep checkpoints with train.save_every and train.keep_checkpoints.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from eval.audit.checkpoint_weights import adapter_weights, checkpoint_folders, set_adapter
from eval.audit.context import Audit, AuditContext, Cost, result
from eval.audit.inference import (
    Estimate,
    bootstrap,
    entropy,
    exposure,
    permutation_p,
    probabilities,
    top_lists,
)
from eval.metrics.inputs import popularity_groups
from gdrt_ds.inference.prompt_reader import PromptReader

TITLE = "Amplification during training"
QUESTION = (
    "Does exposure move towards popular items, or towards the base model's favourites, as training goes on?"
)
DEFAULT_USERS, K, MAX_STEPS, GROUPS, PERMUTATIONS = 16, 10, 6, 5, 200


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """sum p log(p / q), nats; q > 0."""
    keep = p > 0
    return float((p[keep] * np.log(p[keep] / q[keep])).sum())


def favourites(base_scores: np.ndarray) -> np.ndarray:
    """Bool[I]: the tenth of the catalogue with the largest mean probability under the base."""
    mean = probabilities(base_scores).mean(axis=0)
    chosen = np.zeros(len(mean), dtype=bool)
    chosen[np.argsort(-mean, kind="stable")[: max(1, len(mean) // 10)]] = True
    return chosen


def measure_step(
    scores: np.ndarray, base_mean: np.ndarray, data: np.ndarray, membership: np.ndarray, favoured: np.ndarray
) -> dict:
    """Scores [U, I] of one step -> group shares [G], entropy, KL to base and data, and per-user share on the base's favourites [U]."""
    lists = top_lists(scores, min(K, scores.shape[1] - 1))
    counts, mean = exposure(lists, scores.shape[1]), probabilities(scores).mean(axis=0)
    return {
        "groups": (counts @ membership) / counts.sum(),
        "entropy": entropy(counts),
        "kl_base": kl(mean, base_mean),
        "kl_data": kl(mean, data),
        "favoured": favoured[lists].mean(axis=1),
    }


def measure_change(
    first: np.ndarray, last: np.ndarray, num_bootstrap: int, seed: int
) -> tuple[Estimate, float, np.ndarray]:
    """Per-user shares at the first and last step -> difference, two-sided p of sign flips, null values."""
    difference, rng = last - first, np.random.default_rng(seed)
    null = np.array(
        [(difference * rng.choice([-1, 1], size=len(difference))).mean() for _ in range(PERMUTATIONS)]
    )
    return (
        bootstrap(difference, num=num_bootstrap, seed=seed),
        permutation_p(abs(difference.mean()), np.abs(null)),
        null,
    )


def chosen_steps(context: AuditContext) -> list:
    """At most MAX_STEPS checkpoints, evenly spread, always with the first and the last."""
    found = checkpoint_folders(context.subject.run) if context.subject.run is not None else []
    if len(found) <= MAX_STEPS:
        return found
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, MAX_STEPS).round().astype(int))]


def score_steps(context: AuditContext, samples) -> list[tuple[int, np.ndarray]]:
    """(step, scores [U, I]) of the base model and of every chosen checkpoint."""
    histories = [s.history for s in samples]
    steps = [(0, context.base().scores(histories, "base model"))]
    recommender = context.variant(context.recommender.adapter, merge=False)
    walker = AuditContext(replace(context.subject, recommender=recommender), context.runtime, context.options)
    for step, folder in chosen_steps(context):
        set_adapter(recommender.loaded.model, adapter_weights(folder))
        recommender.reader = PromptReader(recommender.loaded.model, recommender.encoder.head_ids)
        walker.forget()
        steps.append((step, walker.scores(histories, f"step {step}")))
    return steps


def run(context: AuditContext) -> dict:
    options, samples = context.options, context.users(DEFAULT_USERS)
    steps = score_steps(context, samples)
    popularity = context.popularity
    grouping = popularity_groups(popularity, [e.item_id for e in context.catalogue.entries], GROUPS)
    membership, data = grouping.membership.toarray(), (popularity + 1) / (popularity + 1).sum()
    base_mean, favoured = probabilities(steps[0][1]).mean(axis=0), favourites(steps[0][1])
    found = [(step, measure_step(scores, base_mean, data, membership, favoured)) for step, scores in steps]
    effect, p, null = measure_change(
        found[0][1]["favoured"], found[-1][1]["favoured"], options.num_bootstrap, options.seed
    )
    popular = bootstrap(
        np.array([membership[row, 0].mean() for row in top_lists(steps[-1][1], min(K, len(data) - 1))])
        - np.array([membership[row, 0].mean() for row in top_lists(steps[0][1], min(K, len(data) - 1))]),
        num=options.num_bootstrap,
        seed=options.seed,
    )
    last = found[-1][1]
    finding = (
        f"From the base model to step {found[-1][0]} the share of list places on the base's top-decile items changes by "
        f"{effect.text()} (p = {p:.2g}{'' if p <= 0.05 else ', not shown'}; "
        f"{effect.n} users), that on the most popular fifth of items by {popular.text()}; entropy goes from "
        f"{found[0][1]['entropy']:.2f} to {last['entropy']:.2f} nats, "
        f"KL to the data from {found[0][1]['kl_data']:.2f} to {last['kl_data']:.2f}."
    )
    x = [step for step, _ in found]
    figures = [
        {
            "kind": "stacked_area",
            "title": "Exposure by popularity group along training",
            "x": x,
            "x_label": "optimizer step",
            "percent": True,
            "ordered": True,
            "caption": "A band that grows is amplified; step 0 is the base model.",
            "series": [
                {"name": name, "y": [f["groups"][g] for _, f in found]}
                for g, name in enumerate(grouping.names)
            ],
        },
        {
            "kind": "line",
            "title": "Distance to base and data",
            "x_label": "optimizer step",
            "y_label": "nats",
            "caption": "A falling curve to the data is learning; entropy that falls below the data's is concentration.",
            "reference": {"value": entropy(data), "label": "entropy of the data"},
            "series": [
                {"name": name, "x": x, "y": [f[key] for _, f in found]}
                for name, key in (
                    ("entropy of lists", "entropy"),
                    ("KL to base", "kl_base"),
                    ("KL to data", "kl_data"),
                )
            ],
        },
    ]
    rows = [
        [step, float(f["favoured"].mean()), f["entropy"], f["kl_base"], f["kl_data"], *f["groups"]]
        for step, f in found
    ]
    return result(
        TITLE,
        QUESTION,
        finding=finding,
        effect=effect,
        effect_name="change of the share on the base's top decile",
        better=None,
        speaks=p <= 0.05 and not effect.spans_null,
        control=f"step labels permuted within users: change {null.mean():.3g} (95 % within {np.quantile(np.abs(null), 0.95):.3g})",
        measures={"change on the base's top decile": effect, "change on the most popular fifth": popular},
        table={
            "columns": [
                "step",
                "share on the base's top decile",
                "entropy",
                "KL to base",
                "KL to data",
                *(f"popularity group {n}" for n in grouping.names),
            ],
            "rows": rows,
        },
        figures=figures,
    )


def lacks(context: AuditContext) -> tuple[str, str] | None:
    if context.subject.run is None or not context.has_adapter:
        return "it follows the checkpoints of a run with an adapter", "give --run RUN_DIR without --base"
    if not chosen_steps(context):
        return (
            f"{context.subject.run} holds no checkpoint",
            "train with train.save_every and a large train.keep_checkpoints",
        )
    return None


AUDIT = Audit(
    "amplification",
    TITLE,
    QUESTION,
    run,
    lambda context: Cost(scorings=context.num_users(DEFAULT_USERS) * (1 + len(chosen_steps(context)))),
    lacks,
)
