"""Audit `dimensionality`: how many directions does the user x item score matrix really have?

    effective rank = exp(entropy of sigma / sum sigma)          (Roy & Vetterli 2007)

The matrix is that of the log-probabilities, centred by user and by item, so that neither popularity nor a
user's sharpness counts. Beside it stand distinct top-10 lists per user, and the head-tail gap: the mean
relative rank of tail targets minus that of head targets. Control: every item's column permuted over users,
which keeps all marginals and breaks what users share. The effect is the ratio of effective ranks, 1 where
nothing is shared. Its interval comes from half samples of users (Shao & Wu 1989), since repeating users
lowers a rank. Below six users there is no interval: two centred rows have rank 1 whatever they hold.
With --runs: the same figures of other evaluated runs over their LoRA rank, against accuracy (a Pareto plot).

Shapes: U users, I catalogue entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.audit.base import Audit, estimate_table, matrix_cost, result
from eval.audit.context import AuditContext
from eval.audit.estimates import Estimate, bootstrap
from eval.audit.score_rows import target_ranks, top_lists
from eval.folders import load_evaluations
from eval.metrics.inputs import HEAD_SHARE

DEFAULT_USERS = 64
K = 10
HALVES = 100  # half samples of users
SMALLEST_HALF = 3  # two centred rows have rank 1 whatever they hold, so halves of two never differ
DRAWN = 40  # singular values in the figure
RATIO = "effective rank / control"
RANK = "effective rank"
DISTINCT = "distinct top-10 lists per user"
GAP = "head-tail gap of relative rank"


def centred(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities [U, I] without user and item means; infinite scores take the smallest finite one."""
    finite = np.where(np.isfinite(scores), scores, np.min(scores[np.isfinite(scores)]))
    return finite - finite.mean(axis=0, keepdims=True) - finite.mean(axis=1, keepdims=True) + finite.mean()


