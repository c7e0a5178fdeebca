"""Audit `pretraining`: does the recommender show what the language model knew before any user was seen?

    log e_i = b1 * prior_i + b2 * log(n_i + 1) + rest          (all standardised over items)
e_i exposure of item i = mean over users of P(i | history), the exact catalogue probability; prior_i log-probability of the title under
a content-free prompt (base model, whole vocabulary); n_i train interactions. b1 with partial R^2 is what pretraining adds beyond
what the data say. Items are the units of the bootstrap. Control: the same regression with the prior of a randomly initialised model of
the same architecture and tokenizer (it knows the titles' lengths and nothing else), and with the prior permuted over items.
"""

from __future__ import annotations

import numpy as np

from eval.audit.context import Audit, AuditContext, Cost, result
from eval.audit.inference import (
    Estimate,
    bootstrap,
    exposure,
    least_squares,
    probabilities,
    spearman,
    top_lists,
)
from eval.audit.title_prior import content_free_prompt, title_tokens

TITLE = "Pretraining popularity"
QUESTION = "Does exposure follow what the base model thinks of a title, beyond its popularity in the data?"
DEFAULT_USERS = 64
NAMES, MAIN = ("prior", "popularity"), "base prior"


def measure(
    log_exposure: np.ndarray,
    prior: np.ndarray,
    popularity: np.ndarray,
    num_bootstrap: int = 1000,
    seed: int = 0,
    extra: np.ndarray | None = None,
) -> dict[str, Estimate]:
    """Regression of log exposure [I] on prior [I] and log(popularity + 1) [I] (and another column): betas, partial R^2, Spearman."""
    columns = [prior, np.log1p(popularity)] + ([extra] if extra is not None else [])

    def statistic(rows: np.ndarray) -> np.ndarray:
        betas, partial, _ = least_squares(rows[:, 1:], rows[:, 0])
        return np.array(
            [*betas[:2], *partial[:2], spearman(rows[:, 1], rows[:, 2]), spearman(rows[:, 1], rows[:, 0])]
        )

    found = bootstrap(np.stack([log_exposure, *columns], axis=1), statistic, num=num_bootstrap, seed=seed)
    return dict(
        zip(
            (
                "beta: prior",
                "beta: popularity",
                "partial R2: prior",
                "partial R2: popularity",
                "Spearman: prior and popularity",
                "Spearman: prior and exposure",
            ),
            found,
        )
    )


def run(context: AuditContext) -> dict:
    options, popularity = context.options, context.popularity
    _, scores = context.matrix(DEFAULT_USERS)
    soft = np.log(probabilities(scores).mean(axis=0))
    listed = np.log1p(exposure(top_lists(scores, min(10, scores.shape[1])), scores.shape[1]))
    prior, random_prior = context.title_log_probs("base"), context.title_log_probs("random")
    length = np.array([len(t) for t in title_tokens(context)], dtype=float)
    permuted = np.random.default_rng(options.seed).permutation(prior)
    settings = {"num_bootstrap": min(500, options.num_bootstrap), "seed": options.seed}
    rows = {
        MAIN: measure(soft, prior, popularity, **settings),
        "base prior, length held": measure(soft, prior, popularity, extra=length, **settings),
        "base prior, top-10 counts": measure(listed, prior, popularity, **settings),
        "control: random model": measure(soft, random_prior, popularity, **settings),
        "control: permuted prior": measure(soft, permuted, popularity, **settings),
    }
    mine, control = rows[MAIN], rows["control: random model"]
    effect = mine["beta: prior"]
    held = rows["base prior, length held"]["beta: prior"]
    finding = (
        f"One standard deviation of the base model's title log-probability moves log exposure by {effect.text()} standard "
        f"deviations beyond popularity "
        f"(partial R^2 {mine['partial R2: prior'].value:.2g}; popularity {mine['beta: popularity'].text()}, {effect.n} items); "
        f"with title length held {held.text()}."
    )
    kinds = list(rows)
    figure = {
        "kind": "bar",
        "title": "What exposure follows",
        "horizontal": True,
        "y_label": "standardised beta",
        "categories": kinds,
        "caption": "Bars of the prior away from zero are popularity that came with pretraining; the controls know no titles.",
        "series": [
            {
                "name": name,
                "values": [rows[k][f"beta: {name}"].value for k in kinds],
                "low": [rows[k][f"beta: {name}"].low for k in kinds],
                "high": [rows[k][f"beta: {name}"].high for k in kinds],
            }
            for name in NAMES
        ],
    }
    columns = [
        "regression",
        "beta of prior",
        "low",
        "high",
        "beta of popularity",
        "low",
        "high",
        "partial R2 of prior",
        "partial R2 of popularity",
        "Spearman prior-popularity",
    ]
    table = [
        [
            k,
            r["beta: prior"].value,
            r["beta: prior"].low,
            r["beta: prior"].high,
            r["beta: popularity"].value,
            r["beta: popularity"].low,
            r["beta: popularity"].high,
            r["partial R2: prior"].value,
            r["partial R2: popularity"].value,
            r["Spearman: prior and popularity"].value,
        ]
        for k, r in rows.items()
    ]
    text = (
        f"a randomly initialised model's prior: beta {control['beta: prior'].text()}, Spearman with popularity "
        f"{control['Spearman: prior and popularity'].value:.2f} "
        f"(base model {mine['Spearman: prior and popularity'].text()}); permuted over items: {rows[kinds[-1]]['beta: prior'].text()}"
    )
    return result(
        TITLE,
        QUESTION,
        finding=finding,
        control=text,
        effect=effect,
        effect_name="standardised beta of the base model's prior",
        speaks=not effect.spans_null and not held.spans_null,
        measures=mine,
        table={"columns": columns, "rows": table},
        figures=[figure],
    )


def cost(context: AuditContext) -> Cost:
    titles = sum(len(t) for t in title_tokens(context)) + len(context.catalogue) * len(
        content_free_prompt(context)
    )
    return Cost(scorings=context.unscored(DEFAULT_USERS), tokens=2 * titles)


AUDIT = Audit("pretraining", TITLE, QUESTION, run, cost)
