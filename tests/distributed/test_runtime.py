"""Joining and leaving the process group: what a run leaves behind on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import ROOT, free_port

SHARED = Path("/dev/shm")
RANK = """
import os, torch
from gdrt_ds.runtime import start_runtime
runtime = start_runtime(120)
import deepspeed.comm as comm
tensor = torch.full((64,), float(runtime.rank + 1))
comm.inference_all_reduce(tensor)                # goes through DeepSpeed's shared memory
print("sum", tensor.unique().tolist(), flush=True)
runtime.barrier()
os._exit(0)
"""

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no /dev/shm on this system")
@pytest.mark.parametrize("world", [1, 2])
def test_no_shared_memory_outlives_the_ranks_and_it_still_works(world):
    port = free_port()
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "LOCAL_SIZE": str(world),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for r in range(world)
    ]
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), said
    assert all(f"sum [{float(sum(range(1, world + 1)))}]" in text for text in said), said
    assert not list(SHARED.glob(f"*_{port}_*"))
