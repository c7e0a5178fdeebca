"""Audit `provider`: do the lists favour some providers (brand, director, publisher) beyond what users chose?

    D = sum over providers |exposure share - interaction share|        exposure discounted by 1 / log2(position + 1), top 10
Control: provider labels permuted over the items (which keeps each item's exposure and popularity): what D such lists have for
any grouping of this kind. The p-value is the share of permutations with at least the observed D.
"""

from __future__ import annotations

import numpy as np

from eval.audit.context import Audit, AuditContext, Cost, result
from eval.audit.inference import Estimate, bootstrap, permutation_p, top_lists

TITLE = "Provider skew"
QUESTION = "Do the lists favour some providers beyond the share that users chose?"
DEFAULT_USERS, K, PERMUTATIONS, SHOWN = 64, 10, 200, 12


def discounted(lists: np.ndarray, num_items: int) -> np.ndarray:
    """[U, k] lists -> [U, I] exposure, rows sum to one."""
    weights = 1 / np.log2(np.arange(lists.shape[1]) + 2)
    rows = np.zeros((len(lists), num_items))
    np.put_along_axis(rows, lists, np.broadcast_to(weights / weights.sum(), lists.shape), axis=1)
    return rows


def shares(values: np.ndarray, provider_of: np.ndarray, num: int) -> np.ndarray:
    """Item values [I] -> shares per provider [P]; items without provider (-1) are left out."""
    known = provider_of >= 0
    sums = np.bincount(provider_of[known], weights=values[known], minlength=num)
    return sums / sums.sum() if sums.sum() > 0 else sums


def measure(
    rows: np.ndarray,
    popularity: np.ndarray,
    provider_of: np.ndarray,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Estimate], float, np.ndarray]:
    """Exposure rows [U, I] -> estimates, permutation p, null values of D [PERMUTATIONS]."""
    num = int(provider_of.max()) + 1
    by_provider = np.stack(
        [
            np.bincount(provider_of[provider_of >= 0], weights=row[provider_of >= 0], minlength=num)
            for row in rows
        ]
    )
    reference, catalogue = (
        shares(popularity, provider_of, num),
        shares(np.ones(len(popularity)), provider_of, num),
    )

    def statistic(sample: np.ndarray) -> np.ndarray:
        mean = sample.mean(axis=0)
        mean = mean / max(mean.sum(), 1e-12)
        return np.array([np.abs(mean - reference).sum(), np.abs(mean - catalogue).sum()])

    interactions, items = bootstrap(by_provider, statistic, null=None, num=min(300, num_bootstrap), seed=seed)
    rng, mean = np.random.default_rng(seed), rows.mean(axis=0)
    null = []
    for _ in range(PERMUTATIONS):
        shuffled = rng.permutation(provider_of)
        null.append(np.abs(shares(mean, shuffled, num) - shares(popularity, shuffled, num)).sum())
    null = np.array(null)
    excess = Estimate(
        interactions.value - null.mean(),
        interactions.low - null.mean(),
        interactions.high - null.mean(),
        interactions.n,
        0.0,
    )
    return (
        {
            "L1 to interaction share": interactions,
            "L1 to catalogue share": items,
            "excess over permuted labels": excess,
        },
        permutation_p(interactions.value, null),
        null,
    )


def run(context: AuditContext) -> dict:
    entries, options = context.catalogue.entries, context.options
    names = sorted({str(e.provider) for e in entries if e.provider})
    provider_of = np.array([names.index(str(e.provider)) if e.provider else -1 for e in entries])
    _, scores = context.matrix(DEFAULT_USERS)
    rows, popularity = (
        discounted(top_lists(scores, min(K, scores.shape[1])), scores.shape[1]),
        context.popularity,
    )
    found, p, null = measure(rows, popularity, provider_of, options.num_bootstrap, options.seed)
    shown, chosen = (
        shares(rows.mean(axis=0), provider_of, len(names)),
        shares(popularity, provider_of, len(names)),
    )
    order = np.argsort(-np.abs(shown - chosen))[:SHOWN]
    excess = found["excess over permuted labels"]
    speaks = p <= 0.05 and not excess.spans_null
    finding = (
        f"Provider exposure differs from interaction shares by {found['L1 to interaction share'].text()} (L1) over {len(names)} providers, "
        f"{excess.text()} more than with permuted provider labels (p = {p:.2g}: "
        f"{'providers matter' if speaks else 'no more than items explain'}); "
        f"farthest: {names[order[0]]}, {shown[order[0]]:.1%} of exposure against {chosen[order[0]]:.1%} of choices."
    )
    figure = {
        "kind": "bar",
        "title": "Providers farthest from their share",
        "horizontal": True,
        "percent": True,
        "categories": [names[i] for i in order],
        "caption": "A provider is favoured where exposure is above its share of the choices.",
        "series": [
            {"name": "exposure", "values": shown[order]},
            {"name": "share of train interactions", "values": chosen[order]},
        ],
    }
    return result(
        TITLE,
        QUESTION,
        finding=finding,
        control=f"provider labels permuted over items: L1 {null.mean():.3g} (95 % below {np.quantile(null, 0.95):.3g})",
        effect=excess,
        effect_name="L1 to interaction share beyond permuted labels",
        speaks=speaks,
        measures=found,
        table={
            "columns": ["provider", "exposure", "share of choices"],
            "rows": [[names[i], shown[i], chosen[i]] for i in order],
        },
        figures=[figure],
    )


def lacks(context: AuditContext) -> tuple[str, str] | None:
    known = {e.provider for e in context.catalogue.entries if e.provider}
    return (
        None
        if len(known) > 1
        else ("the catalogue names no providers", "give the item table a provider column")
    )


AUDIT = Audit(
    "provider", TITLE, QUESTION, run, lambda context: Cost(scorings=context.unscored(DEFAULT_USERS)), lacks
)
