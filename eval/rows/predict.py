"""Scores what is missing and writes predictions.jsonl; a restart goes on where the last one ended.

The files and their rules are those of `eval.predictions.parts`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.predictions.parts import adapter_hash, join_parts, read_parts, score_into
from eval.predictions.rows import CURVE_DECIMALS
from eval.rows.scoring import RowScorer, Scored
from eval.rows.subject import RowSubject
from gdrt_ds.data.text_rows import TextRow
from gdrt_ds.files import finite
from gdrt_ds.runtime import Runtime


def scoring_key(subject: RowSubject) -> dict[str, Any]:
    """What predictions depend on; saved as scoring.json and compared at a restart."""
    model = subject.model
    groups = hashlib.sha256(repr(subject.group_names).encode())
    for row in subject.rows:
        groups.update(subject.groups.get(row.sample_id, np.zeros(0, np.int16)).tobytes())
    return {
        "model": model.loaded.fingerprint,
        "adapter": adapter_hash(model.adapter),
        "prompt": model.encoder.fingerprint,
        "max_length": model.encoder.max_length,
        "corpus": subject.data.fingerprint,
        "groups": groups.hexdigest(),
        "split": subject.split,
        "limit": subject.limit,
        "mode": "full",
        "scoring": "full",
        "dtype": dtype_of(subject),
    }


def dtype_of(subject: RowSubject) -> str:
    """In which the model computes."""
    return str(subject.model.loaded.dtype).removeprefix("torch.")


def predict(
    subject: RowSubject,
    output: Path,
    runtime: Runtime,
    progress: Callable[[int, int], None],
    batch_size: int,
) -> list[dict[str, Any]] | None:
    """Scores what is missing and joins the parts.

    Returns:
        predictions in the split's order on rank 0, None on other ranks.

    Raises:
        UserError: rows are missing at the end, because a rank ended early.
        KeyboardInterrupt: the process was asked to stop; what is finished is on disk.
    """
    done = read_parts(output / "parts")
    missing = [row for row in subject.rows if row.sample_id not in done]
    if missing and runtime.is_main:
        finished = f" ({len(done)} are finished)" if done else ""
        ranks = f" on {runtime.world} ranks" if runtime.world > 1 else ""
        print(f"scoring: {len(missing)} rows{finished}{ranks}", flush=True)
    runtime.barrier()  # every rank has read the parts before any rank appends
    mine = missing[runtime.rank :: runtime.world]
    if mine:
        scorer = RowScorer(subject.model)
        batches = (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))

        def score(batch: Sequence[TextRow]) -> list[dict[str, Any]]:
            return [finite(row) for row in describe_all(subject, scorer, batch)]

        score_into(output, batches, score, runtime, progress, len(mine))
    runtime.barrier()
    if not runtime.is_main:
        return None
    return join_parts(output, [row.sample_id for row in subject.rows], "rows")


def describe_all(subject: RowSubject, scorer: RowScorer, rows: Sequence[TextRow]) -> list[dict[str, Any]]:
    """Objects of predictions.jsonl for some rows: own completions, and every answer that a row lists."""
    encoder = subject.model.encoder
    own = scorer.score([encoder.encode(row) for row in rows], with_curves=True)
    others = [
        (place, choice)
        for place, row in enumerate(rows)
        for choice in range(len(row.choices))
        if row.choices[choice] != row.completion
    ]
    texts = [encoder.encode(rows[place], completion=rows[place].choices[choice]) for place, choice in others]
    scores = [np.full(len(row.choices), -scored.losses.sum()) for row, scored in zip(rows, own, strict=True)]
    for (place, choice), scored in zip(others, scorer.score(texts, with_curves=False), strict=True):
        scores[place][choice] = -scored.losses.sum()
    return [describe(subject, *one) for one in zip(rows, own, scores, strict=True)]


def describe(subject: RowSubject, row: TextRow, scored: Scored, scores: np.ndarray) -> dict[str, Any]:
    """One object of predictions.jsonl.

    Args:
        scores: float64[choices], log-probability of each whole answer; empty without choices.
    """
    groups = subject.groups.get(row.sample_id, np.zeros(len(scored.losses), np.int16))
    assert scored.curves is not None
    by_group = {}
    for group in np.unique(groups).tolist():
        mine = groups == group
        by_group[str(group)] = {
            "tokens": int(mine.sum()),
            "nll": float(scored.losses[mine].sum()),
            "nll_at_temperatures": scored.curves[mine].sum(0).round(CURVE_DECIMALS).tolist(),
        }
    identity = hashlib.sha256(f"{row.prompt!r}\x1f{row.completion}".encode("utf-8", "surrogatepass"))
    labels = dict(row.labels)
    if isinstance(row.group, str):
        labels["group"] = row.group
    found = {
        "sample_id": row.sample_id,
        "user_id": row.user_id,
        "target_id": identity.hexdigest()[:16],
        "completion": row.completion,
        "target_nll": float(scored.losses.sum()),
        "num_tokens": len(scored.losses),
        "groups": by_group,
        "labels": labels,
    }
    if row.answer is not None:
        found |= judge(row.choices, row.answer, scores)
    return found


def judge(choices: tuple[str, ...], answer: int, scores: np.ndarray) -> dict[str, Any]:
    """Whether the highest score is the answer's; of several equal ones, each counts its share.

    A row with a score that is not a number is wrong.
    """
    if not np.isfinite(scores).all():
        return {"answer": answer, "choice_scores": scores.tolist(), "correct": 0.0, "choice_nll": None}
    best = np.flatnonzero(scores == scores.max())
    total = scores.max() + np.log(np.exp(scores - scores.max()).sum())
    return {
        "answer": answer,
        "predicted": choices[int(best[0])],
        "choice_scores": scores.tolist(),
        "correct": float(answer in best) / len(best),
        "choice_nll": float(total - scores[answer]),
    }
