"""Losses of several runs are compared over the samples that all of them have a finite loss of."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from eval.compare.runs import Run, check_same, not_comparable, with_shared_losses
from eval.floors import minus_floors
from eval.rows.inputs import build_row_inputs
from eval.shared_losses import over_shared_losses
from tests.eval.examples import world


def losses(*values: float | None, curves: list | None = None) -> list[dict]:
    rows = [{"sample_id": place, "target_nll": value} for place, value in enumerate(values)]
    for row, curve in zip(rows, curves or [], strict=False):
        row["nll_at_temperatures"] = curve
    return rows


def test_a_sample_without_a_finite_loss_in_one_run_has_none_in_any():
    runs = [losses(1.0, math.inf, 3.0), losses(1.0, 2.0, 3.0), losses(None, None, None)]
    found, num_left_out = over_shared_losses(runs)
    assert num_left_out == 1, "a run without any loss takes none from the others"
    assert [[row["target_nll"] for row in rows] for rows in found[:2]] == [[1.0, None, 3.0]] * 2
    curved = losses(1.0, 2.0, curves=[[1.0, 2.0], [1.0, math.nan]])
    found, num_left_out = over_shared_losses([curved, losses(1.0, 2.0)])
    assert num_left_out == 1 and found[1][1]["target_nll"] is None
    whole = [losses(1.0, 2.0), losses(3.0, 4.0)]
    assert over_shared_losses(whole) == (whole, 0)


def test_a_model_is_compared_with_a_floor_over_its_own_finite_losses():
    predictions, entries, _ = world(60, 30, length=10)
    broken = [dict(row) for row in predictions]
    for row in sorted(broken, key=lambda row: -row["target_nll"])[:10]:
        row["target_nll"] = None
    found = minus_floors(broken, {"itself": predictions}, entries, 50)["itself"]
    assert found["nll"]["value"] == 0 and found["nll"]["n"] == 50
    assert found["ndcg@10"]["n"] == 60


def run_on_rows(label: str, group_of_row: list[int], *, broken: int | None = None, saved: str | None = None):
    """One row of prompt and completion for each entry of `group_of_row`, with two tokens of that group."""
    predictions = []
    for place, group in enumerate(group_of_row):
        nll = None if place == broken else 1.0 + place
        part = {"tokens": 2, "nll": nll, "nll_at_temperatures": [1.0] * 65}
        row = {"sample_id": str(place), "user_id": f"u{place}", "target_id": "t", "labels": {}}
        predictions.append({**row, "groups": {str(group): part}, "answer": 0, "choice_nll": 0.5})
    results = {"scoring": "full", "group_names": ["a", "b"], "scoring_key": {"groups": saved}}
    inputs = build_row_inputs(predictions, ["a", "b"])
    return Run(label, Path(label), results, predictions, [], None, inputs)


def test_rows_that_one_run_has_no_finite_loss_of_count_in_none():
    runs = [run_on_rows("whole", [0, 1, 0]), run_on_rows("broken", [0, 1, 0], broken=2)]
    found, (note,) = with_shared_losses(runs)
    assert [run.inputs.tokens.sum() for run in found] == [4, 4]
    assert all(math.isnan(run.inputs.choice_nll[2]) for run in found)
    assert note.startswith("1 of 3 samples lack a finite NLL in at least one of whole, broken")


@pytest.mark.parametrize(
    "groups, saved, differ",
    [([0, 1, 0], None, False), ([1, 1, 0], None, True), ([0, 1, 0], "other", True)],
)
def test_groups_of_other_tokens_under_the_same_names_are_not_compared(groups, saved, differ):
    runs = [run_on_rows("a", [0, 1, 0], saved=saved and "one"), run_on_rows("b", groups, saved=saved)]
    assert ("nll_worst_group" in not_comparable(runs)) == differ
    assert any(note.startswith("token groups differ") for note in check_same(runs)) == differ
