"""A step reads the device once, and logging once for all steps since its last line.

The engine is DeepSpeed's, on one rank. What is counted, and why a CPU is enough, stands in
tests/host_reads.py.
"""

from __future__ import annotations

import json

import pytest
import torch

from gdrt_ds.runtime import Runtime
from gdrt_ds.training.telemetry import Telemetry, read_at_once
from tests.distributed.exact_cells import Cell, make_config
from tests.forked import run_scenario
from tests.host_reads import HostReads


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Reads of one step per kind of objective, then of a step after a second read was planted."""
    return run_scenario("scenario_host_reads", tmp_path_factory.mktemp("steps"))


@pytest.mark.distributed
def test_a_step_reads_the_device_once_whatever_the_objective_and_the_order_of_events(steps):
    assert steps[:-1] == [{"buffer.py:flags:tolist": 1}] * 3


@pytest.mark.distributed
def test_a_second_read_in_a_step_is_seen(steps):
    assert steps[-1] == {"buffer.py:flags_and_more:item": 1, "buffer.py:flags:tolist": 1}


def record(step: int) -> dict:
    return {
        "step": step,
        "loss": torch.tensor(1.5, dtype=torch.float64),
        "lr": 0.1,
        "grad_norm": torch.tensor(0.1),
        "tokens": 7,
        "objective": torch.tensor(2.5, dtype=torch.float64),
        "skipped": False,
        "group_loss": torch.tensor([1.0, float("nan")], dtype=torch.float64),
        "group_weight": torch.tensor([1.0, float("nan")], dtype=torch.float64),
        "group_count": torch.tensor([float(step), 0.0], dtype=torch.float64),
    }


def test_logging_reads_all_steps_since_its_last_line_at_once(tmp_path):
    config = make_config(Cell(), tmp_path, 1)
    config.train.log_every = 4
    with Telemetry(tmp_path, config, Runtime(), 8, 0) as telemetry:
        for step in (1, 2, 3):
            with HostReads() as reads:
                telemetry.step(record(step))
            assert not reads.counts
        with HostReads() as reads:
            telemetry.step(record(4))
    # weight_watch.py looks at numbers that are on the host already.
    of_records = {n: times for n, times in reads.counts.items() if not n.startswith("weight_watch.py")}
    assert of_records == {"telemetry.py:read_at_once:tolist": 1}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["group_count"] for line in lines] == [[float(step), 0.0] for step in (1, 2, 3, 4)]
    assert lines[0]["group_loss"] == [1.0, None] and lines[0]["objective"] == 2.5


def test_numbers_that_are_read_at_once_are_those_that_are_read_one_by_one():
    generator = torch.Generator().manual_seed(0)
    values = {
        "float32": torch.randn((), generator=generator),
        "vector": torch.randn(5, generator=generator, dtype=torch.float64),
        "nothing": torch.zeros(0),
        "text": "kept",
        "none": None,
    }
    (read,) = read_at_once([values])
    assert read["float32"] == values["float32"].item()
    assert read["vector"] == values["vector"].tolist()
    assert (read["nothing"], read["text"], read["none"]) == ([], "kept", None)
