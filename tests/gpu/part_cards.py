"""Two cards: what the one all-reduce of a step costs, alone and beside work that is queued already."""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from gdrt_ds.dro import StepBuffer
from gdrt_ds.runtime import free_port
from tests.gpu.rows import Row, Spot, seconds_of

GROUPS = 8


def run(spot: Spot) -> list[Row]:
    if not spot.dry and torch.cuda.device_count() < 2:
        return [Row("overlap of the all-reduce", "not measured: one card")]
    with tempfile.NamedTemporaryFile() as result:
        processes.spawn(measure, (spot.device.type, free_port(), result.name), nprocs=2)
        alone, without, beside = torch.load(result.name).tolist()
    added = beside - without
    return [
        Row("all-reduce of one step alone", f"{1e6 * alone:.0f} us"),
        Row("work without it", f"{1e6 * without:.0f} us"),
        Row(
            "what it adds to work that is queued behind it",
            f"{1e6 * added:.0f} us",
            *bound(spot, added, alone),
        ),
    ]


def bound(spot: Spot, added: float, alone: float) -> tuple:
    """On cards it must not cost more than alone; ranks that share a processor's cores say nothing."""
    if spot.dry:
        return ()
    return f"at most {1.2e6 * alone:.0f} us", added <= 1.2 * alone


def measure(rank: int, kind: str, port: int, path: str) -> None:
    """One rank; rank 0 writes the seconds of each case."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", rank=rank, world_size=2)
    size, repeats = (4096, 30) if kind == "cuda" else (64, 3)
    matrix = torch.randn(size, size, device=device)

    def work():
        for _ in range(4):
            torch.mm(matrix, matrix)

    def reduced():
        buffer = StepBuffer(GROUPS, device)
        buffer.reduce()
        buffer.wait()

    def both():
        buffer = StepBuffer(GROUPS, device).reduce(async_op=True)
        work()
        buffer.wait()

    for action in (reduced, work, both):
        action()
    seconds = [seconds_of(action, device, repeats) for action in (reduced, work, both)]
    if rank == 0:
        torch.save(torch.tensor(seconds, dtype=torch.float64), path)
    dist.destroy_process_group()
