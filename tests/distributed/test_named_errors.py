"""The eleven errors of public Group DRO code (docs/method.md), each as a test that its mutation fails (make
test-mutations).
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.forked import run_scenario

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return run_scenario("named_errors", tmp_path_factory.mktemp("named_errors"), timeout_s=550)


def arrays(run: dict, name: str) -> list[np.ndarray]:
    return [np.array(rank[name]) for rank in run["ranks"]]


def close(found, wanted, tolerance=1e-6) -> bool:
    found, wanted = np.array(found), np.array(wanted)
    return (
        np.array_equal(np.isnan(found), np.isnan(wanted))
        and float(np.nanmax(np.abs(found - wanted))) <= tolerance
    )


def test_error_01_group_loss_is_sum_over_count_not_mean_of_local_means(measured):
    run = measured["error_01"]
    assert all(close(losses, run["wanted"]["group_loss"]) for losses in arrays(run, "group_loss"))
    assert np.array_equal(arrays(run, "group_count")[0], run["wanted"]["group_count"])


def test_error_02_weights_come_from_all_ranks_and_are_bitwise_equal(measured):
    run = measured["error_02"]
    first, second = arrays(run, "group_weight")
    assert first.tobytes() == second.tobytes() and close(first, run["wanted"]["group_weight"])


def test_error_03_absent_group_has_no_weight_and_does_not_count_as_loss_zero(measured):
    run = measured["error_03"]
    counts, weights = arrays(run, "group_count")[0], arrays(run, "group_weight")[0]
    absent = counts == 0
    assert (
        absent[:, 5].all() and absent[:, 4].any() and not absent[:, 4].all()
    )  # one group never there, one there at times
    assert (
        np.isnan(weights[absent]).all()
        and np.allclose(np.nansum(weights, axis=1), 1)
        and close(weights, run["wanted"]["group_weight"])
    )
    assert (
        close(arrays(run, "objective")[0], run["wanted"]["objective"])
        and run["states"][0]["ema_weight"][5] == 0
    )


def test_error_04_weights_move_once_per_optimizer_step_not_per_micro_batch(measured):
    run = measured["error_04"]
    losses, present = np.array(run["wanted"]["group_loss"][0]), np.array(run["wanted"]["group_count"][0]) > 0
    once = np.where(present, np.exp(np.nan_to_num(losses)), 1.0)
    assert close(run["states"][0]["q"], once / once.sum()) and run["states"][0]["steps"] == 1
    assert close(arrays(run, "group_weight")[0], run["wanted"]["group_weight"])


def test_error_05_every_rank_remembers_so_no_rank_has_stale_weights(measured):
    run = measured["error_05"]
    first, second = arrays(run, "group_weight")
    assert first.tobytes() == second.tobytes() and run["states"][0] == run["states"][1]
    assert close(first, run["wanted"]["group_weight"]) and not np.allclose(
        np.nan_to_num(first[0]), np.nan_to_num(first[2]), atol=1e-3
    )


def test_error_06_accumulation_divides_by_the_count_of_the_step_not_of_micro_batches(measured):
    assert 0 < measured["error_06"]["gradient"] <= 1e-5


def test_error_07_reported_losses_are_the_unweighted_ones(measured):
    run = measured["error_07"]
    assert all(close(losses, run["wanted"]["group_loss"]) for losses in arrays(run, "group_loss"))


def test_error_08_small_tau_gives_the_worst_group_without_overflow(measured):
    run = measured["error_08"]
    weights, losses = arrays(run, "group_weight")[0][0], arrays(run, "group_loss")[0][0]
    assert np.isfinite(weights[np.array(run["wanted"]["group_count"][0]) > 0]).all() and np.nanargmax(
        weights
    ) == np.nanargmax(losses)
    assert (
        np.nanmax(weights) > 0.99 and np.nansum(weights) == pytest.approx(1) and 0 < run["gradient"] <= 1e-3
    )


def test_error_09_only_global_rank_zero_writes_when_two_machines_have_a_local_rank_zero(measured):
    assert measured["error_09"] == {"mains": [True, False], "steps": [1, 2, 3]}


def test_error_10_padding_belongs_to_no_group(measured):
    run = measured["error_10"]
    assert all(close(losses, run["wanted"]["group_loss"]) for losses in arrays(run, "group_loss"))
    assert (
        np.array_equal(arrays(run, "group_count")[0], run["wanted"]["group_count"])
        and run["gradient"] <= 1e-5
    )


def test_error_11_weights_and_moving_averages_come_back_from_the_checkpoint(measured):
    for objective, ranks in measured["error_11"].items():
        assert len(ranks) == 2
        for wanted, found in ranks:
            assert np.array(wanted).tobytes() == np.array(found).tobytes(), objective
