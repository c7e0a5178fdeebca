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
from eval.metrics.slices import bin_numbers, in_reading_order


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


@pytest.mark.parametrize(
    "first, step, names",
    [
        (18, 1, ["18-27.75 (excl.)", "27.75-37.5 (excl.)", "37.5-47.25 (excl.)", "47.25-57"]),
        (
            -40.5,
            2,
            ["-40.5 to -21 (excl.)", "-21 to -1.5 (excl.)", "-1.5 to 18 (excl.)", "18 to 37.5"],
        ),
        (
            1_500_000,
            0.3,
            [
                "1500000-1500003 (excl.)",
                "1500003-1500006 (excl.)",
                "1500006-1500009 (excl.)",
                "1500009-1500012",
            ],
        ),
        (
            -3e9,
            1e8,
            [
                "-3e+09 to -2.025e+09 (excl.)",
                "-2.025e+09 to -1.05e+09 (excl.)",
                "-1.05e+09 to -7.5e+07 (excl.)",
                "-7.5e+07 to 9e+08",
            ],
        ),
    ],
    ids=["ages", "negative numbers", "close and large", "negative and large"],
)
def test_quartiles_of_numbers_have_distinct_names_that_are_read_in_their_order(first, step, names):
    values = np.array([str(first + step * n) for n in range(40)], dtype=object)
    slice_of_N = bin_numbers(values)
    assert in_reading_order(np.random.default_rng(0).permutation(slice_of_N)) == names
    assert [list(slice_of_N).count(name) for name in names] == [10] * 4


def test_names_that_only_begin_like_numbers_are_read_as_text():
    names = ["(other)", "b", "3rd", "50+", "10-19", "-5", "2", "1.5", "2020-01-05", "-x", "e5"]
    expected = ["-5", "1.5", "2", "10-19", "50+", "2020-01-05", "-x", "3rd", "b", "e5", "(other)"]
    assert in_reading_order(np.array([*names, None], dtype=object)) == expected
