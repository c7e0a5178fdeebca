"""One object of predictions.jsonl."""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.loading import Subject
from gdrt_ds.data.corpus import Sample
from gdrt_ds.files import finite

CURVE_DECIMALS = 4  # of a nat: the files stay small, and calibration needs no more
SCORE_DECIMALS = 7  # of a nat: finer than float32 tells two scores apart


def item_order(subject: Subject) -> np.ndarray:
    """Long[items]: a rank per entry by item id. It breaks ties without regard to the catalogue's order."""
    ids = [entry.item_id for entry in subject.catalogue.entries]
    order = np.empty(len(ids), np.int64)
    order[np.argsort(ids, kind="stable")] = np.arange(len(ids))
    return order


def relevance_group(subject: Subject, item: str) -> int | None:
    """The relevance group of a target; None where the run has none."""
    if subject.group_of_entry is None:
        return None
    return int(subject.group_of_entry[subject.catalogue.index_of[item]])


def describe(
    subject: Subject,
    sample: Sample,
    *,
    rank: float | None,
    tied: int,
    top: np.ndarray,
    top_scores: np.ndarray,
    nll: float,
    curve: np.ndarray | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """One object of predictions.jsonl.

    Ids are those of the catalogue's representatives; numbers that are not finite are null.

    Args:
        rank: expected rank of the target from 1; None where it is not known.
        tied: items that share the target's score, itself included.
        top: Long[k], entries of the list, best first; `top_scores`: float64[k].
        nll: of the target, in nats.
        curve: `eval.metrics.calibration.nll_curve`, where the whole catalogue was scored.
        extra: further keys of the object.
    """
    catalogue = subject.catalogue

    def id_of(item: str) -> str:
        return catalogue.entries[catalogue.index_of[item]].item_id

    rounded = None
    if curve is not None:
        rounded = finite([round(value, CURVE_DECIMALS) for value in curve.tolist()])
    return {
        "sample_id": sample.sample_id,
        "user_id": sample.user_id,
        "target_id": id_of(sample.target),
        "rank": rank,
        "num_tied": tied,
        "top_ids": [catalogue.entries[entry].item_id for entry in top.tolist()],
        "top_scores": finite(np.asarray(top_scores).round(SCORE_DECIMALS).tolist()),
        "target_nll": finite(float(nll)),
        "history_ids": [id_of(item) for item in sample.history],
        "nll_at_temperatures": rounded,
        "user": subject.corpus.users.get(sample.user_id, {}),
        "labels": dict(sample.labels),
        "relevance_group": relevance_group(subject, sample.target),
        **extra,
    }
