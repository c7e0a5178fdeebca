"""Audit `provider`: do the lists favour some providers (brand, director, publisher) beyond what users chose?

    D = sum over providers |exposure share - interaction share|

Exposure is discounted by 1 / log2(position + 1), in the top 10. Control: provider labels permuted over the
items, which keeps each item's exposure and popularity: what D such lists have for any labels of this kind.
The p-value is the share of permutations with at least the observed D.

Shapes: U users, I catalogue entries, P providers.
"""

from __future__ import annotations

import numpy as np

from eval.audit.base import Audit, Lack, matrix_cost, result
from eval.audit.context import AuditContext
from eval.audit.estimates import Estimate, bootstrap, permutation_p
from eval.audit.score_rows import top_lists

DEFAULT_USERS = 64
K = 10
PERMUTATIONS = 200
MOST_RESAMPLES = 300
SHOWN = 12  # providers in the table
DISTANCE = "L1 to interaction share"
EXCESS = "excess over permuted labels"


def discounted(lists: np.ndarray, num_items: int) -> np.ndarray:
    """[U, k] lists -> [U, I] exposure; rows sum to one."""
    weights = 1 / np.log2(np.arange(lists.shape[1]) + 2)
    rows = np.zeros((len(lists), num_items))
    np.put_along_axis(rows, lists, np.broadcast_to(weights / weights.sum(), lists.shape), axis=1)
    return rows


def sums(values: np.ndarray, provider_of: np.ndarray, num: int) -> np.ndarray:
    """Item values [I] -> sums per provider [P]; items without a provider (-1) are left out."""
    known = provider_of >= 0
    return np.bincount(provider_of[known], weights=values[known], minlength=num)


def shares(values: np.ndarray, provider_of: np.ndarray, num: int) -> np.ndarray:
    """Item values [I] -> shares per provider [P]; items without a provider are left out."""
    of_provider = sums(values, provider_of, num)
    total = of_provider.sum()
    return of_provider / total if total > 0 else of_provider


def measure(
    rows: np.ndarray,
    popularity: np.ndarray,
    provider_of: np.ndarray,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Estimate], float, np.ndarray]:
    """Exposure rows [U, I], train counts [I], provider of each item [I] -> estimates, p, null values of D."""
    num = int(provider_of.max()) + 1
    by_provider = np.stack([sums(row, provider_of, num) for row in rows])
    reference = shares(popularity, provider_of, num)
    catalogue = shares(np.ones(len(popularity)), provider_of, num)

    def statistic(sample: np.ndarray) -> np.ndarray:
        mean = sample.mean(axis=0)
        mean = mean / max(mean.sum(), 1e-12)
        return np.array([np.abs(mean - reference).sum(), np.abs(mean - catalogue).sum()])

    resamples = min(MOST_RESAMPLES, num_bootstrap)
    interactions, items = bootstrap(
        by_provider, statistic, null=None, num=resamples, seed=seed, bounds=(0, 2)
    )
    rng = np.random.default_rng(seed)
    mean = rows.mean(axis=0)
    null = np.empty(PERMUTATIONS)
    for draw in range(PERMUTATIONS):
        shuffled = rng.permutation(provider_of)
        null[draw] = np.abs(shares(mean, shuffled, num) - shares(popularity, shuffled, num)).sum()
    found = {
        DISTANCE: interactions,
        "L1 to catalogue share": items,
        EXCESS: interactions.minus(null.mean()),
    }
    return found, permutation_p(interactions.value, null), null


def run(context: AuditContext) -> dict:
    options = context.options
    providers = [entry.provider for entry in context.catalogue.entries]
    names = sorted({str(provider) for provider in providers if provider})
    index = {name: i for i, name in enumerate(names)}
    provider_of = np.array([index[str(provider)] if provider else -1 for provider in providers])
    _, scores = context.matrix(DEFAULT_USERS)
    num_items = scores.shape[1]
    popularity = context.popularity
    rows = discounted(top_lists(scores, min(K, num_items)), num_items)
    found, p, null = measure(rows, popularity, provider_of, options.num_bootstrap, options.seed)
    shown = shares(rows.mean(axis=0), provider_of, len(names))
    chosen = shares(popularity, provider_of, len(names))
    order = np.argsort(-np.abs(shown - chosen))[:SHOWN]
    excess = found[EXCESS]
    speaks = p <= 0.05 and not excess.spans_null
    verdict = "providers matter" if speaks else "not shown to be more than items explain"
    farthest = order[0]
    finding = (
        f"Provider exposure differs from interaction shares by {found[DISTANCE].text()} (L1) "
        f"over {len(names)} providers, {excess.text()} more than with permuted provider labels "
        f"(p = {p:.2g}: {verdict}); farthest: {names[farthest]}, {shown[farthest]:.1%} of exposure "
        f"against {chosen[farthest]:.1%} of choices."
    )
    return result(
        finding=finding,
        control=f"provider labels permuted over items: L1 {null.mean():.3g} "
        f"(95 % below {np.quantile(null, 0.95):.3g})",
        effect=excess,
        effect_name="L1 to interaction share beyond permuted labels",
        speaks=speaks,
        measures=found,
        table={
            "columns": ["provider", "exposure", "share of choices"],
            "rows": [[names[i], shown[i], chosen[i]] for i in order],
        },
        figures=[figure([names[i] for i in order], shown[order], chosen[order])],
    )


def figure(names: list[str], shown: np.ndarray, chosen: np.ndarray) -> dict:
    return {
        "kind": "bar",
        "title": "Providers farthest from their share",
        "horizontal": True,
        "percent": True,
        "categories": names,
        "caption": "A provider is favoured where exposure is above its share of the choices.",
        "series": [
            {"name": "exposure", "values": shown},
            {"name": "share of train interactions", "values": chosen},
        ],
    }


def lacks(context: AuditContext) -> Lack:
    known = {entry.provider for entry in context.catalogue.entries if entry.provider}
    if len(known) > 1:
        return None
    return "the catalogue names no providers", "give the item table a provider column"


AUDIT = Audit(
    title="Provider skew",
    question="Do the lists favour some providers beyond the share that users chose?",
    run=run,
    cost=matrix_cost(DEFAULT_USERS),
    order=21,
    lacks=lacks,
)
