"""A signal in a validation or a refresh of the groups is heard at once, and the resumed run loses nothing."""

import pytest

from tests.distributed.scenario_stopped_passes import EVAL_EVERY, STEPS, STOPS
from tests.forked import run_scenario

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_scenario("scenario_stopped_passes", tmp_path_factory.mktemp("stopped_passes"))


def test_all_ranks_leave_the_pass_when_the_signal_comes_to_one_of_them(report):
    assert report["straight_status"] == [0, 0]
    assert report["status"] == [*([75, 75] for _ in STOPS), [0, 0]]
    assert report["saved"] == [*(step for _, step in STOPS), STEPS]


def test_the_run_that_goes_on_makes_each_validation_once_and_is_bitwise_the_straight_one(report):
    straight, stopped = report["straight"], report["stopped"]
    made = [record["step"] for record in stopped["validations"]]
    assert made == list(range(EVAL_EVERY, STEPS + 1, EVAL_EVERY))
    for name in ("steps", "validations", "best", "adapter"):
        assert stopped[name] == straight[name], name
