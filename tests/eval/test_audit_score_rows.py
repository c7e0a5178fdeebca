"""Ranks and gains of audits follow the metrics' rule for ties."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from examples import entry, prediction

from eval.audit.score_rows import target_gains, target_hits, target_ranks
from eval.metrics import evaluate
from eval.scoring.ranking import TIE, expected_rank, num_tied


def test_a_constant_scorer_has_the_gain_and_the_hit_rate_of_chance():
    scores = np.zeros((4, 100))
    targets = np.array([0, 7, 50, 99])
    assert target_ranks(scores, targets).tolist() == [50.5] * 4
    assert target_hits(scores, targets) == pytest.approx(np.full(4, 10 / 100))
    assert target_gains(scores, targets) == pytest.approx(
        np.full(4, (1 / np.log2(np.arange(10) + 2)).sum() / 100)
    )


def test_gains_and_hits_are_those_of_the_metrics_on_the_same_scores():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, size=(60, 30)).astype(float)
    scores += rng.normal(size=scores.shape) * TIE / 10  # sums of the same numbers in another order
    scores[:20] = rng.normal(size=(20, 30))  # no ties
    scores[20:30, ::3] = -np.inf
    scores[30:40, ::4] = np.nan
    targets = rng.integers(0, 30, 60)
    predictions = []
    for n, (row, target) in enumerate(zip(scores, targets)):
        rank = expected_rank(row, target)
        predictions.append(prediction(n, f"i{target}", rank, ["i0"], num_tied=num_tied(row, target)))
    found = evaluate(predictions, [entry(f"i{n}", 1) for n in range(30)], num_bootstrap=20, breakdowns=False)
    assert target_ranks(scores, targets).tolist() == [row["rank"] for row in predictions]
    assert target_gains(scores, targets).mean() == pytest.approx(found["metrics"]["ndcg@10"]["value"])
    assert target_hits(scores, targets).mean() == pytest.approx(found["metrics"]["hr@10"]["value"])
