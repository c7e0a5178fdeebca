"""How a process joins its job: device, CPU threads, process group and signals.

`start_runtime` understands every launcher of ranks.py. `single_process_runtime` is for commands that no
launcher started.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from gdrt_ds.errors import UserError
from gdrt_ds.runtime.build_folder import own_build_folder
from gdrt_ds.runtime.devices import device_of_rank, name_accelerator
from gdrt_ds.runtime.quick_imports import import_bitsandbytes
from gdrt_ds.runtime.ranks import Runtime, cpu_threads, detect_rank, free_port
from gdrt_ds.runtime.signals import catch_stop_signals


def quiet_libraries() -> None:
    """Keeps the log readable: silences what libraries say to each other's authors, and progress bars."""
    for library in ("torch.distributed", "deepspeed", "transformers"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    # PEFT announces what it would save where an adapter is on lm_head; loading an adapter saves nothing.
    warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`", category=UserWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # bitsandbytes advises a kernel for inference that training does not use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def prepare_libraries() -> None:
    """Keeps the log readable and the start short; for commands, before the imports that bring libraries."""
    quiet_libraries()
    import_bitsandbytes()


def single_process_runtime() -> Runtime:
    """The runtime of a command that no launcher started: the first GPU or the CPU, no process group."""
    quiet_libraries()
    if torch.cuda.is_available():
        return Runtime(device=torch.device("cuda", 0))
    return Runtime(device=torch.device("cpu"))


def start_runtime(timeout_s: int = 600) -> Runtime:
    """Joins the process group (NCCL on GPUs, gloo on CPUs) and catches the signals that ask for a checkpoint.

    Args:
        timeout_s: seconds after which ranks give up waiting for each other.

    Raises:
        UserError: rendezvous failed, with the addresses tried.
    """
    quiet_libraries()
    found = detect_rank()
    found["threads"] = cpu_threads(found["local_world"])
    torch.set_num_threads(found["threads"])
    name_accelerator()
    device = device_of_rank(found["local_rank"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    life = os.environ.get("GDRT_LIFE", os.environ.get("SLURM_RESTART_COUNT", 0))
    runtime = Runtime(device=device, life=int(life or 0), **found)
    complete_rendezvous(runtime)
    own_build_folder()
    import deepspeed

    try:
        deepspeed.init_distributed(
            "nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout_s),
        )
        if device.type == "cpu":
            unname_shared_memory(runtime.rank, runtime.world)
    except (RuntimeError, dist.DistError) as error:
        raise UserError(
            f"rank {runtime.rank} of {runtime.world} could not join the process group at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {error}",
            "check MASTER_ADDR and MASTER_PORT; two jobs on one machine need a port each (`deepspeed "
            "--master_port N`, "
            "`torchrun --master_port N`); on several interfaces set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME",
        ) from None
    catch_stop_signals(runtime)
    return runtime


def complete_rendezvous(runtime: Runtime) -> None:
    """Sets the variables of torch's rendezvous that the launcher left out.

    DeepSpeed takes LOCAL_RANK for the number of the device, so it becomes that: where every task of Slurm
    sees one GPU, the fourth task's device is number 0 and not 3.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        # One process alone needs no port that others know.
        os.environ["MASTER_PORT"] = str(free_port()) if runtime.world == 1 else "29500"
    os.environ["RANK"] = str(runtime.rank)
    os.environ["WORLD_SIZE"] = str(runtime.world)
    number = runtime.local_rank
    if runtime.device.type == "cuda":
        number = runtime.device.index
    os.environ["LOCAL_RANK"] = str(number)


def unname_shared_memory(rank: int, world: int) -> None:
    """Removes the names of DeepSpeed's shared memory from /dev/shm; every rank calls it.

    DeepSpeed's CPU ranks share 66 MiB each by names that nobody removes: a few hundred runs would fill the
    memory. When every rank has joined, every rank has mapped them all. Then the names can go, and the memory
    ends with the processes, however they end.
    """
    if world > 1:
        dist.barrier()
    address = os.environ["MASTER_ADDR"]
    port = os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    with contextlib.suppress(OSError):  # ranks on several nodes have none
        (Path("/dev/shm") / name).unlink()
