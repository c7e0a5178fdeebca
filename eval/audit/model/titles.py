"""Audit `titles`: the same titles everywhere? The exposure of the most shown items against the data.

    excess = exposure share of the 20 most shown items  -  mean of the same share over drawn lists

(a fifth of the catalogue where it has fewer than 100 items). Lists are the top 10 of every user. Drawn lists
are the control: as many and as long, drawn from train popularity without replacement, which is what a
recommender as concentrated as the data would show to these few users; p over such draws. The share of train
interactions of the 20 most chosen items stands beside it.
With --runs: Jaccard of the top-20 sets of titles between evaluated runs, also on different data sets,
beside that of the data's own top-20.

Shapes: U users, I catalogue entries, k list length, R runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from eval.audit.base import Audit, Lack, matrix_cost, result
from eval.audit.context import AuditContext
from eval.audit.estimates import Estimate, bootstrap, permutation_p
from eval.audit.list_overlap import jaccard
from eval.audit.score_rows import exposure, gini, top_lists
from eval.folders import CATALOGUE, PREDICTIONS, Evaluation, load_evaluations

DEFAULT_USERS = 64
K = 10
TOP = 20
DRAWS = 200  # sets of lists drawn from the data
SHOWN = 10  # titles in the table
MOST_RESAMPLES = 300
SHARE = "exposure share of the most shown"
EXCESS = "exposure share - popularity-drawn lists"


def top_share(counts: np.ndarray, top: int = TOP) -> float:
    """Share of the sum that the `top` largest take."""
    return float(np.sort(counts)[-top:].sum() / max(counts.sum(), 1e-12))


def num_top(num_items: int) -> int:
    """How many items count as the most shown ones."""
    return min(TOP, max(1, num_items // 5))


def drawn_lists(popularity: np.ndarray, users: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """[users, k] lists without repeats, items drawn in proportion to popularity + 1 (Gumbel top-k)."""
    noise = rng.gumbel(size=(users, len(popularity)))
    return np.argsort(-(np.log(popularity + 1) + noise), axis=1)[:, :k]


def measure(
    lists: np.ndarray, popularity: np.ndarray, num_bootstrap: int = 300, seed: int = 0
) -> tuple[dict[str, Estimate], float, np.ndarray]:
    """Lists [U, k], train counts [I] -> estimates, p, shares of the drawn lists [DRAWS]."""
    num_items = len(popularity)
    top = num_top(num_items)
    rng = np.random.default_rng(seed)
    null = np.empty(DRAWS)
    for draw in range(DRAWS):
        drawn = drawn_lists(popularity, *lists.shape, rng)
        null[draw] = top_share(exposure(drawn, num_items), top)

    def statistic(rows: np.ndarray) -> np.ndarray:
        counts = exposure(rows.astype(int), num_items)
        return np.array([top_share(counts, top), gini(counts)])

    resamples = min(MOST_RESAMPLES, num_bootstrap)
    share, inequality = bootstrap(lists, statistic, null=None, num=resamples, seed=seed, bounds=(0, 1))
    found = {
        SHARE: share,
        "Gini of exposure": inequality,
        "exposure share - data share": share.minus(top_share(popularity, top)),
        EXCESS: share.minus(float(null.mean())),
    }
    return found, permutation_p(share.value, null), null


def top_titles(texts: list[str], values: np.ndarray) -> list[str]:
    """The titles with the largest values, at most TOP of those above zero."""
    return [texts[i] for i in np.argsort(-values, kind="stable")[:TOP] if values[i] > 0]


def overlaps(sets: list[list[str]]) -> np.ndarray:
    """Jaccard of every pair of sets, [R, R]."""
    return np.array([[jaccard(a, b) for b in sets] for a in sets])


def other_runs(context: AuditContext) -> list[Evaluation]:
    """The evaluations of `--runs`; a folder that is named twice counts once."""
    named = context.options.runs
    return load_evaluations(named, 1) if named else []


def across_runs(runs: Sequence[Evaluation]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Labels, Jaccard of the shown top-20 titles [R, R], and of the data's top-20 titles [R, R]."""
    shown, chosen = [], []
    for run in runs:
        entries = run.catalogue()
        counts = Counter(item for row in run.lists() for item in row[:K])
        unknown = set(counts) - {entry["item_id"] for entry in entries}
        assert not unknown, f"{run.folder}: lists name items outside their catalogue"
        texts = [entry["text"] for entry in entries]
        shown_counts = np.array([counts[entry["item_id"]] for entry in entries], dtype=float)
        train_counts = np.array([entry["train_count"] for entry in entries], dtype=float)
        shown.append(top_titles(texts, shown_counts))
        chosen.append(top_titles(texts, train_counts))
    return [run.label for run in runs], overlaps(shown), overlaps(chosen)


