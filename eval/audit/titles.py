"""Audit `titles`: the same titles everywhere? How much of all exposure the most shown items take, against their part in the data.

    excess = share of exposure of the 20 most shown items  -  share of train interactions of the 20 most chosen items
Lists are the top 10 of every user. Control: lists of the same number and length drawn from train popularity without replacement
(what a recommender as concentrated as the data would show to these few users); p over such draws.
With --runs: Jaccard of the top-20 sets of titles between evaluated runs, also on different data sets, beside that of the data's own top-20.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from eval.audit.context import Audit, AuditContext, Cost, result
from eval.audit.folders import load_evaluations
from eval.audit.inference import Estimate, bootstrap, exposure, gini, permutation_p, top_lists
from eval.metrics.robustness import jaccard

TITLE = "The same titles everywhere"
QUESTION = "Do a few titles take more of the exposure than of the choices, and are they the same for other data and models?"
DEFAULT_USERS, K, TOP, DRAWS, SHOWN = 64, 10, 20, 200, 10


def top_share(counts: np.ndarray, top: int = TOP) -> float:
    """Share of the sum that the `top` largest take."""
    return float(np.sort(counts)[-top:].sum() / max(counts.sum(), 1e-12))


def drawn_lists(popularity: np.ndarray, users: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """[users, k] lists without repeats, items drawn in proportion to popularity + 1 (Gumbel top-k)."""
    return np.argsort(-(np.log(popularity + 1) + rng.gumbel(size=(users, len(popularity)))), axis=1)[:, :k]


def measure(
    lists: np.ndarray, popularity: np.ndarray, num_bootstrap: int = 300, seed: int = 0
) -> tuple[dict[str, Estimate], float, np.ndarray]:
    """Lists [U, k] -> estimates, p, shares of the drawn lists [DRAWS]."""
    num_items, top = len(popularity), min(TOP, max(1, len(popularity) // 5))
    data = top_share(popularity, top)
    rng = np.random.default_rng(seed)
    null = np.array(
        [
            top_share(exposure(drawn_lists(popularity, *lists.shape, rng), num_items), top)
            for _ in range(DRAWS)
        ]
    )

    def statistic(rows: np.ndarray) -> np.ndarray:
        counts = exposure(rows.astype(int), num_items)
        return np.array([top_share(counts, top), gini(counts)])

    share, inequality = bootstrap(lists, statistic, null=None, num=min(300, num_bootstrap), seed=seed)
    shift = lambda e, by: Estimate(e.value - by, e.low - by, e.high - by, e.n, 0.0)  # noqa: E731
    return (
        {
            "exposure share of the most shown": share,
            "Gini of exposure": inequality,
            "exposure share - data share": shift(share, data),
            "exposure share - popularity-drawn lists": shift(share, float(null.mean())),
        },
        permutation_p(share.value, null),
        null,
    )


def top_titles(texts: list[str], values: np.ndarray) -> list[str]:
    return [texts[i] for i in np.argsort(-values, kind="stable")[:TOP] if values[i] > 0]


def across_runs(paths) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Labels, Jaccard of shown top-20 titles [R, R], and of the data's top-20 titles [R, R]."""
    runs = load_evaluations(paths, 2)
    shown, chosen = [], []
    for run in runs:
        entries = run.catalogue()
        index = {entry["item_id"]: i for i, entry in enumerate(entries)}
        counts = Counter(item for row in run.lists() for item in row[:K])
        texts = [entry["text"] for entry in entries]
        shown.append(
            top_titles(texts, np.array([counts[entry["item_id"]] for entry in entries], dtype=float))
        )
        chosen.append(top_titles(texts, np.array([entry["train_count"] for entry in entries], dtype=float)))
        assert set(counts) <= set(index), f"{run.folder}: lists name items outside their catalogue"
    pairs = lambda sets: np.array([[jaccard(a, b) for b in sets] for a in sets])  # noqa: E731
    return [run.label for run in runs], pairs(shown), pairs(chosen)


def run(context: AuditContext) -> dict:
    options, popularity = context.options, context.popularity
    _, scores = context.matrix(DEFAULT_USERS)
    lists = top_lists(scores, min(K, scores.shape[1] - 1))
    found, p, null = measure(lists, popularity, options.num_bootstrap, options.seed)
    counts, texts = exposure(lists, scores.shape[1]), [e.text for e in context.catalogue.entries]
    order = np.argsort(-counts, kind="stable")[:SHOWN]
    effect, share = (
        found["exposure share - popularity-drawn lists"],
        found["exposure share of the most shown"],
    )
    top = min(TOP, max(1, len(popularity) // 5))
    speaks = p <= 0.05 and not effect.spans_null
    finding = (
        f"The {top} most shown titles take {share.text()} of the exposure, {effect.text()} more than lists drawn from train popularity "
        f"(p = {p:.2g}: {'a few titles are everywhere' if speaks else 'no more concentrated than the data'}); the {top} most "
        f"chosen have {top_share(popularity, top):.3g} of the choices."
    )
    figures = [
        {
            "kind": "bar",
            "title": "The most shown titles",
            "horizontal": True,
            "percent": True,
            "categories": [texts[i] for i in order],
            "caption": "Exposure far above a title's share of the choices is concentration that the data do not ask for.",
            "series": [
                {"name": "share of list places", "values": counts[order] / counts.sum()},
                {
                    "name": "share of train interactions",
                    "values": popularity[order] / max(popularity.sum(), 1),
                },
            ],
        }
    ]
    extra = {}
    if len(options.runs) >= 2:
        labels, shown, chosen = across_runs(options.runs)
        above = np.triu_indices(len(labels), 1)
        finding += f" Between {len(labels)} runs the top-{TOP} sets overlap by {shown[above].mean():.2f} (Jaccard), the data's "
        f"own by {chosen[above].mean():.2f}."
        figures.append(
            {
                "kind": "heatmap",
                "title": f"Overlap of the top-{TOP} titles between runs",
                "rows": labels,
                "columns": labels,
                "values": shown.round(2).tolist(),
                "caption": f"Jaccard of the most shown titles; the data sets' own most chosen titles overlap by "
                f"{chosen[above].mean():.2f} on average.",
            }
        )
        extra = {"jaccard_shown": shown.tolist(), "jaccard_data": chosen.tolist()}
    rows = [[texts[i], counts[i] / counts.sum(), popularity[i] / max(popularity.sum(), 1)] for i in order]
    return result(
        TITLE,
        QUESTION,
        finding=finding,
        effect=effect,
        effect_name="exposure share of the most shown beyond popularity-drawn lists",
        speaks=speaks,
        control=f"lists drawn from train popularity: {null.mean():.3g} (95 % below {np.quantile(null, 0.95):.3g})",
        measures=found,
        table={"columns": ["title", "share of list places", "share of train interactions"], "rows": rows},
        figures=figures,
        **extra,
    )


AUDIT = Audit("titles", TITLE, QUESTION, run, lambda context: Cost(scorings=context.unscored(DEFAULT_USERS)))
