"""The rank behind test_host_reads.py: reads of the device in a step, and in one with a planted read.

It runs in an interpreter of its own: a process that has computed with several threads cannot be forked.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gdrt_ds import dro
from tests.distributed.exact_cells import LR, Cell, start_runner
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


def watched_steps(rank, world, folder):
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


def main(output, folder):
    Path(output).write_text(json.dumps(run_ranks(1, watched_steps, Path(folder))[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
