"""Overlap of lists against its definition, and the worst environment of hand-computed cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.audit.list_overlap import jaccard, rank_biased_overlap
from eval.audit.model.shift import relative_drop


def test_rank_biased_overlap_equals_the_sum_of_its_definition():
    rng = np.random.default_rng(1)
    for _ in range(20):
        a, b = list(rng.permutation(9)[:6]), list(rng.permutation(9)[:6])
        agreement = [len(set(a[:d]) & set(b[:d])) / d for d in range(1, 7)]
        tail = (
            agreement[-1] * 0.9**6
        )  # all deeper agreements taken as the last one: sum of (1-p) p^(d-1) from d = 7
        assert rank_biased_overlap(a, b) == pytest.approx(
            sum(0.1 * 0.9**d * x for d, x in enumerate(agreement)) + tail
        )
    assert (
        rank_biased_overlap([1, 2, 3], [1, 2, 3]) == pytest.approx(1.0)
        and rank_biased_overlap([1, 2], [3, 4]) == 0.0
    )
    assert rank_biased_overlap([1, 2, 3, 4], [2, 1, 3, 4]) < rank_biased_overlap(
        [1, 2, 3, 4], [1, 2, 4, 3]
    )  # the top weighs more


def test_overlap_and_relative_drop():
    assert jaccard([1, 2, 3], [3, 4]) == pytest.approx(1 / 4) and jaccard([], []) == 1.0
    assert relative_drop(0.4, 0.3) == pytest.approx(0.25) and math.isnan(relative_drop(0.0, 0.1))