def run(context: AuditContext) -> dict:
    options = context.options
    popularity = context.popularity
    _, scores = context.matrix(DEFAULT_USERS)
    lists = top_lists(scores, min(K, scores.shape[1] - 1))
    found, p, null = measure(lists, popularity, options.num_bootstrap, options.seed)
    effect = found[EXCESS]
    top = num_top(len(popularity))
    speaks = p <= 0.05 and not effect.spans_null
    verdict = "a few titles are everywhere" if speaks else "not shown to be more concentrated than the data"
    finding = (
        f"The {top} most shown titles take {found[SHARE].text()} of the exposure, "
        f"{effect.text()} more than lists drawn from train popularity (p = {p:.2g}: {verdict}); "
        f"the {top} most chosen have {top_share(popularity, top):.3g} of the choices."
    )
    counts = exposure(lists, scores.shape[1])
    order = np.argsort(-counts, kind="stable")[:SHOWN]
    texts = [entry.text for entry in context.catalogue.entries]
    titles = [texts[i] for i in order]
    places = counts[order] / counts.sum()
    choices = popularity[order] / max(popularity.sum(), 1)
    figures = [most_shown(titles, places, choices)]
    extra = {}
    runs = other_runs(context)
    if len(runs) >= 2:
        labels, shown, chosen = across_runs(runs)
        above = np.triu_indices(len(labels), 1)
        finding += (
            f" Between {len(labels)} runs the top-{TOP} sets overlap by {shown[above].mean():.2f} (Jaccard), "
            f"the data's own by {chosen[above].mean():.2f}."
        )
        figures.append(overlap_map(labels, shown, chosen[above].mean()))
        extra = {"jaccard_shown": shown.tolist(), "jaccard_data": chosen.tolist()}
    return result(
        finding=finding,
        effect=effect,
        effect_name="exposure share of the most shown beyond popularity-drawn lists",
        speaks=speaks,
        control=f"lists drawn from train popularity: {null.mean():.3g} "
        f"(95 % below {np.quantile(null, 0.95):.3g})",
        measures=found,
        table={
            "columns": ["title", "share of list places", "share of train interactions"],
            "rows": [list(row) for row in zip(titles, places, choices)],
        },
        figures=figures,
        **extra,
    )


def most_shown(titles: list[str], places: np.ndarray, choices: np.ndarray) -> dict:
    return {
        "kind": "bar",
        "title": "The most shown titles",
        "horizontal": True,
        "percent": True,
        "categories": titles,
        "caption": "Exposure far above a title's share of the choices is concentration "
        "that the data do not ask for.",
        "series": [
            {"name": "share of list places", "values": places},
            {"name": "share of train interactions", "values": choices},
        ],
    }


def overlap_map(labels: list[str], shown: np.ndarray, of_data: float) -> dict:
    return {
        "kind": "heatmap",
        "title": f"Overlap of the top-{TOP} titles between runs",
        "rows": labels,
        "columns": labels,
        "values": shown.round(2).tolist(),
        "caption": "Jaccard of the most shown titles; the data sets' own most chosen titles overlap by "
        f"{of_data:.2f} on average.",
    }


def lacks(context: AuditContext) -> Lack:
    """Lists and titles of every run of `--runs`: they are read after hours of scoring."""
    for run in other_runs(context):
        missing = [name for name in (PREDICTIONS, CATALOGUE) if not (run.folder / name).is_file()]
        if missing:
            return (
                f"--runs: {run.folder} has no {' and no '.join(missing)}, and its lists are compared",
                "evaluate that run again, or leave it out of --runs",
            )
    return None


AUDIT = Audit(
    title="The same titles everywhere",
    question="Do a few titles take more of the exposure than of the choices, "
    "and are they the same for other data and models?",
    run=run,
    cost=matrix_cost(DEFAULT_USERS),
    order=20,
    lacks=lacks,
)
