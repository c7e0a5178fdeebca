"""An audit in one file: does the model recommend what the user already has?

Put the file into eval/audit/model/. The audit is called like the file:
`python -m eval.run --run RUN_DIR --audit repetition`.
Control: the lists of other users, in which a user's own items stand by chance.

Shapes: U users, I catalogue entries, k length of the lists.
"""

import numpy as np

from eval.audit.base import Audit, estimate_series, estimate_table, matrix_cost, result
from eval.audit.context import AuditContext
from eval.audit.estimates import Estimate, bootstrap
from eval.audit.score_rows import top_lists

DEFAULT_USERS = 64
K = 10


def measure(
    lists: np.ndarray, seen: np.ndarray, num_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Entry indices of the lists [U, k], seen items bool [U, I] -> shares of the lists."""
    own = np.take_along_axis(seen, lists, axis=1).mean(axis=1)
    other = np.take_along_axis(np.roll(seen, 1, axis=0), lists, axis=1).mean(axis=1)
    settings = {"num": num_bootstrap, "seed": seed}
    return {
        "own items": bootstrap(own, null=None, **settings),
        "another user's items": bootstrap(other, null=None, **settings),
        "own - another user's": bootstrap(own - other, null=0.0, **settings),
    }


def run(context: AuditContext) -> dict:
    samples, scores = context.matrix(DEFAULT_USERS)
    seen = np.zeros(scores.shape, dtype=bool)
    for row, sample in enumerate(samples):
        seen[row, [context.catalogue.index_of[item] for item in sample.history]] = True
    lists = top_lists(scores, min(K, scores.shape[1]))
    found = measure(lists, seen, context.options.num_bootstrap, context.options.seed)
    effect = found["own - another user's"]
    bars = list(found)[:2]
    return result(
        finding=f"{found['own items'].value:.0%} of a user's list are items of the own history, "
        f"{effect.text()} more than of another user's, over {effect.n} users.",
        control=f"another user's items: {found[bars[1]].text()} of the list",
        effect=effect,
        effect_name="share of the list from the own history, beyond another user's",
        better="lower",
        speaks=effect.low > 0,
        measures=found,
        table=estimate_table(found),
        figures=[
            {
                "kind": "bar",
                "title": "Items of the history in the list",
                "percent": True,
                "legend": False,
                "categories": bars,
                "caption": "A first bar above the second is a model that repeats what the user already has.",
                "series": [estimate_series("share of the list", [found[bar] for bar in bars])],
            }
        ],
    )


AUDIT = Audit(
    title="Repetition",
    question="Does the model recommend what the user already has?",
    run=run,
    cost=matrix_cost(DEFAULT_USERS),
)
