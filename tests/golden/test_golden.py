"""The golden figures hold, and the comparison notices when they do not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.golden.golden import HERE, differences


@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_losses_weights_and_metrics_are_the_golden_ones():
    done = subprocess.run(
        [sys.executable, str(HERE / "golden.py")],
        capture_output=True,
        text=True,
        timeout=1500,
        env={**os.environ},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "0 figures differ" in done.stdout


def test_a_last_bit_is_a_difference_on_one_machine_and_none_between_machines():
    golden = {"steps": [{"loss": 1.0, "group_loss": [2.0, None]}]}
    found = {"steps": [{"loss": 1.0 + 2**-52, "group_loss": [2.0, None]}]}
    assert differences(golden, found, exact=True) == [
        "/steps[0]/loss: golden 1.0, this run 1.0000000000000002"
    ]
    assert differences(golden, found, exact=False) == []


def test_a_real_change_and_a_missing_figure_are_differences_everywhere():
    assert differences({"loss": 1.0}, {"loss": 1.0001}, exact=False)
    assert differences({"weights": [0.5, 0.5]}, {"weights": [0.5]}, exact=False)
    assert differences({"loss": 1.0, "nll": 2.0}, {"loss": 1.0}, exact=False) == [
        "/nll: only in the golden file"
    ]
    assert differences({"group_loss": [None]}, {"group_loss": [0.0]}, exact=False)


def test_the_best_temperature_may_differ_by_more_between_machines_and_not_by_much():
    golden = {"temperature, other histories": {"value": 1.0}, "nll": {"value": 1.0}}
    near, far = ({**golden, "temperature, other histories": {"value": 1 + by}} for by in (5e-5, 5e-4))
    assert differences(golden, near, exact=False) == [] != differences(golden, far, exact=False)
    assert differences(golden, near, exact=True)
    assert differences(golden, {**golden, "nll": {"value": 1 + 5e-5}}, exact=False)
