"""Audit `pretraining`: does the recommender show what the language model knew before any user was seen?

    log e_i = b1 * prior_i + b2 * log(n_i + 1) + rest          (all standardised over items)

e_i is the exposure of item i: the mean over users of P(i | history), the exact catalogue probability.
prior_i is the log-probability of the title under a content-free prompt (base model, whole vocabulary), n_i
the train interactions. b1 with its partial R^2 is what pretraining adds beyond what the data say. Items are
the units of the bootstrap. Control: the same regression with the prior of a randomly initialised model of
the same architecture and tokenizer (it knows the titles' lengths and nothing else), and with the prior
permuted over items.

Shapes: I catalogue entries.
"""

from __future__ import annotations

import numpy as np

from eval.audit.base import Audit, Cost, estimate_series, result
from eval.audit.context import AuditContext
from eval.audit.estimates import Estimate, bootstrap, least_squares, spearman
from eval.audit.score_rows import exposure, probabilities, top_lists
from eval.audit.title_prior import content_free_prompt, title_tokens

DEFAULT_USERS = 64
K = 10
MOST_RESAMPLES = 500  # each one solves several regressions
PREDICTORS = ("prior", "popularity")
MAIN = "base prior"
HELD = "base prior, length held"
RANDOM = "control: random model"
PERMUTED = "control: permuted prior"
MEASURES = (
    "beta: prior",
    "beta: popularity",
    "partial R2: prior",
    "partial R2: popularity",
    "Spearman: prior and popularity",
    "Spearman: prior and exposure",
)


def measure(
    log_exposure: np.ndarray,
    prior: np.ndarray,
    popularity: np.ndarray,
    num_bootstrap: int = 1000,
    seed: int = 0,
    extra: np.ndarray | None = None,
) -> dict[str, Estimate]:
    """Regression of log exposure [I] on prior [I] and log(popularity + 1) [I].

    Args:
        extra: another predictor [I].
    Returns:
        `MEASURES`: betas, partial R^2 and Spearman correlations.
    """
    columns = [log_exposure, prior, np.log1p(popularity)]
    if extra is not None:
        columns.append(extra)

    def statistic(rows: np.ndarray) -> np.ndarray:
        betas, partial, _ = least_squares(rows[:, 1:], rows[:, 0])
        with_popularity = spearman(rows[:, 1], rows[:, 2])
        with_exposure = spearman(rows[:, 1], rows[:, 0])
        return np.array([*betas[:2], *partial[:2], with_popularity, with_exposure])

    found = bootstrap(np.stack(columns, axis=1), statistic, num=num_bootstrap, seed=seed)
    return dict(zip(MEASURES, found))


def regressions(context: AuditContext) -> dict[str, dict[str, Estimate]]:
    """The regression in five variants, the controls last."""
    options = context.options
    popularity = context.popularity
    _, scores = context.matrix(DEFAULT_USERS)
    num_items = scores.shape[1]
    soft = np.log(probabilities(scores).mean(axis=0))
    listed = np.log1p(exposure(top_lists(scores, min(K, num_items)), num_items))
    prior = context.title_log_probs("base")
    random_prior = context.title_log_probs("random")
    length = np.array([len(title) for title in title_tokens(context)], dtype=float)
    permuted = np.random.default_rng(options.seed).permutation(prior)
    settings = {"num_bootstrap": min(MOST_RESAMPLES, options.num_bootstrap), "seed": options.seed}
    return {
        MAIN: measure(soft, prior, popularity, **settings),
        HELD: measure(soft, prior, popularity, extra=length, **settings),
        "base prior, top-10 counts": measure(listed, prior, popularity, **settings),
        RANDOM: measure(soft, random_prior, popularity, **settings),
        PERMUTED: measure(soft, permuted, popularity, **settings),
    }


def run(context: AuditContext) -> dict:
    rows = regressions(context)
    mine = rows[MAIN]
    effect = mine["beta: prior"]
    held = rows[HELD]["beta: prior"]
    finding = (
        f"One standard deviation of the base model's title log-probability moves log exposure "
        f"by {effect.text()} standard deviations beyond popularity "
        f"(partial R^2 {mine['partial R2: prior'].value:.2g}; "
        f"popularity {mine['beta: popularity'].text()}, {effect.n} items); "
        f"with title length held {held.text()}."
    )
    random = rows[RANDOM]
    control = (
        f"a randomly initialised model's prior: beta {random['beta: prior'].text()}, "
        f"Spearman with popularity {random['Spearman: prior and popularity'].value:.2f} "
        f"(base model {mine['Spearman: prior and popularity'].text()}); "
        f"permuted over items: {rows[PERMUTED]['beta: prior'].text()}"
    )
    return result(
        finding=finding,
        control=control,
        effect=effect,
        effect_name="standardised beta of the base model's prior",
        speaks=not effect.spans_null and not held.spans_null,
        measures=mine,
        table=table(rows),
        figures=[figure(rows)],
    )


def table(rows: dict[str, dict[str, Estimate]]) -> dict:
    """One row per regression."""
    columns = ["regression"]
    for predictor in PREDICTORS:
        columns += [f"beta of {predictor}", "low", "high"]
    columns += [f"partial R2 of {predictor}" for predictor in PREDICTORS]
    columns.append("Spearman prior-popularity")
    cells = []
    for name, found in rows.items():
        row: list = [name]
        for predictor in PREDICTORS:
            beta = found[f"beta: {predictor}"]
            row += [beta.value, beta.low, beta.high]
        row += [found[f"partial R2: {predictor}"].value for predictor in PREDICTORS]
        row.append(found["Spearman: prior and popularity"].value)
        cells.append(row)
    return {"columns": columns, "rows": cells}


def figure(rows: dict[str, dict[str, Estimate]]) -> dict:
    return {
        "kind": "bar",
        "title": "What exposure follows",
        "horizontal": True,
        "y_label": "standardised beta",
        "categories": list(rows),
        "caption": "Bars of the prior away from zero are popularity that came with pretraining; "
        "the controls know no titles.",
        "series": [
            estimate_series(predictor, [found[f"beta: {predictor}"] for found in rows.values()])
            for predictor in PREDICTORS
        ],
    }


def cost(context: AuditContext) -> Cost:
    titles = sum(len(title) for title in title_tokens(context))
    prompts = len(context.catalogue) * len(content_free_prompt(context))
    # Two models read every title: the base and the control.
    return Cost(scorings=context.unscored(DEFAULT_USERS), tokens=2 * (titles + prompts))


AUDIT = Audit(
    title="Pretraining popularity",
    question="Does exposure follow what the base model thinks of a title, beyond its popularity in the data?",
    run=run,
    cost=cost,
    order=13,
)
