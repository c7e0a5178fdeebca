"""ZeRO-3 really shards the 4-bit base: between forward and backward a rank holds little but its slice."""

import pytest

from tests.forked import run_scenario

pytestmark = pytest.mark.distributed
LAYERS = 6
OURS = ("own", "own, recomputed", "own, base in host memory")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_scenario("scenario_held", tmp_path_factory.mktemp("held"))


def held(rank: dict, step: int) -> int:
    return rank["steps"][step][2]


@pytest.mark.parametrize("case", OURS)
def test_from_the_third_step_on_at_most_two_layers_are_held_beside_the_slice(report, case):
    for rank in report[case]:
        two_layers = 2 * rank["whole"] // LAYERS
        assert rank["shard"] * 2 == rank["whole"]
        assert [held(rank, step) <= two_layers for step in (2, 3)] == [True, True]


@pytest.mark.parametrize("case", ["stock", "stock, recomputed"])
def test_with_the_function_of_bitsandbytes_the_whole_base_is_held(report, case):
    for rank in report[case]:
        assert held(rank, 2) > 0.9 * rank["whole"], "bitsandbytes frees it now: the own layer can go"


def test_a_large_reuse_distance_keeps_the_whole_base_from_the_second_step_on(report):
    for rank in report["own, everything reused"]:
        assert held(rank, 0) == 0
        assert held(rank, 2) > 0.9 * rank["whole"]


@pytest.mark.parametrize("case", [*OURS, "stock, recomputed", "own, everything reused"])
def test_losses_and_gradient_norms_are_bitwise_those_of_bitsandbytes(report, case):
    for rank, expected in zip(report[case], report["stock"], strict=True):
        assert [step[:2] for step in rank["steps"]] == [step[:2] for step in expected["steps"]]


def test_nothing_of_the_base_is_held_after_the_backward(report):
    for case in OURS:
        for rank in report[case]:
            assert rank["steps"][-1][3] == 0
