"""Starts real ranks for tests: a process imports torch and DeepSpeed once and forks ranks, which talk over
gloo.
"""

from __future__ import annotations

import functools
import gc
import importlib
import multiprocessing
import os
import pickle
import queue as queues
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OF_A_RANK = (
    "deepspeed",
    "peft",
    "peft.tuners.lora.bnb",
    "transformers.models.llama.modeling_llama",
    "transformers.integrations.bitsandbytes",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "torch.utils.cpp_extension",
    "gdrt_ds.train",
    "gdrt_ds.planning.plan",
    "gdrt_ds.training.run",
    "gdrt_ds.models.four_bit",
)
"""What a training imports and nothing here names. Importing it takes most of the time of a small rank."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def preload() -> None:
    """Imports what every rank needs, so that forking one costs nothing. Starts no thread: forks lose them.

    The modules are given by name, because an import that nothing uses is one that a linter takes away.
    """
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    _import_once()


@functools.cache
def _import_once() -> None:
    from gdrt_ds.runtime import prepare_libraries

    prepare_libraries()
    for name in OF_A_RANK:
        importlib.import_module(name)
    # What is imported stays for good. A rank that collects garbage need not walk through it.
    gc.collect()
    gc.freeze()


def status_of(command: Callable[[], Any]) -> int:
    """Runs a command in a fork; returns the exit status that the interpreter would end with.

    Args:
        command: returns the status, or None for 0, or raises SystemExit.
    """
    try:
        returned = command()
    except SystemExit as end:
        returned = end.code
        if isinstance(returned, str):
            print(returned, file=sys.stderr)
            return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return int(returned or 0)


def _child(function, rank, world, port, queue, args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
        from gdrt_ds.runtime import unname_shared_memory

        unname_shared_memory(rank, world)
        queue.put((rank, "ok", pickle.dumps(function(rank, world, *args))))
    except BaseException as error:  # the parent must hear of everything, UserError included
        queue.put((rank, "error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    queue.close()
    queue.join_thread()
    os._exit(0)


def run_ranks(world: int, function, *args, timeout_s: float = 300.0, may_die: bool = False) -> list:
    """Results of function(rank, world, *args) on every rank, in rank order. Results must be picklable.

    With `may_die` a killed rank gives None and its peers are stopped.
    """
    preload()
    context = multiprocessing.get_context("fork")
    queue, port = context.Queue(), free_port()
    processes = [
        context.Process(target=_child, args=(function, rank, world, port, queue, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    results, deadline, problem = {}, time.monotonic() + timeout_s, None
    while len(results) < world and problem is None:
        try:
            rank, status, value = queue.get(timeout=0.2)
            if status == "error":
                problem = f"rank {rank}: {value}"
            results[rank] = pickle.loads(value) if status == "ok" else value
        except queues.Empty:
            dead = [r for r, p in enumerate(processes) if not p.is_alive() and r not in results]
            if dead and queue.empty():
                if may_die:
                    break
                problem = f"rank {dead[0]} ended without a result (exit {processes[dead[0]].exitcode})"
        if time.monotonic() > deadline:
            problem = (
                f"ranks {[r for r in range(world) if r not in results]} did not finish within {timeout_s} s"
            )
    for process in processes:
        process.join(timeout=0.0 if may_die or problem else 10.0)
        if process.is_alive():
            process.kill()
            process.join()
    if problem and not may_die:
        raise RuntimeError(problem)
    return [results.get(rank) for rank in range(world)]
