"""Slices: their intervals count their own users, and their names keep the order of their numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from examples import entry, prediction

from eval.intervals.interval import widening
from eval.metrics import evaluate


def test_the_interval_of_a_slice_counts_the_users_in_it_and_not_those_of_all_slices():
    losses = np.random.default_rng(0).normal(4, 1, 60)
    users = [("many", f"u{n}") for n in range(40)]
    users += [("one", "windows")] * 40
    users += [("two", f"pair{n % 2}") for n in range(40)]
    predictions = [
        prediction(n, "i0", 15, ["i1"], user_id=user, labels={"kind": kind}, target_nll=float(losses[n % 60]))
        for n, (kind, user) in enumerate(users)
    ]
    entries = [entry(f"i{n}", 1) for n in range(20)]
    found = evaluate(predictions, entries, num_bootstrap=200)["breakdowns"]["label:kind"]
    groups = found["groups"]
    assert [groups[name]["nll"]["n"] for name in ("many", "one", "two")] == [40, 40, 40]
    assert groups["one"]["nll"]["value"] == pytest.approx(np.mean(losses[np.arange(40, 80) % 60]))
    assert groups["one"]["nll"]["ci_low"] is None, "one user gives no interval"
    for name, num_users in (("many", 40), ("one", 1), ("two", 2)):
        hit = groups[name]["hr@10"]
        assert (hit["value"], hit["ci_low"]) == (0, 0)
        assert hit["ci_high"] == pytest.approx(1 - 0.025 ** (1 / num_users)), name
    pair = [np.mean(losses[(80 + first + 2 * np.arange(20)) % 60]) for first in (0, 1)]
    # A draw of two users has one of three means, and at 95 % the interval reaches the outer two of them.
    half = abs(pair[0] - pair[1]) / 2 * widening(2)
    nll = groups["two"]["nll"]
    assert nll["ci_high"] - nll["value"] == pytest.approx(half, rel=0.1)
    assert found["summary"]["nll"]["gap"]["ci_low"] is not None
