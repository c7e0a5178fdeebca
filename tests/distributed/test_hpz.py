"""zero_hpz_partition_size: every node holds a whole copy of the base, sharded over its own ranks."""

import pytest

from tests.forked import run_scenario

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_scenario("scenario_hpz", tmp_path_factory.mktemp("hpz"))


def losses(report, case):
    return [rank["losses"] for rank in report[case]]


@pytest.mark.parametrize("case", ["two copies", "two copies, stock loading"])
def test_losses_are_bitwise_those_of_one_copy(report, case):
    assert losses(report, case) == losses(report, "one copy")


def test_a_resumed_run_is_bitwise_the_straight_one(report):
    straight = [steps[2:] for steps in losses(report, "two copies")]
    assert losses(report, "two copies, resumed") == straight


def test_each_rank_reads_only_its_slice_and_keeps_a_half_of_the_base_beside_it(report):
    for rank in report["two copies"]:
        assert rank["loading"] == "sharded"
        assert rank["primary"] * 4 == rank["whole"]
        assert rank["secondary"] * 2 == rank["whole"]


def test_one_copy_keeps_no_second_slice(report):
    assert [rank["secondary"] for rank in report["one copy"]] == [0, 0, 0, 0]
