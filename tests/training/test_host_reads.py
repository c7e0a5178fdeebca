"""A step reads the device once, and logging once for all steps since its last line.

The engine is DeepSpeed's, on one rank. What is counted, and why a CPU is enough, stands in
tests/host_reads.py.
"""

from __future__ import annotations

import json

import pytest
import torch

from gdrt_ds import dro
from gdrt_ds.runtime import Runtime
from gdrt_ds.training.telemetry import Telemetry, read_at_once
from tests.distributed.exact_cells import LR, Cell, make_config, start_runner
from tests.distributed.ranks import run_ranks
from tests.host_reads import HostReads

# Checks of arguments that run on CPUs only; on a device they are assertions of the device (loss/checks.py).
# The plan of a masked softmax is made from tensors that stay on the CPU (loss/allowed.py).
ON_THE_CPU_ONLY = ("checks.py:check_range:", "checks.py:require:", "allowed.py:plan_allowed:")
CELLS = [
    Cell(2, stage=1, base="none", objective="cvar", options=(("dro.cvar_over", "tokens"),)),
    Cell(1, stage=1, base="none", objective="msl"),
    Cell(1, stage=1, base="none", objective="group_dro", estimate="ema", packing="none"),
]


def of_the_device(reads: HostReads) -> dict[str, int]:
    return {name: times for name, times in reads.counts.items() if not name.startswith(ON_THE_CPU_ONLY)}


def plant_a_second_read() -> None:
    usual = dro.StepBuffer.flags

    def flags_and_more(self):
        self.data.sum().item()
        return usual(self)

    # The read has to come from a file of the package, as a careless change would.
    flags_and_more.__code__ = flags_and_more.__code__.replace(co_filename=usual.__code__.co_filename)
    dro.StepBuffer.flags = flags_and_more


def _watched_steps(rank, world, folder):
    """Reads of one step per cell, and of a step of the last one after a second read was planted."""
    found = []
    for cell in CELLS:
        runner = start_runner(cell, rank, world, folder)
        runner.run(0, LR)
        with HostReads() as reads:
            runner.run(1, LR)
        found.append(of_the_device(reads))
        if cell == CELLS[-1]:
            plant_a_second_read()
            with HostReads() as reads:
                runner.run(2, LR)
            found.append(of_the_device(reads))
        runner.engine.destroy()
    return found


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    return run_ranks(1, _watched_steps, tmp_path_factory.mktemp("steps"))[0]


@pytest.mark.distributed
def test_a_step_reads_the_device_once_whatever_the_objective_and_the_order_of_events(steps):
    assert steps[:-1] == [{"buffer.py:flags:tolist": 1}] * len(CELLS)


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
