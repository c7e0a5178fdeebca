"""Which rank this process is: `deepspeed`, `torchrun`, `srun` and plain `python` each say it their way."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from gdrt_ds.errors import UserError

PROCESS_STARTED = time.monotonic()


@dataclass
class Runtime:
    """One process of the job.

    Attributes:
        rank: its number among all processes of the job.
        local_rank: its number among those of its machine.
        world: processes of the job.
        local_world: processes of this machine.
        device: where its tensors are.
        launcher: what started it.
        life: how often the job was restarted; an older life may not write any more.
        threads: its CPU threads.
        stop_signal: the last signal that asked for a checkpoint, if one came.
        max_minutes: how old the process may become before it saves and ends (run.max_minutes).
    """

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    launcher: str = "python"
    life: int = 0
    threads: int = 1
    stop_signal: int | None = None
    max_minutes: float | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def time_is_up(self) -> bool:
        """Whether this process is older than run.max_minutes."""
        return self.max_minutes is not None and time.monotonic() - PROCESS_STARTED >= 60 * self.max_minutes

    def barrier(self) -> None:
        """Waits for all ranks; returns at once where there is no other.

        DeepSpeed binds a group of one rank to no device, and at a barrier NCCL warns that it guesses one.
        """
        if self.world > 1 and dist.is_initialized():
            dist.barrier()


FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Steps from here on are no srun: the interactive shell, the batch script and more (slurm.h)."""


def detect_rank() -> dict[str, Any]:
    """Returns rank, local_rank, world, local_world and launcher from the environment; it starts nothing."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _from_torch_variables()
    if "SLURM_PROCID" in os.environ and _tasks_of_step() > 1:
        return _from_slurm_variables()
    return {"rank": 0, "local_rank": 0, "world": 1, "local_world": 1, "launcher": "python"}


def _from_torch_variables() -> dict[str, Any]:
    """The variables that torchrun and the deepspeed launcher set, and our Slurm templates too."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        launcher = "torchrun"
    elif "SLURM_STEP_ID" in environment:
        launcher = "srun"
    else:
        launcher = "deepspeed"
    world = int(environment["WORLD_SIZE"])
    return {
        "rank": int(environment["RANK"]),
        "local_rank": int(environment.get("LOCAL_RANK", 0)),
        "world": world,
        # torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE.
        "local_world": int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or world),
        "launcher": launcher,
    }


def _tasks_of_step() -> int:
    """The tasks of the step of a Slurm job that this process is in; 1 where it is in none.

    A batch script and the shell of an interactive allocation are steps of one task, and both keep
    SLURM_NTASKS of the whole job. Taken for a rank such a process would wait for peers for ever.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    if not step or (step.isdigit() and int(step) >= FIRST_SPECIAL_STEP):
        return 1
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)


def _from_slurm_variables() -> dict[str, Any]:
    """The variables that srun sets for each task."""
    world = _tasks_of_step()
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or 1)
    return {
        "rank": int(os.environ["SLURM_PROCID"]),
        "local_rank": int(os.environ.get("SLURM_LOCALID", 0)),
        "world": world,
        "local_world": -(-world // nodes),
        "launcher": "srun",
    }


def cpu_threads(local_world: int) -> int:
    """Returns the CPU threads of one rank: OMP_NUM_THREADS, else the machine's cores divided by its ranks.

    By itself every rank would take all cores. Of a list, as OpenMP allows it for nested threads, the first
    number counts.

    Raises:
        UserError: OMP_NUM_THREADS is something else.
    """
    given = os.environ.get("OMP_NUM_THREADS")
    if given:
        first = given.split(",")[0].strip()
        if not first.isdigit() or int(first) == 0:
            raise UserError(f"OMP_NUM_THREADS = {given!r} is no number of threads", "set it to 1 or more")
        return int(first)
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // max(1, local_world))


def free_port() -> int:
    """Returns a TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