def effective_rank(scores: np.ndarray) -> float:
    """Between 1 and min(U, I) - 1; 0 where all users have the same scores."""
    sigma = np.linalg.svd(centred(scores), compute_uv=False)
    if sigma.sum() < 1e-9 * scores.size:
        return 0.0
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def shuffled_columns(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The control: every item's scores [U, I] permuted over users."""
    return rng.permuted(scores, axis=0)


def rank_ratio(scores: np.ndarray, rng: np.random.Generator) -> float:
    """Effective rank over that of the control."""
    return effective_rank(scores) / max(effective_rank(shuffled_columns(centred(scores), rng)), 1e-12)


def head_items(popularity: np.ndarray) -> np.ndarray:
    """Bool [I]: the most popular fifth."""
    head = np.zeros(len(popularity), dtype=bool)
    count = max(1, int(HEAD_SHARE * len(popularity)))
    head[np.argsort(-popularity, kind="stable")[:count]] = True
    return head


def measure(
    scores: np.ndarray, targets: np.ndarray, popularity: np.ndarray, num_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Scores [U, I], targets [U], train counts [I] -> the four estimates."""
    rng = np.random.default_rng(seed)
    users, num_items = scores.shape
    value = rank_ratio(scores, rng)
    half = max(2, users // 2)
    halves = np.array([rank_ratio(scores[rng.permutation(users)[:half]], rng) for _ in range(HALVES)])
    error = float("nan")
    if half >= SMALLEST_HALF:
        error = 1.96 * float(halves.std(ddof=1))
    lists = top_lists(scores, min(K, num_items - 1))
    distinct = len({frozenset(row) for row in lists.tolist()}) / users
    relative = (target_ranks(scores, targets) - 1) / max(num_items - 1, 1)
    in_head = head_items(popularity)[targets].astype(float)

    def gap(rows: np.ndarray) -> float:
        tail = rows[rows[:, 1] == 0, 0]
        head = rows[rows[:, 1] == 1, 0]
        return tail.mean() - head.mean() if len(tail) and len(head) else np.nan

    undefined = float("nan")
    return {
        RATIO: Estimate(value, value - error, value + error, users, 1.0),
        RANK: Estimate(effective_rank(scores), undefined, undefined, users, None),
        DISTINCT: Estimate(distinct, undefined, undefined, users, None),
        GAP: bootstrap(np.stack([relative, in_head], axis=1), gap, num=num_bootstrap, seed=seed),
    }


def over_runs(paths: Sequence[str]) -> tuple[list[list], list[dict]]:
    """What this audit found in other runs that were evaluated with it.

    Returns:
        rows (run, LoRA rank, NDCG@10, effective rank, distinct lists), and points for the Pareto plot.
    """
    rows, points = [], []
    for run in load_evaluations(paths, 1):
        measures = (run.results.get("audits", {}).get("dimensionality") or {}).get("measures")
        accuracy = (run.results.get("metrics", {}).get("ndcg@10") or {}).get("value")
        if measures is None or accuracy is None:
            continue
        rank = measures[RANK]["value"]
        lora_rank = run.setting("model.lora.r")
        rows.append([run.label, lora_rank, accuracy, rank, measures[DISTINCT]["value"]])
        points.append({"x": rank, "y": accuracy, "label": run.label, "series": f"LoRA r = {lora_rank}"})
    return rows, points


def run(context: AuditContext) -> dict:
    options = context.options
    samples, scores = context.matrix(DEFAULT_USERS)
    found = measure(scores, context.targets(samples), context.popularity, options.num_bootstrap, options.seed)
    effect = found[RATIO]
    rank = found[RANK].value
    finding = (
        f"The score matrix of {len(samples)} users has effective rank {rank:.1f}, "
        f"{effect.text()} of a matrix without structure; "
        f"{found[DISTINCT].value:.0%} of the users' top-10 sets are distinct; "
        f"tail targets rank {found[GAP].text()} of the catalogue below head targets."
    )
    figures = [singular_values(scores, options.seed)]
    rows: list[list] = []
    if options.runs:
        rows, points = over_runs(options.runs)
        if points:
            figures.append(pareto(points))
    return result(
        finding=finding,
        effect=effect,
        effect_name="effective rank over that of permuted columns",
        speaks=effect.high < 1,
        control=f"columns permuted over users: effective rank {rank / max(effect.value, 1e-12):.1f}",
        measures=found,
        table=estimate_table(found),
        figures=figures,
        runs={"columns": ["run", "LoRA rank", "NDCG@10", "effective rank", "distinct lists"], "rows": rows},
    )


def singular_values(scores: np.ndarray, seed: int) -> dict:
    matrix = centred(scores)
    control = shuffled_columns(matrix, np.random.default_rng(seed))
    series = []
    for name, values in (("this model", matrix), ("control", control)):
        sigma = np.linalg.svd(values, compute_uv=False)
        shares = sigma / sigma.sum() if sigma.sum() else sigma
        count = min(len(sigma), DRAWN)
        series.append({"name": name, "x": list(range(1, count + 1)), "y": shares[:count]})
    return {
        "kind": "line",
        "title": "Singular values of the centred score matrix",
        "x_label": "direction",
        "y_label": "share of the sum",
        "caption": "A steep start is few directions shared by all users; "
        "the control has the same columns, permuted.",
        "series": series,
    }


def pareto(points: list[dict]) -> dict:
    return {
        "kind": "scatter",
        "title": "Accuracy against effective rank",
        "x_label": "effective rank",
        "y_label": "NDCG@10",
        "points": points,
        "caption": "Runs up and to the right are accurate and personal; colours are LoRA ranks.",
    }


AUDIT = Audit(
    title="Dimensionality",
    question="Do users get different recommendations, or is one ranking shown to all with small changes?",
    run=run,
    cost=matrix_cost(DEFAULT_USERS),
    order=31,
)
