"""How benchmarks start the real trainer: command, environment, and the allocator preloaded on CPUs."""

from __future__ import annotations

import ctypes.util
import os
import sys
from pathlib import Path


def trainer_command(world: int, words: list[str]) -> list[str]:
    """Returns the `deepspeed` command; other launches on this machine keep the default port.

    Args:
        world: number of ranks.
        words: what follows `gdrt_ds/train.py`.
    """
    from gdrt_ds.runtime import free_port

    launcher = ["deepspeed", "--master_port", str(free_port()), "--num_gpus", str(world)]
    return [*launcher, "gdrt_ds/train.py", *words]


def trainer_environment(preload: str | None) -> dict[str, str]:
    """Returns this process's environment with one thread per rank and the commands of its interpreter.

    Args:
        preload: an allocator's library, or None for the system's own.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    if preload:
        environment["LD_PRELOAD"] = preload
    return environment


def find_allocator(wanted: str = "auto") -> str | None:
    """Returns the library to preload, or None for the system's own allocator.

    Args:
        wanted: auto = tcmalloc or jemalloc where installed; glibc; or a library's file name.
    """
    if wanted == "glibc":
        return None
    if wanted != "auto":
        return wanted
    for name in ("tcmalloc_minimal", "tcmalloc", "jemalloc"):
        found = ctypes.util.find_library(name)
        if found:
            return found
    return None
