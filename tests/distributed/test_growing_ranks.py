"""Growing windows as a prefix tree: resumed to the bit on one rank and on two, equal to padded samples."""

import pytest

from tests.distributed.scenario_growing import GLOBAL_BATCH, LEAKY_STEPS, STEPS, STOP_AFTER
from tests.forked import run_scenario

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_scenario("scenario_growing", tmp_path_factory.mktemp("growing"))


def test_a_stopped_run_asks_for_a_requeue_and_the_resumed_one_ends(report):
    assert report["status"] == [[0, 0], [75, 75], [0, 0], [0], [0], [75], [0]]


@pytest.mark.parametrize("ranks", ["", "_alone"], ids=["2 ranks", "1 rank"])
def test_a_run_resumed_in_the_middle_of_an_epoch_is_bitwise_the_straight_one(report, ranks):
    # The step at which the signal comes is taken, so the resumed run begins behind it.
    taken = (STOP_AFTER + 1) * GLOBAL_BATCH
    assert 0 < taken < report["train_samples"] < STEPS * GLOBAL_BATCH, "stopped in an epoch, before its turn"
    assert [record[0] for record in report["straight" + ranks]] == list(range(1, STEPS + 1))
    assert report["stopped" + ranks] == report["straight" + ranks]


def test_one_rank_with_padded_rows_sees_the_same_samples_and_computes_the_same(report):
    for tree, padded in zip(report["straight"], report["padded"], strict=True):
        assert tree[1] == pytest.approx(padded[1], rel=1e-5)
        assert tree[2] == pytest.approx(padded[2], rel=1e-5, nan_ok=True)
        assert tree[4] == pytest.approx(padded[4], rel=1e-3)


def test_where_the_probe_turns_a_tree_down_the_run_is_bitwise_the_one_that_pads_from_the_start(report):
    """Also stopped and resumed. Samples split in the order of a tree would be summed in another order."""
    assert report["leaky_status"] == [[75, 75], [0, 0], [75, 75], [0, 0]]
    assert report["leaky_packing"] == "none"
    assert [record[0] for record in report["leaky"]] == list(range(1, LEAKY_STEPS + 1))
    assert report["leaky"] == report["leaky_padded"]
