"""Audit `dimensionality`: how many directions does the user x item score matrix really have?

    effective rank = exp(entropy of sigma / sum sigma)          (Roy & Vetterli 2007)
of the log-probabilities, centred by user and by item, so that neither popularity nor a user's sharpness counts. Beside it: distinct
top-10 lists per user, and the head-tail gap (mean relative rank of tail targets minus that of head targets).
Control: every item's column permuted over users, which keeps all marginals and breaks what users share; the effect is the ratio of
effective ranks, 1 where nothing is shared. Interval: half samples of users (Shao & Wu 1989), since repeating users lowers a rank.
With --runs: the same figures of other evaluated runs over their LoRA rank, against accuracy (a Pareto plot).
"""

from __future__ import annotations

import numpy as np

from eval.audit.context import Audit, AuditContext, Cost, result
from eval.audit.folders import load_evaluations
from eval.audit.inference import Estimate, bootstrap, target_ranks, top_lists

TITLE = "Dimensionality"
QUESTION = "Do users get different recommendations, or is one ranking shown to all with small changes?"
DEFAULT_USERS, K, HALVES, HEAD_SHARE = 64, 10, 100, 0.2


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
    return rng.permuted(scores, axis=0)


def rank_ratio(scores: np.ndarray, rng: np.random.Generator) -> float:
    return effective_rank(scores) / max(effective_rank(shuffled_columns(centred(scores), rng)), 1e-12)


def head_items(popularity: np.ndarray) -> np.ndarray:
    """Bool[I]: the most popular fifth."""
    head = np.zeros(len(popularity), dtype=bool)
    head[np.argsort(-popularity, kind="stable")[: max(1, int(HEAD_SHARE * len(popularity)))]] = True
    return head


def measure(
    scores: np.ndarray, targets: np.ndarray, popularity: np.ndarray, num_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Scores [U, I], targets [U], train counts [I]."""
    rng, users = np.random.default_rng(seed), len(scores)
    value, half = rank_ratio(scores, rng), max(2, users // 2)
    halves = np.array([rank_ratio(scores[rng.permutation(users)[:half]], rng) for _ in range(HALVES)])
    error = 1.96 * float(halves.std(ddof=1))
    lists = top_lists(scores, min(K, scores.shape[1] - 1))
    distinct = len({frozenset(row) for row in lists.tolist()}) / users
    relative, in_head = (
        (target_ranks(scores, targets) - 1) / max(scores.shape[1] - 1, 1),
        head_items(popularity)[targets],
    )

    def gap(rows: np.ndarray) -> float:
        tail, head = rows[rows[:, 1] == 0, 0], rows[rows[:, 1] == 1, 0]
        return tail.mean() - head.mean() if len(tail) and len(head) else np.nan

    return {
        "effective rank / control": Estimate(value, value - error, value + error, users, 1.0),
        "effective rank": Estimate(effective_rank(scores), float("nan"), float("nan"), users, None),
        "distinct top-10 lists per user": Estimate(distinct, float("nan"), float("nan"), users, None),
        "head-tail gap of relative rank": bootstrap(
            np.stack([relative, in_head.astype(float)], axis=1), gap, num=num_bootstrap, seed=seed
        ),
    }


def over_runs(paths) -> tuple[list[list], list[dict]]:
    """Rows (run, LoRA rank, NDCG@10, effective rank, distinct lists) and points for the Pareto plot, of runs evaluated with this audit."""
    rows, points = [], []
    for run in load_evaluations(paths, 1):
        measures = (run.results.get("audits", {}).get("dimensionality") or {}).get("measures")
        accuracy = (run.results.get("metrics", {}).get("ndcg@10") or {}).get("value")
        if measures is None or accuracy is None:
            continue
        rank, distinct = (
            measures["effective rank"]["value"],
            measures["distinct top-10 lists per user"]["value"],
        )
        rows.append([run.label, run.setting("model.lora.r"), accuracy, rank, distinct])
        points.append(
            {
                "x": rank,
                "y": accuracy,
                "label": run.label,
                "series": f"LoRA r = {run.setting('model.lora.r')}",
            }
        )
    return rows, points


def run(context: AuditContext) -> dict:
    options = context.options
    samples, scores = context.matrix(DEFAULT_USERS)
    found = measure(scores, context.targets(samples), context.popularity, options.num_bootstrap, options.seed)
    effect, gap = found["effective rank / control"], found["head-tail gap of relative rank"]
    distinct, users = found["distinct top-10 lists per user"].value, len(samples)
    finding = (
        f"The score matrix of {users} users has effective rank {found['effective rank'].value:.1f}, {effect.text()} of a matrix "
        f"without structure; "
        f"{distinct:.0%} of the users' top-10 sets are distinct; tail targets rank {gap.text()} of the catalogue below head targets."
    )
    sigma = np.linalg.svd(centred(scores), compute_uv=False)
    broken = np.linalg.svd(
        shuffled_columns(centred(scores), np.random.default_rng(options.seed)), compute_uv=False
    )
    count = min(len(sigma), 40)
    figures = [
        {
            "kind": "line",
            "title": "Singular values of the centred score matrix",
            "x_label": "direction",
            "y_label": "share of the sum",
            "caption": "A steep start is few directions shared by all users; the control has the same columns, permuted.",
            "series": [
                {
                    "name": name,
                    "x": list(range(1, count + 1)),
                    "y": values[:count] / values.sum() if values.sum() else values[:count],
                }
                for name, values in (("this model", sigma), ("control", broken))
            ],
        }
    ]
    rows, points = over_runs(options.runs) if options.runs else ([], [])
    if points:
        figures.append(
            {
                "kind": "scatter",
                "title": "Accuracy against effective rank",
                "x_label": "effective rank",
                "y_label": "NDCG@10",
                "points": points,
                "caption": "Runs up and to the right are accurate and personal; colours are LoRA ranks.",
            }
        )
    table = {
        "columns": ["measure", "value", "low", "high"],
        "rows": [[n, e.value, e.low, e.high] for n, e in found.items()],
    }
    return result(
        TITLE,
        QUESTION,
        finding=finding,
        effect=effect,
        effect_name="effective rank over that of permuted columns",
        speaks=effect.high < 1,
        control=f"columns permuted over users: effective rank {found['effective rank'].value / max(effect.value, 1e-12):.1f}",
        measures=found,
        table=table,
        figures=figures,
        runs={"columns": ["run", "LoRA rank", "NDCG@10", "effective rank", "distinct lists"], "rows": rows},
    )


AUDIT = Audit(
    "dimensionality", TITLE, QUESTION, run, lambda context: Cost(scorings=context.unscored(DEFAULT_USERS))
)
