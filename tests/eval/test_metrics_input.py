"""What metrics take: the order does not matter, what does not fit is refused in words, size takes seconds."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from examples import entry, prediction, world

from eval.metrics import (
    evaluate,
)
from gdrt_ds.errors import UserError

FAST = {"num_bootstrap": 20, "breakdowns": False}


def value(found: dict, name: str) -> float:
    return found["metrics"][name]["value"]


def test_the_order_of_samples_and_catalogue_changes_no_value():
    predictions, entries, _ = world()
    first, second = (
        evaluate(predictions, entries, **FAST)["metrics"],
        evaluate(predictions[::-1], entries[::-1], **FAST)["metrics"],
    )
    assert first.keys() == second.keys() and len(first) > 60
    for name in first:
        assert first[name]["value"] == pytest.approx(second[name]["value"], rel=1e-9), name


def test_every_id_of_a_merged_entry_counts_as_that_entry():
    entries = [entry("i0", 3, merged=("copy",)), entry("i1", 1)]
    found = evaluate(
        [prediction(0, "copy", 1, ["i0", "i1"], history_ids=["copy"])],
        entries,
        ks=(1,),
        history_item_counts={"copy": 2, "i1": 2},
        **FAST,
    )
    assert value(found, "hr@1") == 1.0
    with pytest.raises(UserError, match="names an item twice"):
        evaluate([prediction(0, "i1", 1, ["i0", "copy"])], entries, **FAST)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"target_id": "nowhere"}, "not in the catalogue"),
        ({"rank": 0}, "outside 1..5"),
        ({"rank": 6}, "outside 1..5"),
        ({"top_ids": ["nowhere"]}, "top_ids"),
        ({"history_ids": ["nowhere"]}, "history_ids"),
        ({"num_tied": 4, "rank": 1.0}, "num_tied"),
        ({"sample_id": 1}, "repeated"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_words(change, words):
    predictions = [prediction(0, "i0", 1, ["i0"]), prediction(1, "i1", 2, ["i0"])]
    predictions[0].update(change)
    with pytest.raises(UserError, match=words):
        evaluate(predictions, [entry(f"i{i}") for i in range(5)], **FAST)


def test_lists_that_are_missing_or_short_leave_list_metrics_out_with_words():
    entries = [entry(f"i{i}", 3) for i in range(30)]
    found = evaluate([prediction(n, "i0", 2, []) for n in range(3)], entries, **FAST)
    assert value(found, "hr@5") == 1.0 and "mgu@5" not in found["metrics"]
    assert any("mgu@5: not measured, the lists hold 0 items" in note for note in found["notes"])
    uneven = evaluate(
        [prediction(0, "i0", 2, ["i1", "i0", "i2", "i3", "i4"]), prediction(1, "i0", None, ["i1"])],
        entries,
        **FAST,
    )
    assert value(uneven, "coverage@5") == pytest.approx(5 / 30) and any(
        "shorter" in note for note in uneven["notes"]
    )


def test_an_empty_split_and_a_bad_cut_off_are_refused():
    with pytest.raises(UserError, match="split is empty"):
        evaluate([], [entry("i0")])
    with pytest.raises(UserError, match="cut-offs"):
        evaluate([prediction(0, "i0", 1, ["i0"])], [entry("i0")], ks=(0,))


def test_one_item_and_one_user_give_figures_and_no_crash():
    found = evaluate([prediction(0, "i0", 1, ["i0"])], [entry("i0")], num_bootstrap=20)
    assert value(found, "hr@1") == 1.0 and value(found, "mean_rank_share") == 0.0


def test_a_thousand_replicates_over_a_thousand_users_take_seconds():
    predictions, entries, _ = world(1000, 1600, length=50)
    start = time.perf_counter()
    found = evaluate(predictions, entries)
    assert time.perf_counter() - start < 12  # about 1 s on an idle core; loops over replicates take minutes
    with_interval = {name: f for name, f in found["metrics"].items() if f["ci_low"] is not None}
    assert (
        len(with_interval) > 60
        and [n for n, f in with_interval.items() if not f["ci_low"] <= f["value"] <= f["ci_high"]] == []
    )
