"""A validation that is not finite is never the best, and a run never ends as if nothing had happened."""

import pytest

from tests.forked import run_scenario

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return run_scenario("scenario_broken_weights", tmp_path_factory.mktemp("broken"))


def test_a_run_that_broke_down_late_says_so_and_publishes_its_best_step(runs):
    late = runs["late, skipping"]
    assert late["status"] == 0, late["output"][-3000:]
    assert "validation at step 6 is not finite" in late["output"]
    assert "warning: the last validation (step 6) is not finite" in late["output"]
    summary = late["summary"]
    assert summary["last_validation_finite"] is False
    assert summary["adapter_step"] == summary["best"]["step"] == 4
    assert late["adapter"]


def test_a_run_without_a_finite_validation_fails_and_publishes_no_adapter(runs):
    early = runs["early, skipping"]
    assert early["status"] == 2 and early["summary"]["status"] == "failed"
    assert "no validation was finite: no adapter is published" in early["output"]
    assert "best so far" not in early["output"] and not early["adapter"]


def test_a_model_that_no_longer_learns_is_told(runs):
    dead = runs["a rate far too large"]
    assert "the gradient of step 6 is exactly 0, so nothing is learned" in dead["output"]
    assert "is exactly 0" not in runs["late, skipping"]["output"]


def test_a_step_whose_validation_is_not_finite_is_not_published(runs):
    stopped = runs["in the last step"]
    assert stopped["status"] == 2 and stopped["summary"]["status"] == "failed"
    assert "validation at step 6 is not finite" in stopped["output"]
    assert "this step is not published" in stopped["output"]
    assert "disk" not in stopped["output"]
    assert "step_6" not in stopped["checkpoints"] and not stopped["adapter"]
